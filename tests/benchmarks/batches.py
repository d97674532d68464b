"""Start-up and first pass of the no-duplicates rule at a million rows: ours against the library's two, in one run."""

import json
import sys
import time

import numpy as np
from datasets import Dataset, disable_progress_bars
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from trainer.data.batches import NoDuplicateBatches

ROWS, BATCH = 1_000_000, 128


def million_triplets() -> Dataset:
    """Queries and passages of about 60 characters; a passage occurs five times on average, as in NLI and QA sets."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, ROWS // 5 * 2, size=(2, ROWS))
    return Dataset.from_dict(
        {
            "anchor": [f"spørsmål nummer {i}" for i in range(ROWS)],
            "positive": [f"en tekst på omtrent seksti tegn som er passasje nummer {i}" for i in numbers[0]],
            "negative": [f"en tekst på omtrent seksti tegn som er passasje nummer {i}" for i in numbers[1]],
        }
    )


def measure(make) -> dict[str, float]:
    """Seconds until the first batch, and for a whole pass."""
    start = time.perf_counter()
    batches = iter(make())
    next(batches)
    first = time.perf_counter() - start
    rows = BATCH + sum(len(batch) for batch in batches)
    return {"first_batch_s": round(first, 2), "pass_s": round(time.perf_counter() - start, 2), "rows": rows}


def main() -> None:
    """Print a table, and the same as JSON on the last line."""
    disable_progress_bars()
    dataset = million_triplets()
    makers = {
        "ours": lambda: NoDuplicateBatches(dataset, BATCH, seed=1),
        "NO_DUPLICATES_HASHED": lambda: NoDuplicatesBatchSampler(dataset, BATCH, False, precompute_hashes=True, seed=1),
        "NO_DUPLICATES": lambda: NoDuplicatesBatchSampler(dataset, BATCH, False, seed=1),
    }
    results = {name: measure(make) for name, make in makers.items()}
    print(
        f"| {ROWS:,} triplets, batches of {BATCH} | to the first batch | a whole pass | rows drawn |\n|---|---|---|---|"
    )
    for name, found in results.items():
        print(f"| {name} | {found['first_batch_s']:.1f} s | {found['pass_s']:.1f} s | {found['rows']:,} |")
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
