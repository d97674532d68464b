"""BM25, the baseline a search team already has, with the analysis of its language."""

import logging
from collections.abc import Iterator

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import STOPWORDS_NORWEGIAN, STOPWORDS_SWEDISH

from evaluate.search import SearchSystem
from trainer.config import ConfigError
from trainer.system.progress_bar import going_on, in_columns

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when imported

# Lucene's defaults, which Elasticsearch and OpenSearch share.
K1, B = 1.2, 0.75

# Snowball's list, as Lucene's DanishAnalyzer uses it; bm25s has none for Danish.
STOPWORDS_DANISH = """
og i jeg det at en den til er som på de med han af for ikke der var mig sig men et har om vi min havde ham hun nu over
da fra du ud sin dem os op man hans hvor eller hvad skal selv her alle vil blev kunne ind når være dog noget ville jo
deres efter ned skulle denne end dette mit også under have dig anden hende mine alt meget sit sine vor mod disse hvis
din nogle hos blive mange ad bliver hendes været thi jer sådan
"""

# Snowball stemmer and stop words, by ISO 639-3 code.
ANALYSIS: dict[str, tuple[str, list[str]]] = {
    "nob": ("norwegian", list(STOPWORDS_NORWEGIAN)),
    "nno": ("norwegian", list(STOPWORDS_NORWEGIAN)),
    "nor": ("norwegian", list(STOPWORDS_NORWEGIAN)),
    "dan": ("danish", STOPWORDS_DANISH.split()),
    "swe": ("swedish", list(STOPWORDS_SWEDISH)),
}


class BM25(SearchSystem):
    """Stemmed and without stop words in the task's language; in an unknown language words are taken as they are."""

    def __init__(self, name: str = "bm25"):
        super().__init__(name)

    def index_texts(self, texts: list[str], language: str | None) -> None:
        """Choose the analysis and index."""
        stemmer, self.stopwords = ANALYSIS.get(language or "", (None, []))
        self.note = f"{stemmer} stems, no stop words" if stemmer else "words as they are: no single language is said"
        self.stemmer = Stemmer.Stemmer(stemmer) if stemmer else None
        self.count = len(texts)
        with going_on(in_columns(self.name, f"indexing {len(texts):,} passages", 12)):
            words = self.tokenize(texts)
            if not any(words.ids):
                raise ConfigError("no passage has a word to search for")
            self.ranker = bm25s.BM25(k1=K1, b=B, method="lucene")
            self.ranker.index(words, show_progress=False)

    def search_texts(self, texts: list[str], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Passages that share no word with the query score 0 and are left out."""
        depth = min(depth, self.count)
        with going_on(in_columns(self.name, f"searching for {len(texts):,} queries", 12)):
            numbers, scores = self.ranker.retrieve(self.tokenize(texts), k=depth, show_progress=False)
        for row, values in zip(numbers, scores, strict=True):
            yield row[values > 0], values[values > 0]

    def tokenize(self, texts: list[str]):
        """Lower-cased words, analysed; bm25s keeps the vocabulary."""
        return bm25s.tokenize(texts, stopwords=self.stopwords, stemmer=self.stemmer, show_progress=False)
