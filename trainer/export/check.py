"""Scores queries against documents as exported, and refuses an export that would rank them differently."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.beir import read_search_set
from trainer.config import ConfigError
from trainer.data.sources import QUICKSTART
from trainer.files import write_atomically

DEPTH = 10
# Documents whose exact scores are this near to each other may change places: rounding decides about them.
NEAR_TIE = 0.005
# What float32 sums in another order, and six digits per weight, may differ by.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Vectors:
    """Queries and documents, [texts, dimensions] each."""

    queries: sp.csr_matrix
    documents: sp.csr_matrix

    def scores(self) -> np.ndarray:
        """[queries, documents], in double precision."""
        return (self.queries.astype(np.float64) @ self.documents.astype(np.float64).T).toarray()


def allowed_by(exact: Vectors, errors: Vectors) -> np.ndarray:
    """How far each score may be off when each weight may be off by its error: [queries, documents].

    |(q + a)(d + b) - q d| <= |q| b + a |d| + a b, summed over the dimensions.
    """
    return (
        abs(exact.queries) @ errors.documents.T
        + errors.queries @ abs(exact.documents).T
        + errors.queries @ errors.documents.T
    ).toarray()


def compare(
    wanted: np.ndarray, found: np.ndarray, allowed: np.ndarray, near_tie: float = NEAR_TIE, remedy: str = ""
) -> dict[str, Any]:
    """Figures of a comparison of scores [queries, documents]: the model's, the export's, and by how much they may differ.

    Raises ConfigError when one differs by more, or when the order of a query's best ten documents changes, except among
    those whose exact scores are within the share `near_tie` of the best score from each other. `remedy` ends the message.
    """
    allowed = allowed + ROUNDING * np.abs(wanted).max(initial=1.0)
    difference = np.abs(found - wanted)
    if not (difference <= allowed).all():  # also true of NaN
        query, document = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf) - allowed), wanted.shape)
        raise ConfigError(
            f"the exported files score differently: query {query + 1} and document {document + 1} have "
            f"{found[query, document]:.4f} instead of {wanted[query, document]:.4f}, where quantisation explains "
            f"{allowed[query, document]:.4f}. The export is not to be used"
        )
    gaps = [largest_gap(row, other) for row, other in zip(wanted, found, strict=True)]
    if max(gaps, default=0.0) > near_tie:
        raise ConfigError(
            f"the order of the best {DEPTH} changes: for query {int(np.argmax(gaps)) + 1}, documents change places whose "
            f"scores are {max(gaps):.1%} apart. The export is not to be used{remedy}"
        )
    return {
        "queries": wanted.shape[0],
        "documents": wanted.shape[1],
        "pairs": wanted.size,
        "pairs_with_a_score": int((wanted != 0).sum()),
        "largest_difference": float(difference.max(initial=0.0)),
        "largest_allowed": float(allowed.max(initial=0.0)),
        "largest_score": float(wanted.max(initial=0.0)),
        "top_10_unchanged": sum(gap == 0.0 for gap in gaps),
        "top_10_near_ties_swapped": sum(gap > 0.0 for gap in gaps),
        "largest_gap_swapped": max(gaps, default=0.0),
        "near_tie": near_tie,
    }


def largest_gap(wanted: np.ndarray, found: np.ndarray, depth: int = DEPTH) -> float:
    """How far apart, as a share of the best score, the exact scores are that stand at one place of the two rankings."""
    depth = min(depth, len(wanted))
    exact, exported = (np.argsort(-scores, kind="stable")[:depth] for scores in (wanted, found))
    best = wanted[exact[0]] if depth else 0.0
    return float(np.abs(wanted[exact] - wanted[exported]).max() / best) if best > 0 else 0.0


def write_figures(file: Path, figures: dict[str, Any], say: Callable[[str], None]) -> None:
    """Store what a check found beside what it checked, and say it."""
    write_atomically(file, json.dumps(figures, indent=1) + "\n")
    swapped = figures["top_10_near_ties_swapped"]
    ties = f"; in {swapped} near ties swapped, at most {figures['largest_gap_swapped']:.2%} apart" if swapped else ""
    say(
        f"checked   {figures['pairs']:,} pairs as they will be scored ({figures['quantisation']}): "
        f"off by {figures['largest_difference']:.4f} at most, of scores up to {figures['largest_score']:.1f}"
    )
    say(f"          top 10 the same for {figures['top_10_unchanged']} of {figures['queries']} queries{ties}")


def embedded_queries() -> list[str]:
    """Queries to check with where the user gives none."""
    return list(read_search_set(QUICKSTART / "search", "dev", "quickstart").queries.values())


def embedded_documents() -> list[str]:
    """Documents to check with where there is no corpus."""
    return list(read_search_set(QUICKSTART / "search", "dev", "quickstart").corpus.values())
