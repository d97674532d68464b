"""Compares the scores of an export with the model's, and refuses an export that would rank documents differently."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.system.files import write_atomically

DEPTH = 10
# What float32 sums in another order may differ by, as a share: scores nearer to each other than that have no order.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Rounding:
    """How far a stored weight may be off: by a share of itself, and by a step. 0 stays 0."""

    share: float = 0.0
    step: float = 0.0

    def of(self, weights: np.ndarray) -> np.ndarray:
        """The largest error of each weight."""
        return np.where(weights == 0, 0.0, self.share * np.abs(weights) + self.step)


@dataclass(frozen=True)
class Vectors:
    """Queries and documents, or the largest error of each of their weights: [texts, dimensions] each."""

    queries: np.ndarray
    documents: np.ndarray

    def scores(self) -> np.ndarray:
        """[queries, documents]."""
        return self.queries @ self.documents.T


def in_query_dimensions(*pairs: tuple[sp.csr_matrix, sp.csr_matrix]) -> Iterator[Vectors]:
    """Pairs of queries and documents in double precision, in the dimensions alone that any pair's queries have."""
    dimensions = np.unique(np.concatenate([queries.indices for queries, _ in pairs]))
    for pair in pairs:
        yield Vectors(*(rows[:, dimensions].toarray().astype(np.float64) for rows in pair))


def largest_errors(exact: Vectors, off_by: Vectors) -> np.ndarray:
    """How far each score may be off when the weights are: [queries, documents].

    |(q + a)(d + b) - q d| <= |q| b + a (|d| + b), summed over the dimensions.
    """
    of_documents = np.abs(exact.queries) @ off_by.documents.T
    return of_documents + off_by.queries @ (np.abs(exact.documents) + off_by.documents).T


def compare_top_10(wanted: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """For how many queries the best ten documents are the same, in the same order but for ties, and the largest change.

    Both are [queries, documents]. Place by place, the document that `found` puts there has to have the score that
    `wanted` has there; the largest change is the greatest difference, as a share of the query's best score.
    """
    places = (np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH] for scores in (wanted, found))
    best, instead = (np.take_along_axis(wanted, place, axis=1) for place in places)
    difference = np.abs(best - instead)
    same = (difference <= ROUNDING * np.abs(best)).all(axis=1)
    change = (difference / np.maximum(np.abs(best[:, :1]), 1e-30)).max(initial=0.0)
    return {"top_10_unchanged": int(same.sum()), "largest_change": float(change)}


def compare_scores(wanted: np.ndarray, found: np.ndarray, engine: str = "", remedy: str = "") -> dict[str, Any]:
    """Figures of an export's scores beside those that its engine should give: [queries, documents] each.

    `engine` is what the engine does to weights by itself. Raises ConfigError when it is nothing, so that the precision is
    ours, and a top 10 changes. `remedy` ends the message.
    """
    figures = {
        "queries": wanted.shape[0],
        "documents": wanted.shape[1],
        "largest_difference": float(np.abs(found - wanted).max(initial=0.0)),
        "largest_score": float(wanted.max(initial=0.0)),
        "engine": engine,
    } | compare_top_10(wanted, found)
    changed = figures["queries"] - figures["top_10_unchanged"]
    if changed and not engine:
        raise ConfigError(
            f"the top {DEPTH} changes for {changed} of {figures['queries']} queries, by "
            f"{100 * figures['largest_change']:.2g}% of the best score at most. The export is not to be used{remedy}"
        )
    return figures


def require_rounded(exact: Vectors, found: np.ndarray, off_by: Vectors) -> None:
    """Raise ConfigError when one of the scores found, [queries, documents], differs by more than `off_by` adds up to."""
    wanted = exact.scores()
    allowed = largest_errors(exact, off_by) + ROUNDING * np.abs(wanted).max(initial=1.0)
    difference = np.abs(found - wanted)
    if not (difference <= allowed).all():  # also true of NaN
        query, document = np.unravel_index(np.argmax(np.nan_to_num(difference - allowed, nan=np.inf)), wanted.shape)
        raise ConfigError(
            f"the exported files score differently: query {query + 1} and document {document + 1} have "
            f"{found[query, document]:.4f} instead of {wanted[query, document]:.4f}, where rounding explains "
            f"{allowed[query, document]:.4f}. The export is not to be used"
        )


def write_figures(file: Path, figures: dict[str, Any], echo: Callable[[str], None]) -> None:
    """Store what a check found beside what it checked, and say it."""
    write_atomically(file, json.dumps(figures, indent=1) + "\n")
    same, queries, documents = (figures[name] for name in ("top_10_unchanged", "queries", "documents"))
    count = f"all {queries}" if same == queries else f"{same} of {queries}"
    echo(f"checked   top 10 the same for {count} queries over {documents} documents, as read back from the files")
    if same < queries:
        change = f"{100 * figures['largest_change']:.2g}% of the best score"
        echo(f"          fine: the others swap documents within {change} ({figures['engine']})")
