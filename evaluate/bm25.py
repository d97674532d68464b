"""BM25, the baseline a search team already has, with the analysis of its language."""

from collections.abc import Mapping
from math import log2

import bm25s
import Stemmer

from trainer.beir import SearchSet

STEMMERS = {"no": "norwegian", "nb": "norwegian", "nn": "norwegian", "da": "danish", "sv": "swedish"}
# Lucene's defaults, which Elasticsearch and OpenSearch share.
K1, B = 1.2, 0.75


def search(found: SearchSet, language: str | None, depth: int = 10) -> dict[str, list[str]]:
    """The ids of the best passages of every query, best first. With a language, words are stemmed; no stop words."""
    stemmer = Stemmer.Stemmer(STEMMERS[language]) if language else None

    def tokenize(texts: list[str]):
        return bm25s.tokenize(texts, stopwords=None, stemmer=stemmer, show_progress=False)

    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(tokenize(list(found.corpus.values())), show_progress=False)
    depth = min(depth, len(found.corpus))
    ranks, _ = index.retrieve(tokenize(list(found.queries.values())), k=depth, show_progress=False)
    passages = list(found.corpus)
    return {query: [passages[i] for i in row] for query, row in zip(found.queries, ranks, strict=True)}


def mean_ndcg(ranked: Mapping[str, list[str]], relevant: Mapping[str, set[str]], depth: int = 10) -> float:
    """Mean nDCG at `depth` with binary relevance, over the queries that have a relevant passage."""
    total = 0.0
    for query, wanted in relevant.items():
        gain = sum(1 / log2(place + 2) for place, passage in enumerate(ranked[query][:depth]) if passage in wanted)
        total += gain / sum(1 / log2(place + 2) for place in range(min(depth, len(wanted))))
    return total / len(relevant)
