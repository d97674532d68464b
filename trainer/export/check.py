"""Scores queries against documents as exported, and refuses an export that would rank them differently."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.data.beir import read_search_set
from trainer.data.sources import QUICKSTART
from trainer.system.files import write_atomically

DEPTH = 10
# What float32 sums in another order may differ by, as a share: no export can keep apart what is nearer than that.
ROUNDING = 1e-5

# From weights of any shape to how much lower, and how much higher, each of them may be where it is stored.
Rounding = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def exactly(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounding of what keeps every weight as it is."""
    return np.zeros_like(weights), np.zeros_like(weights)


@dataclass(frozen=True)
class Weights:
    """The model's weights, and how much lower and higher they may be as stored: [texts, dimensions] each."""

    exact: np.ndarray
    lower: np.ndarray
    higher: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, rounding: Rounding) -> "Weights":
        """What storing rows of weights may do to them."""
        return cls(rows, *rounding(rows))

    def off_by(self) -> np.ndarray:
        """How far each weight may be off."""
        return np.maximum(self.lower, self.higher)


@dataclass(frozen=True)
class Rule:
    """When the best ten may change their order: where `queries` and `documents` say that the engine itself may do it.

    These hold what it does to weights by itself, its precision and no negative ones, and nothing that is ours to choose.
    A storage is `monotone` when the greater of two weights is never stored as the smaller one. `engine` says in words what
    it does, if anything; `remedy` ends the message of a refusal.
    """

    queries: Weights
    documents: Weights
    monotone: bool = True
    engine: str = ""
    remedy: str = ""

    @property
    def words(self) -> str:
        """What the figures say of it."""
        same = f"the best {DEPTH} stay in order, except where scores are within {ROUNDING:g} of each other (float32)"
        pair = (
            f", and except for two documents whose exact scores differ by less than the engine ({self.engine}) can take "
            "from that difference, worked out for the weights of these two and the query"
        )
        return same + pair * bool(self.engine)


@dataclass(frozen=True)
class Swap:
    """Two documents of which the export ranks the worse one first: the difference of their exact scores.

    `best` is the query's best score, `explained` how much of the difference the engine may take away.
    """

    query: int
    gap: float
    best: float
    explained: float


def used_by(queries: sp.csr_matrix, *rows: sp.csr_matrix) -> Iterator[np.ndarray]:
    """Rows, the queries' first, in double precision and in the dimensions alone that a query has."""
    dimensions = np.unique(queries.indices)
    for matrix in (queries, *rows):
        yield matrix[:, dimensions].toarray().astype(np.float64)


def compare(queries: Weights, documents: Weights, found: np.ndarray, rule: Rule) -> dict[str, Any]:
    """Figures of a comparison: of the model's scores with those found in the export, [queries, documents].

    Raises ConfigError when a score differs by more than the weights' rounding adds up to, or the order of a query's best
    ten changes against the rule.
    """
    wanted = queries.exact @ documents.exact.T
    allowed = allowed_by(queries, documents) + ROUNDING * np.abs(wanted).max(initial=1.0)
    difference = np.abs(found - wanted)
    if not (difference <= allowed).all():  # also true of NaN
        query, document = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf) - allowed), wanted.shape)
        raise ConfigError(
            f"the exported files score differently: query {query + 1} and document {document + 1} have "
            f"{found[query, document]:.4f} instead of {wanted[query, document]:.4f}, where quantisation explains "
            f"{allowed[query, document]:.4f}. The export is not to be used"
        )
    swaps = swaps_of(wanted, found, rule)
    require_explained(swaps, rule)
    return {
        "queries": wanted.shape[0],
        "documents": wanted.shape[1],
        "pairs": wanted.size,
        "pairs_with_a_score": int((wanted != 0).sum()),
        "largest_difference": float(difference.max(initial=0.0)),
        "largest_allowed": float(allowed.max(initial=0.0)),
        "largest_score": float(wanted.max(initial=0.0)),
        "rule": rule.words,
        "top_10_unchanged": wanted.shape[0] - len({swap.query for swap in swaps}),
        "pairs_swapped": len(swaps),
        "largest_gap_swapped": float(max((swap.gap / swap.best for swap in swaps), default=0.0)),
        "largest_share_of_what_is_explained": float(max((swap.gap / swap.explained for swap in swaps), default=0.0)),
    }


def swaps_of(wanted: np.ndarray, found: np.ndarray, rule: Rule) -> list[Swap]:
    """The documents in another order than the model's, as seen in the best ten."""
    return [
        Swap(
            query,
            wanted[query, better] - wanted[query, worse],
            np.abs(wanted[query]).max(),
            explained(rule, query, better, worse) if rule.engine else 0.0,
        )
        for query, better, worse in swapped(wanted, found)
    ]


def require_explained(swaps: list[Swap], rule: Rule) -> None:
    """Raise ConfigError for documents in another order whose difference the engine does not explain."""
    swap = max(swaps, key=lambda swap: (swap.gap - swap.explained) / swap.best, default=None)
    if swap and swap.gap > swap.explained:
        explanation = f"; the engine explains {swap.explained / swap.best:.2%} for these two" if rule.engine else ""
        raise ConfigError(
            f"the order of the best {DEPTH} changes: for query {swap.query + 1}, documents change places whose scores "
            f"are {swap.gap / swap.best:.4%} of the best apart{explanation}. The export is not to be used{rule.remedy}"
        )


def allowed_by(queries: Weights, documents: Weights) -> np.ndarray:
    """How far each score may be off when each weight may be off by its rounding: [queries, documents].

    |(q + a)(d + b) - q d| <= |q| b + a |d| + a b, summed over the dimensions.
    """
    of_queries, of_documents = queries.off_by(), documents.off_by()
    return np.abs(queries.exact) @ of_documents.T + of_queries @ (np.abs(documents.exact) + of_documents).T


def swapped(wanted: np.ndarray, found: np.ndarray, depth: int = DEPTH) -> Iterator[tuple[int, int, int]]:
    """(query, better, worse): documents that the export ranks the other way round, as seen in a query's best.

    The better one is among the best by the model, the worse one by the export; if the two lists differ at all, there are
    such two. Documents whose scores are within ROUNDING have no order.
    """
    for query, (exact, exported) in enumerate(zip(wanted, found, strict=True)):
        places = [np.empty(len(exact), dtype=int) for _ in range(2)]
        tops = []
        for place, scores in zip(places, (exact, exported), strict=True):
            order = np.argsort(-scores, kind="stable")
            place[order] = np.arange(len(order))
            tops.append(order[:depth])
        for better in tops[0]:
            for worse in tops[1]:
                if (
                    exact[better] - exact[worse] > ROUNDING * abs(exact[better])
                    and places[1][worse] < places[1][better]
                ):
                    yield query, int(better), int(worse)


def explained(rule: Rule, query: int, better: int, worse: int) -> float:
    """How much of the difference of two documents' exact scores the engine can take away.

    Each dimension adds q (a - b), with q, a and b as far off as the engine lets them be, and q the same for both
    documents; where the storage is monotone, a - b does not change its sign.
    """
    queries, documents = rule.queries, rule.documents
    exact = documents.exact[better] - documents.exact[worse]
    least = exact - documents.lower[better] - documents.higher[worse]
    most = exact + documents.higher[better] + documents.lower[worse]
    if rule.monotone:
        apart = np.abs(exact) > ROUNDING * np.maximum(np.abs(documents.exact[better]), np.abs(documents.exact[worse]))
        least = np.where(apart & (exact > 0), np.maximum(least, 0.0), least)
        most = np.where(apart & (exact < 0), np.minimum(most, 0.0), most)
    weight = queries.exact[query]
    corners = [q * d for q in (weight - queries.lower[query], weight + queries.higher[query]) for d in (least, most)]
    noise = ROUNDING * float(np.abs(weight) @ np.abs(documents.exact[better]))
    return float(weight @ exact - np.minimum.reduce(corners).sum()) + noise


def write_figures(file: Path, figures: dict[str, Any], say: Callable[[str], None]) -> None:
    """Store what a check found beside what it checked, and say it."""
    write_atomically(file, json.dumps(figures, indent=1) + "\n")
    same, queries, swaps = (figures[name] for name in ("top_10_unchanged", "queries", "pairs_swapped"))
    gap, share = figures["largest_gap_swapped"], figures["largest_share_of_what_is_explained"]
    swapped_pairs = (
        f"; {swaps} pairs swapped, at most {100 * gap:.2g}% of the best score apart, each less than the engine explains "
        f"for these two ({share:.0%} of that at most)"
    )
    say(
        f"checked   {figures['pairs']:,} pairs as they will be scored ({figures['quantisation']}): "
        f"off by {figures['largest_difference']:.4f} at most, of scores up to {figures['largest_score']:.1f}"
    )
    say(f"          top 10 the same for {same} of {queries} queries{swapped_pairs * (swaps > 0)}")


def embedded_queries() -> list[str]:
    """Queries to check with where the user gives none."""
    return list(read_search_set(QUICKSTART / "search", "dev", "quickstart").queries.values())


def embedded_documents() -> list[str]:
    """Documents to check with where there is no corpus."""
    return list(read_search_set(QUICKSTART / "search", "dev", "quickstart").corpus.values())
