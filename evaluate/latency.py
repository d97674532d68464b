"""How long encoding and exact search take here, beside BM25 over the same passages in the same run."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
import torch

from evaluate.bm25 import BM25
from evaluate.passage_vectors import PassageVectors
from trainer.config import ConfigError
from trainer.encoding.encode import encode
from trainer.encoding.inverted_index import InvertedIndex, comparable
from trainer.system.device import peak_memory_gib

Item = TypeVar("Item")
Clock = Callable[[], float]

# Timed one by one, so fewer than the sample has.
TIMED_QUERIES = 200
# Calls that are not timed: the first ones load code and caches.
WARM_UP = 10
DEPTH = 10


def measure_latency(
    passage_vectors: PassageVectors,
    queries: list[str],
    passages: list[str],
    language: str | None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Milliseconds per query for encoding and for the best 10 of the passages, one query at a time, and BM25's.

    `language` is an ISO 639-3 code, for BM25's stemmer; `clock` gives seconds. BM25's search includes its analysis of the
    query, as the model's encoding is apart. Raises ConfigError when there is no query or no passage.
    """
    if not queries or not passages:
        raise ConfigError(f"latency needs texts, and there are {len(queries)} queries and {len(passages)} passages")
    model, queries = passage_vectors.model, queries[:TIMED_QUERIES]

    def encode_query(query: str) -> sp.csr_matrix:
        return comparable(model, encode(model, [query], "query", 1))

    query_encoding = durations(encode_query, queries, clock)
    index = InvertedIndex(comparable(model, passage_vectors.encode(passages, "latency")))
    encoded = [encode_query(query) for query in queries]
    search = durations(lambda query: list(index.search(query, DEPTH)), encoded, clock)

    bm25 = BM25()
    start = clock()
    bm25.index_texts(passages, language)
    bm25_seconds = clock() - start
    bm25_search = durations(lambda query: list(bm25.search_texts([query], DEPTH)), queries, clock)
    return {
        "passages": len(passages),
        "queries": len(queries),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "machine": platform.platform(),
        "model": {
            "query_encoding_ms": percentiles(query_encoding),
            "documents_per_second": passage_vectors.per_second,
            "search_ms": percentiles(search),
            "index_bytes": index.bytes,
            "peak_memory_gib": peak_memory_gib("cpu"),  # main memory, wherever the model is
        },
        "bm25": {
            "index_documents_per_second": len(passages) / bm25_seconds,
            "search_ms": percentiles(bm25_search),
            "index_bytes": bm25.inverted.bytes,
        },
    }


def durations(call: Callable[[Item], Any], items: Sequence[Item], clock: Clock) -> list[float]:
    """Milliseconds of a call on every item, after some that are not timed."""
    for item in items[:WARM_UP]:
        call(item)
    milliseconds = []
    for item in items:
        start = clock()
        call(item)
        milliseconds.append((clock() - start) * 1000)
    return milliseconds


def percentiles(values: list[float]) -> dict[str, float]:
    """The median, and what 95 and 99 of 100 stay below."""
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}


def latency_lines(values: dict[str, Any]) -> Iterator[str]:
    """The model, BM25, and where it was measured."""
    model, bm25 = values["model"], values["bm25"]
    yield (
        f"latency     query encoding {_ms(model['query_encoding_ms'])}, search {_ms(model['search_ms'])}; "
        f"{model['documents_per_second']:,.0f} documents/s"
    )
    yield (
        f"            BM25: search {_ms(bm25['search_ms'])} with analysis; "
        f"{bm25['index_documents_per_second']:,.0f} documents/s"
    )
    yield (
        f"            {values['queries']:,} queries one at a time, {values['passages']:,} passages "
        f"({model['index_bytes'] / 1e6:.1f} MB, BM25 {bm25['index_bytes'] / 1e6:.1f} MB)"
    )
    yield (
        f"            {values['device']} (threads: {values['threads']}), "
        f"peak memory {model['peak_memory_gib']:.1f} GiB, {values['machine']}"
    )


def _ms(times: dict[str, float]) -> str:
    return f"{times['p50']:.2f} ms (p95 {times['p95']:.2f}, p99 {times['p99']:.2f})"
