"""Scores queries against documents as exported, and refuses an export that would rank them differently."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import ConfigError

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


def compare(exact: Vectors, exported: Vectors, errors: Vectors) -> dict[str, Any]:
    """Figures of the comparison. `errors` holds how far each weight may be off, as the format's quantisation is stated.

    Raises ConfigError when a score differs by more than those errors add up to, or when the order of a query's best ten
    documents changes, except among near ties.
    """
    wanted, found = exact.scores(), exported.scores()
    allowed = _allowed(exact, errors) + ROUNDING * np.abs(wanted).max(initial=1.0)
    difference = np.abs(found - wanted)
    if (difference > allowed).any() or not np.isfinite(found).all():
        query, document = np.unravel_index(np.argmax(difference - allowed), difference.shape)
        raise ConfigError(
            f"the exported files score differently: query {query + 1} and document {document + 1} have "
            f"{found[query, document]:.4f} instead of {wanted[query, document]:.4f}, where quantisation explains "
            f"{allowed[query, document]:.4f}. The export is not to be used"
        )
    gaps = [largest_gap(row, other) for row, other in zip(wanted, found, strict=True)]
    if max(gaps, default=0.0) > NEAR_TIE:
        raise ConfigError(
            f"the order of the best {DEPTH} changes: for query {int(np.argmax(gaps)) + 1}, documents change places whose "
            f"scores are {max(gaps):.1%} apart. The export is not to be used; quantise less (--scale)"
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
        "near_tie": NEAR_TIE,
    }


def _allowed(exact: Vectors, errors: Vectors) -> np.ndarray:
    """|(q + a)(d + b) - q d| <= |q| b + a |d| + a b, summed over the dimensions."""
    return (
        abs(exact.queries) @ errors.documents.T
        + errors.queries @ abs(exact.documents).T
        + errors.queries @ errors.documents.T
    ).toarray()


def largest_gap(wanted: np.ndarray, found: np.ndarray, depth: int = DEPTH) -> float:
    """How far apart, as a share of the best score, the exact scores are that stand at one place of the two rankings."""
    depth = min(depth, len(wanted))
    exact, exported = (np.argsort(-scores, kind="stable")[:depth] for scores in (wanted, found))
    best = wanted[exact[0]] if depth else 0.0
    return float(np.abs(wanted[exact] - wanted[exported]).max() / best) if best > 0 else 0.0
