"""Search systems that mteb can evaluate: a base class, and the sparse encoder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mteb.models.model_meta import ModelMeta

from evaluate.passage_vectors import PassageVectors
from trainer.data.beir import passage_text
from trainer.encoding.encode import encode
from trainer.encoding.inverted_index import InvertedIndex, comparable
from trainer.encoding.windows import measure_lengths, reads_in_windows
from trainer.system.progress_bar import ProgressReport, in_columns


class SearchSystem:
    """What mteb's SearchProtocol needs, but for index_texts and search_texts."""

    note = ""  # how it searches, where that depends on the task

    def __init__(self, name: str) -> None:
        self.name = name
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": f"local/{name}", "revision": "local"})
        self.passages: list[str] = []

    def index(self, corpus: Any, *, task_metadata: Any, hf_subset: str, **kwargs: Any) -> None:
        """mteb's call: remember the passages' ids and index their texts."""
        self.passages = list(corpus["id"])
        texts = [passage_text(row.get("title"), row["text"]) for row in corpus]
        self.index_texts(texts, language_of(task_metadata, hf_subset))

    def search(self, queries: Any, *, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """mteb's call: scores of the best passages by query id."""
        rankings = self.search_texts(list(queries["text"]), top_k)
        return {
            query: {self.passages[number]: float(score) for number, score in zip(numbers, scores, strict=True)}
            for query, (numbers, scores) in zip(queries["id"], rankings, strict=True)
        }

    def index_texts(self, texts: list[str], language: str | None) -> None:
        """Make the passages searchable. `language` is an ISO 639-3 code, or None when it is not known."""
        raise NotImplementedError

    def search_texts(self, texts: list[str], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers and scores of the best passages of every query, best first."""
        raise NotImplementedError


class SparseSearch(SearchSystem):
    """A sparse encoder and an inverted index."""

    def __init__(self, passage_vectors: PassageVectors, name: str) -> None:
        super().__init__(name)
        self.model, self.passage_vectors = passage_vectors.model, passage_vectors

    def index_texts(self, texts: list[str], language: str | None) -> None:
        """Encode by the document route; note how many passages are longer than the model reads."""
        lengths = measure_lengths(self.model, texts)
        self.note = lengths.words(reads_in_windows(self.model)) if lengths else ""
        vectors = self.passage_vectors.encode(texts, self.name)
        self.inverted = InvertedIndex(comparable(self.model, vectors))

    def search_texts(self, texts: list[str], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode by the query route, and search by dot product, or by cosine where the model's similarity is the cosine."""
        size = self.passage_vectors.batch_size
        with ProgressReport(desc=in_columns(self.name, "encoding", 12), total=len(texts), unit="queries") as progress:
            vectors = encode(self.model, texts, "query", size, progress)
        return self.inverted.search(comparable(self.model, vectors), depth)


def language_of(metadata: Any, subset: str) -> str | None:
    """The one language (ISO 639-3) of a task's subset; None when there are several, or none that is known."""
    languages = metadata.eval_langs[subset] if isinstance(metadata.eval_langs, dict) else metadata.eval_langs
    codes = {language.partition("-")[0] for language in languages} - {"mis"}
    return codes.pop() if len(codes) == 1 else None
