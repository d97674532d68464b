"""BM25 with the analysis of a language: what evaluations compare with, and what hard negatives are searched with."""

import logging
from typing import Any

import bm25s
import numpy as np
import scipy.sparse as sp
import Stemmer
from bm25s.tokenization import STOPWORDS_NORWEGIAN, STOPWORDS_SWEDISH

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when imported

# Lucene's defaults, which Elasticsearch and OpenSearch share.
K1, B = 1.2, 0.75

# Snowball's stemmers, by the language codes of configs (ISO 639-1) and of mteb (ISO 639-3).
STEMMERS = dict.fromkeys(("no", "nb", "nn", "nob", "nno", "nor"), "norwegian")
STEMMERS |= dict.fromkeys(("da", "dan"), "danish") | dict.fromkeys(("sv", "swe"), "swedish")

# Snowball's list, as Lucene's DanishAnalyzer uses it; bm25s has none for Danish.
STOPWORDS_DANISH = """
og i jeg det at en den til er som på de med han af for ikke der var mig sig men et har om vi min havde ham hun nu over
da fra du ud sin dem os op man hans hvor eller hvad skal selv her alle vil blev kunne ind når være dog noget ville jo
deres efter ned skulle denne end dette mit også under have dig anden hende mine alt meget sit sine vor mod disse hvis
din nogle hos blive mange ad bliver hendes været thi jer sådan
"""
STOPWORDS = {
    "norwegian": list(STOPWORDS_NORWEGIAN),
    "danish": STOPWORDS_DANISH.split(),
    "swedish": list(STOPWORDS_SWEDISH),
}


class BM25Index:
    """Passages by their words, stemmed where the language is a Scandinavian one."""

    def __init__(self, passages: list[str], language: str | None, *, without_stop_words: bool) -> None:
        """language: a code of STEMMERS; in any other, words are taken as they are.

        without_stop_words: as Lucene's analyzers have it. Mining searches for stop words too, and would find other
        negatives without them.
        """
        self.stemmer = STEMMERS.get(language or "")
        self._stopwords = STOPWORDS.get(self.stemmer or "", []) if without_stop_words else []
        self._stem = Stemmer.Stemmer(self.stemmer) if self.stemmer else None
        self.count = len(passages)
        words = self._tokenize(passages, return_ids=True)
        self.is_empty = not any(words.ids)
        """Whether no passage has a word. Then nothing can be searched for."""
        self._ranker = bm25s.BM25(k1=K1, b=B, method="lucene")
        if not self.is_empty:
            self._ranker.index(words, show_progress=False)

    @property
    def bytes(self) -> int:
        """Memory of the postings."""
        return sum(self._ranker.scores[part].nbytes for part in ("data", "indices", "indptr"))

    def words_of(self, texts: list[str]) -> list[list[str]]:
        """The analysed words of each text, in lower case; those of one letter are left out."""
        return self._tokenize(texts, return_ids=False)

    def search(self, queries: list[list[str]], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Passages' numbers and scores, [queries, depth] or all passages, best first. queries: the words of each."""
        return self._ranker.retrieve(queries, k=min(depth, self.count), show_progress=False)

    def scores_of(self, query: list[str]) -> np.ndarray:
        """The score of every passage, [passages]."""
        return self._ranker.get_scores(query) if query else np.zeros(self.count)

    def passage_vectors(self) -> sp.csr_array:
        """[passages, words]: what each word of a passage adds to its score, so that a score is a dot product."""
        scores, words = self._ranker.scores, len(self._ranker.vocab_dict)
        bounds = np.pad(scores["indptr"], (0, words + 1 - len(scores["indptr"])), mode="edge")
        return sp.csc_array((scores["data"], scores["indices"], bounds), shape=(self.count, words)).tocsr()

    def query_vectors(self, queries: list[list[str]]) -> sp.csr_array:
        """[queries, words]: how often each query has each word. queries: the words of each."""
        known = self._ranker.vocab_dict
        columns = [[known[word] for word in words if word in known] for words in queries]
        bounds = np.cumsum([0, *map(len, columns)])
        numbers = np.concatenate([np.zeros(0, int), *(np.array(row, int) for row in columns)])
        vectors = sp.csr_array((np.ones(len(numbers), np.float32), numbers, bounds), shape=(len(queries), len(known)))
        vectors.sum_duplicates()
        return vectors

    def _tokenize(self, texts: list[str], return_ids: bool) -> Any:
        return bm25s.tokenize(
            texts, stopwords=self._stopwords, stemmer=self._stem, return_ids=return_ids, show_progress=False
        )
