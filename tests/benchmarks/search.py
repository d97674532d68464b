"""Exact search over 100,000 encoded passages: the inverted index against stock semantic search, on one core, in one run."""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch
from sentence_transformers.util import dot_score, semantic_search

from trainer.encoding.inverted_index import InvertedIndex

PASSAGES, QUERIES, DIMENSIONS, DEPTH = 100_000, 100, 50_000, 100
# Dims drawn per text; some are drawn twice, so passages have about 180 active.
PASSAGE_DRAWS, QUERY_DRAWS = 180, 12
# Flattens the head of Zipf's law, so that the busiest dimension is active in 4 of 10 passages, as in a trained SPLADE
# (a pure 1 / rank would put it into all of them).
ZIPF_OFFSET = 50
# The dense path would need 20 GB for all passages; it gets as many as fit here, and its time is scaled.
DENSE_BYTES = 4 * 10**9
TOLERANCE = 1e-4
ROUNDS = 3

Found = list[tuple[np.ndarray, np.ndarray]]


def synthetic_vectors(texts: int, draws: int, rng: np.random.Generator) -> sp.csr_matrix:
    """[texts, dimensions]: dims by a flattened Zipf law, log-normal weights and log-normal numbers of dims."""
    chance = 1 / (np.arange(DIMENSIONS) + ZIPF_OFFSET)
    counts = np.maximum(1, rng.lognormal(np.log(draws), 0.3, texts).astype(int))
    dims = rng.choice(DIMENSIONS, counts.sum(), p=chance / chance.sum())
    weights = rng.lognormal(-0.5, 0.7, len(dims)).astype(np.float32)
    return sp.csr_matrix((weights, (np.repeat(np.arange(texts), counts), dims)), shape=(texts, DIMENSIONS))


def coo_tensor(vectors: sp.csr_matrix) -> torch.Tensor:
    """What `SparseEncoder.encode` returns."""
    rows = vectors.tocoo()
    places = np.stack([rows.row, rows.col])
    return torch.sparse_coo_tensor(places, rows.data, rows.shape, check_invariants=True).coalesce()


def stock(queries: torch.Tensor, passages: torch.Tensor) -> Found:
    """sentence-transformers' search by dot product, all queries in one call."""
    hits = semantic_search(queries, passages, top_k=DEPTH, score_function=dot_score)
    return [(np.array([hit["corpus_id"] for hit in row]), np.array([hit["score"] for hit in row])) for row in hits]


def best_time(search: Callable[[], Found]) -> tuple[float, Found]:
    """Milliseconds per query of the fastest of ROUNDS, and what was found."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        found = search()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1000 / QUERIES, found


# How much faster than the library exact search must be.
GOAL = 10


def check_same(ours: Found, theirs: Found) -> None:
    """Raise when scores differ, or passages other than those that tie with the last one."""
    for number, ((ids, scores), (other_ids, other_scores)) in enumerate(zip(ours, theirs, strict=True)):
        if len(scores) != DEPTH or np.abs(scores - other_scores).max() > TOLERANCE:
            raise RuntimeError(f"query {number}: the scores of the best {DEPTH} differ")
        scored = dict(zip(ids, scores, strict=True)) | dict(zip(other_ids, other_scores, strict=True))
        for passage in set(ids) ^ set(other_ids):
            if scored[passage] - scores[-1] > TOLERANCE:
                raise RuntimeError(f"query {number}: only one search finds passage {passage}")


def main() -> None:
    """Print a table, and the same as JSON on the last line."""
    torch.set_num_threads(1)  # scipy uses one core, so torch gets no more
    rng = np.random.default_rng(0)
    passages = synthetic_vectors(PASSAGES, PASSAGE_DRAWS, rng)
    queries = synthetic_vectors(QUERIES, QUERY_DRAWS, rng)
    products = (queries.getnnz(axis=0) / QUERIES) @ (passages.getnnz(axis=0) / PASSAGES)
    print(
        f"{passages.nnz / PASSAGES:.0f} active dims per passage, {queries.nnz / QUERIES:.0f} per query, "
        f"FLOPS {products:.2f}, busiest dimension in {passages.getnnz(axis=0).max() / PASSAGES:.0%} of the passages"
    )

    start = time.perf_counter()
    index = InvertedIndex(passages)
    results = {"ours": {"bytes": index.bytes, "index_s": round(time.perf_counter() - start, 2)}}
    results["ours"]["query_ms"], ours = best_time(lambda: list(index.search(queries, DEPTH)))

    query_tensor, passage_tensor = coo_tensor(queries), coo_tensor(passages)
    results["COO"] = {"bytes": passage_tensor.indices().nbytes + passage_tensor.values().nbytes}
    results["COO"]["query_ms"], found = best_time(lambda: stock(query_tensor, passage_tensor))
    check_same(ours, found)

    part = DENSE_BYTES // (DIMENSIONS * 4)
    dense = torch.from_numpy(queries.toarray()), torch.from_numpy(passages[:part].toarray())
    milliseconds, found = best_time(lambda: stock(*dense))
    check_same(list(InvertedIndex(passages[:part]).search(queries, DEPTH)), found)
    results["dense"] = {
        "bytes": PASSAGES * DIMENSIONS * 4,
        "query_ms": milliseconds * PASSAGES / part,
        "scaled_from": part,
    }

    names = {
        "ours": f"inverted index, made in {results['ours']['index_s']} s",
        "COO": "semantic_search, sparse COO tensors",
        "dense": f"semantic_search, dense, scaled from {part:,} passages",
    }
    print(f"| best {DEPTH} of {PASSAGES:,} passages, {QUERIES} queries, one core | per query | × ours | memory |")
    print("|---|---|---|---|")
    for name, found in results.items():
        found["ratio"] = found["query_ms"] / results["ours"]["query_ms"]
        memory = f"{found['bytes'] / 1e6:,.0f} MB ({found['bytes'] / PASSAGES:,.0f} B per passage)"
        print(f"| {names[name]} | {found['query_ms']:.2f} ms | {found['ratio']:.0f} | {memory} |")
    print(json.dumps(results))
    if results["COO"]["ratio"] < GOAL:
        raise RuntimeError(f"search is less than {GOAL} times as fast as the library's")


if __name__ == "__main__":
    sys.exit(main())
