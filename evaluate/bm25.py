"""BM25, the baseline a search team already has, with the analysis of its language."""

from collections.abc import Iterator

import numpy as np

from evaluate.search import SearchSystem
from trainer.config import ConfigError
from trainer.data.bm25 import BM25Index
from trainer.system.progress_bar import going_on, in_columns


class BM25(SearchSystem):
    """Stemmed and without stop words in the task's language; in an unknown language words are taken as they are."""

    def __init__(self) -> None:
        super().__init__("bm25")

    def index_texts(self, texts: list[str], language: str | None) -> None:
        """Choose the analysis and index."""
        with going_on(in_columns(self.name, f"indexing {len(texts):,} passages", 12)):
            self.inverted = BM25Index(texts, language, without_stop_words=True)
        if self.inverted.is_empty:
            raise ConfigError("no passage has a word to search for")
        stemmer = self.inverted.stemmer
        self.note = f"{stemmer} stems, no stop words" if stemmer else "words as they are: no single language is said"

    def search_texts(self, texts: list[str], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Passages that share no word with the query score 0 and are left out."""
        with going_on(in_columns(self.name, f"searching for {len(texts):,} queries", 12)):
            numbers, scores = self.inverted.search(self.inverted.words_of(texts), depth)
        for row, values in zip(numbers, scores, strict=True):
            yield row[values > 0], values[values > 0]
