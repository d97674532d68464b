"""Compares what an export holds with the model's vectors, and refuses an export that would rank documents differently."""

import json
from collections.abc import Callable
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

    def of(self, weights: sp.csr_matrix) -> sp.csr_matrix:
        """The largest error of each weight."""
        return self.share * abs(weights) + self.step * (weights != 0)


def require_same_vectors(
    source: str,
    texts: list[str],
    found: sp.csr_matrix,
    exact: sp.csr_matrix,
    tolerance: float = ROUNDING,
    rounding: Rounding | None = None,
) -> float:
    """The largest difference between weights from files and the model's: [texts, dimensions] each.

    Raises ConfigError for more than rounding and `tolerance`, a share of the largest weight (of 1 if all are smaller).
    """
    difference = abs(found - exact)
    unexplained = (difference - (rounding or Rounding()).of(exact)).max(axis=1).toarray()
    worst = int(np.nan_to_num(unexplained, nan=np.inf).argmax())
    if not unexplained[worst] <= tolerance * max(1.0, abs(exact).max()):  # also true of NaN
        raise ConfigError(
            f"{source} another vector than the model for '{texts[worst][:40]}': off by {difference[worst].max():.3g}"
        )
    return float(difference.max())


def scores_of(*pairs: tuple[sp.csr_matrix, sp.csr_matrix]) -> list[np.ndarray]:
    """[queries, documents] of each pair of queries and documents, in double precision."""
    dimensions = np.unique(np.concatenate([queries.indices for queries, _ in pairs]))  # the others add nothing
    dense = [[rows[:, dimensions].toarray().astype(np.float64) for rows in pair] for pair in pairs]
    return [queries @ documents.T for queries, documents in dense]


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

    Raises ConfigError when a top 10 changes where the engine does not round by itself. `remedy` ends the message.
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


def write_figures(file: Path, figures: dict[str, Any], echo: Callable[[str], None]) -> None:
    """Store what a check found beside what it checked, and print it."""
    write_atomically(file, json.dumps(figures, indent=1) + "\n")
    same, queries, documents = (figures[name] for name in ("top_10_unchanged", "queries", "documents"))
    count = f"all {queries}" if same == queries else f"{same} of {queries}"
    echo(f"checked   top 10 the same for {count} queries over {documents} documents, as read back from the files")
    if same < queries:
        change = f"{100 * figures['largest_change']:.2g}% of the best score"
        echo(f"          fine: the others swap documents within {change} ({figures['engine']})")
