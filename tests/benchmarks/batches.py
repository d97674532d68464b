"""Start-up, a pass and padding of the batches at a million rows: ours against the library's two, in one run."""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
from datasets import Dataset, disable_progress_bars
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from trainer.data.batches import NoDuplicateBatches
from trainer.data.forward_passes import ForwardPasses, padding

ROWS, BATCH, WINDOW = 1_000_000, 128, 32
# Distinct passages: each occurs five times on average in either column, as in NLI and QA sets.
PASSAGES = ROWS // 5 * 2


def million_triplets() -> tuple[Dataset, np.ndarray]:
    """Queries and passages of about 60 characters, and the passages' tokens, [rows, 2].

    Lengths are log-normal, which is how those of SQuAD's passages fall (5th percentile 113 tokens, median 169, 95th 344).
    """
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, PASSAGES, size=(2, ROWS))
    lengths = np.clip(rng.lognormal(np.log(169), 0.35, PASSAGES), 8, 512).astype(int)
    dataset = Dataset.from_dict(
        {
            "anchor": [f"spørsmål nummer {i}" for i in range(ROWS)],
            "positive": [f"en tekst på omtrent seksti tegn som er passasje nummer {i}" for i in numbers[0]],
            "negative": [f"en tekst på omtrent seksti tegn som er passasje nummer {i}" for i in numbers[1]],
        }
    )
    return dataset, lengths[numbers].T


def measure(make: Callable, lengths: np.ndarray) -> dict[str, float]:
    """Seconds until the first batch and for a whole pass, rows drawn, and the share of padding."""
    start = time.perf_counter()
    batches = iter(make())
    drawn = [next(batches)]
    first = time.perf_counter() - start
    drawn += batches
    seconds = time.perf_counter() - start
    one_pass = ForwardPasses(shared=True)
    tokens, positions = padding([np.array(batch) for batch in drawn], lengths, lengths.shape[1], one_pass)
    return {
        "first_batch_s": round(first, 2),
        "pass_s": round(seconds, 2),
        "rows": sum(map(len, drawn)),
        "padding": round(1 - tokens / positions, 4),
    }


def main() -> None:
    """Print a table, and the same as JSON on the last line."""
    disable_progress_bars()
    dataset, lengths = million_triplets()
    by_length = {"lengths": lengths.max(1), "window": WINDOW}
    makers = {
        f"ours, by length (window {WINDOW})": lambda: NoDuplicateBatches(dataset, BATCH, seed=1, **by_length),
        "ours, at random": lambda: NoDuplicateBatches(dataset, BATCH, seed=1),
        "NO_DUPLICATES_HASHED": lambda: NoDuplicatesBatchSampler(dataset, BATCH, False, precompute_hashes=True, seed=1),
        "NO_DUPLICATES": lambda: NoDuplicatesBatchSampler(dataset, BATCH, False, seed=1),
    }
    results = {name: measure(make, lengths) for name, make in makers.items()}
    print(f"| {ROWS:,} triplets, batches of {BATCH} | to the first batch | a whole pass | rows drawn | padding |")
    print("|---|---|---|---|---|")
    for name, found in results.items():
        print(
            f"| {name} | {found['first_batch_s']:.1f} s | {found['pass_s']:.1f} s | {found['rows']:,} "
            f"| {found['padding']:.1%} |"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
