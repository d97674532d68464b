"""Query latency of trained models in a large index, whose posting lists are as long as the models make them.

The passages of a real corpus are encoded in windows, and drawn with replacement until the index has PASSAGES. Models take
turns, query by query, on one core.

    python -m tests.benchmarks.large_index path/to/beir_folder models/one/final models/other/final
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SparseEncoder

from trainer.data.beir import read_search_set
from trainer.encoding.encode import encode
from trainer.encoding.fuse import fuse
from trainer.encoding.inverted_index import InvertedIndex
from trainer.encoding.windows import read_in_windows

PASSAGES, DEPTH, ROUNDS = 200_000, 10, 5


def main(folder: str, *models: str) -> None:
    """Print a table: median and 95th percentile of each query's fastest search of ROUNDS, and what the index holds."""
    search = read_search_set(Path(folder), "dev", Path(folder).name)
    drawn = np.random.default_rng(0).integers(0, len(search.corpus), PASSAGES)
    indexes, queries = {}, {}
    for name in models:
        model = SparseEncoder(name, device="cpu")
        fuse(model, "cpu")
        read_in_windows(model)
        passages = encode(model, list(search.corpus.values()), "document", 16)
        indexes[name] = InvertedIndex(passages[drawn])
        queries[name] = encode(model, list(search.queries.values()), "query", 32)
    torch.set_num_threads(1)
    seconds = {name: np.full(len(search.queries), np.inf) for name in models}
    for _ in range(ROUNDS):
        for number in range(len(search.queries)):
            for name in models:
                start = time.perf_counter()
                next(indexes[name].search(queries[name][number], DEPTH))
                seconds[name][number] = min(seconds[name][number], time.perf_counter() - start)
    print(
        f"| {PASSAGES:,} passages of {folder}, {len(search.queries)} queries | p50 ms | p95 ms | postings per query | MB |"
    )
    print("|---|---|---|---|---|")
    for name in models:
        lengths = np.diff(indexes[name].postings.indptr)
        read = np.mean([lengths[row.indices].sum() for row in queries[name]])
        p50, p95 = np.percentile(seconds[name], [50, 95]) * 1000
        print(f"| {name} | {p50:.1f} | {p95:.1f} | {read:,.0f} | {indexes[name].bytes / 1e6:,.0f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
