"""Searches the whole corpus with each query: a query whose passage is not among the first does not say what it is about."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from trainer.data.bm25 import STEMMERS, BM25Index
from trainer.queries.check import Query
from trainer.system.progress_bar import encoding, going_on, in_columns

QUERIES_AT_A_TIME = 1_000


def found_by_bm25(queries: list[Query], corpus: list[str], depth: int) -> set[str]:
    """Ids of the queries whose passage is among the first `depth`, with the words of both stemmed in its language."""
    found: set[str] = set()
    by_stemmer: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        by_stemmer[STEMMERS[query.passage.language]].append(query)
    with going_on(in_columns("searching", "by BM25"), len(queries), "queries") as progress:
        for those in by_stemmer.values():
            index = BM25Index(corpus, those[0].passage.language, without_stop_words=True)
            for start in range(0, len(those), QUERIES_AT_A_TIME):
                part = those[start : start + QUERIES_AT_A_TIME]
                if not index.is_empty:
                    places, scores = index.search(index.words_of([query.text for query in part]), depth)
                    found |= _among(part, np.where(scores > 0, places, -1))
                progress.update(len(part))
    return found


def found_by_model(queries: list[Query], corpus: list[str], depth: int, model: Any) -> set[str]:
    """The same with a dense model's vectors."""
    from sentence_transformers.util import semantic_search

    with encoding(model[0], in_columns("encoding", "passages and queries"), len(corpus) + len(queries)):
        documents = model.encode_document(corpus, convert_to_tensor=True, normalize_embeddings=True)
        vectors = model.encode_query([q.text for q in queries], convert_to_tensor=True, normalize_embeddings=True)
    hits = semantic_search(vectors, documents, top_k=min(depth, len(corpus)))
    return _among(queries, ([hit["corpus_id"] for hit in row] for row in hits))


def _among(queries: list[Query], places: Iterable[Iterable[int]]) -> set[str]:
    return {query.id for query, row in zip(queries, places, strict=True) if query.passage.number in list(row)}
