"""A teacher's scores of all queries and passages of a batch, from a vector of each text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True)
class TextVectors:
    """One teacher's vectors of the different queries and passages of some rows; their dot products are its scores."""

    queries: Any
    """[different queries, width], dense or sparse."""
    passages: Any
    """[different passages, width]."""


@dataclass(frozen=True)
class BatchScores:
    """The weighted mean of all teachers' scores."""

    teachers: list[TextVectors]
    weights: list[float]
    queries: np.ndarray
    """[rows]: which of the different queries a row has."""
    passages: np.ndarray
    """[rows, passages]: which of the different passages it has."""
    normalize: bool

    def of(self, asking: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[queries, passages] of the rows that ask and the rows whose passages are read, counted column by column."""
        queries, passages = self.queries[asking], self.passages[rows].T.ravel()
        scores = []
        for teacher in self.teachers:
            found = teacher.queries[queries] @ teacher.passages[passages].T
            scores.append(found.toarray() if sp.issparse(found) else found.astype(np.float32))
        return mean_scores(scores, self.weights, normalize=self.normalize)


def mean_scores(scores: list[np.ndarray], weights: list[float], *, normalize: bool) -> np.ndarray:
    """The weighted mean of several teachers' scores, [queries, passages] each, as float32.

    normalize: bring each query's scores into 0..1 first, the least to 0 and the largest to 1 (arXiv 2411.04403); a query
    whose passages all score the same has 0 for each.
    """
    total = np.zeros(scores[0].shape)
    for values, weight in zip(scores, weights, strict=True):
        values = values.astype(float)
        if normalize:
            least = values.min(axis=1, keepdims=True)
            spread = values.max(axis=1, keepdims=True) - least
            values = (values - least) / np.where(spread > 0, spread, 1)
        total += weight * values
    return (total / sum(weights)).astype(np.float32)
