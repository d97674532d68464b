"""Exact search over sparse vectors."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from sentence_transformers import SparseEncoder
from sklearn.preprocessing import normalize


class InvertedIndex:
    """Exact search over sparse vectors: for every dimension, the passages in which it is active and their weights.

    A query's search walks the postings of its active dimensions and nothing else.
    """

    def __init__(self, passages: sp.csr_matrix) -> None:
        """passages: [passages, dimensions]."""
        self.count = passages.shape[0]
        self.postings = sp.csr_matrix(passages.T)

    @property
    def bytes(self) -> int:
        """Memory of the postings."""
        return self.postings.data.nbytes + self.postings.indices.nbytes + self.postings.indptr.nbytes

    def search(self, queries: sp.csr_matrix, depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers and scores of the best passages of every query, best first; equal scores by number.

        Passages that share no dimension with the query score 0 and are left out. Weights are positive.
        """
        depth = min(depth, self.count)
        for start, end in pairwise(queries.indptr):
            # a matrix-vector product over the query's postings: 2 to 5 times as fast as the product of sparse matrices
            scores = self.postings[queries.indices[start:end]].T @ queries.data[start:end]
            last = -np.partition(-scores, depth - 1)[depth - 1]
            best = np.flatnonzero(scores >= last if last > 0 else scores > 0)
            best = best[np.argsort(-scores[best], kind="stable")][:depth]
            yield best, scores[best]


def comparable(model: SparseEncoder, vectors: sp.csr_matrix) -> sp.csr_matrix:
    """Vectors whose dot products are the model's similarities: of unit length where it compares by cosine."""
    return normalize(vectors) if model.similarity_fn_name == "cosine" else vectors
