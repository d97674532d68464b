"""Exact search over sparse vectors, and what makes a search system one that mteb can evaluate."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from mteb.models.model_meta import ModelMeta
from sentence_transformers import SparseEncoder
from sklearn.preprocessing import normalize

from trainer.data.beir import passage_text
from trainer.encoding.encode import encode
from trainer.system.progress_bar import ProgressReport, in_columns

# Scores of the best passages by query.
Found = dict[str, dict[str, float]]


class InvertedIndex:
    """Exact search over sparse vectors: for every dimension, the passages in which it is active and their weights.

    A query's search walks the postings of its active dimensions and nothing else.
    """

    def __init__(self, passages: sp.csr_matrix):
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


class SearchSystem:
    """What mteb's SearchProtocol needs, but for index_texts and search_texts."""

    note = ""  # how it searches, where that depends on the task

    def __init__(self, name: str):
        self.name = name
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": f"local/{name}", "revision": "local"})
        self.passages: list[str] = []

    def index(self, corpus, *, task_metadata, hf_split, hf_subset, encode_kwargs, num_proc=None, **kwargs: Any) -> None:
        """mteb's call: remember the passages' ids and index their texts."""
        self.passages = list(corpus["id"])
        texts = [passage_text(row.get("title"), row["text"]) for row in corpus]
        self.index_texts(texts, language_of(task_metadata, hf_subset))

    def search(
        self,
        queries,
        *,
        task_metadata,
        hf_split,
        hf_subset,
        top_k,
        encode_kwargs,
        top_ranked=None,
        num_proc=None,
        **kwargs,
    ) -> Found:
        """mteb's call: scores of the best passages by query id."""
        found = self.search_texts(list(queries["text"]), top_k)
        return {
            query: {self.passages[number]: float(score) for number, score in zip(numbers, scores, strict=True)}
            for query, (numbers, scores) in zip(queries["id"], found, strict=True)
        }

    def index_texts(self, texts: list[str], language: str | None) -> None:
        """Make the passages searchable. `language` is an ISO 639-3 code, or None when it is not known."""
        raise NotImplementedError

    def search_texts(self, texts: list[str], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers and scores of the best passages of every query, best first."""
        raise NotImplementedError


class SparseSearch(SearchSystem):
    """A sparse encoder and an inverted index."""

    def __init__(self, model: SparseEncoder, name: str, batch_size: int = 32):
        super().__init__(name)
        self.model, self.batch_size = model, batch_size

    def index_texts(self, texts: list[str], language: str | None) -> None:
        """Encode by the document route."""
        vectors = self._encode(texts, "document", "passages")
        self.inverted = InvertedIndex(comparable(self.model, vectors))

    def search_texts(self, texts: list[str], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode by the query route, and search by dot product, or cosine where the model says so."""
        vectors = self._encode(texts, "query", "queries")
        return self.inverted.search(comparable(self.model, vectors), depth)

    def _encode(self, texts: list[str], route: str, unit: str) -> sp.csr_matrix:
        with ProgressReport(desc=in_columns(self.name, "encoding", 12), total=len(texts), unit=unit) as progress:
            return encode(self.model, texts, route, self.batch_size, progress)


def language_of(metadata, subset: str) -> str | None:
    """The one language (ISO 639-3) of a task's subset; None when there are several, or none that is known."""
    languages = metadata.eval_langs[subset] if isinstance(metadata.eval_langs, dict) else metadata.eval_langs
    codes = {language.partition("-")[0] for language in languages} - {"mis"}
    return codes.pop() if len(codes) == 1 else None
