from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset

from trainer.data.batches import NoDuplicateBatches
from trainer.data.buckets import bucket_lengths, next_length
from trainer.data.forward_passes import ForwardPasses, padding


def rows_of(count, distinct=None, seed=0):
    """Rows whose positives are one of `distinct` passages, and the lengths of the passages, [rows]."""
    rng = np.random.default_rng(seed)
    passages = rng.integers(0, distinct or count, count) if distinct else np.arange(count)
    dataset = Dataset.from_dict(
        {"anchor": [f"query {n}" for n in range(count)], "positive": [f"passage {n}" for n in passages]}
    )
    return dataset, rng.gamma(2.0, 60.0, distinct or count).astype(int)[passages] + 5


def padded(sampler, lengths, pass_number=0):
    batches = sampler.batches(pass_number)
    tokens, positions = padding(batches, lengths[:, None], 1, ForwardPasses(), sampler.processes)
    return 1 - tokens / positions


def test_rows_of_the_same_length_come_together():
    dataset, _ = rows_of(16)
    lengths = np.array([3, 9] * 8)
    batches = NoDuplicateBatches(dataset, 4, lengths=lengths, window=4).batches(0)
    assert [len(set(lengths[batch])) for batch in batches] == [1, 1, 1, 1]
    at_random = NoDuplicateBatches(dataset, 4, lengths=lengths, window=1).batches(0)
    assert max(len(set(lengths[batch])) for batch in at_random) == 2


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("distinct", [None, 400])
def test_most_padding_goes_and_every_row_is_still_drawn_once_without_a_text_twice_in_a_batch(distinct, processes):
    dataset, lengths = rows_of(800, distinct)
    at_random = NoDuplicateBatches(dataset, 8, seed=1, processes=processes)
    sampler = NoDuplicateBatches(dataset, 8, seed=1, processes=processes, lengths=lengths, window=16)
    for pass_number in range(2):
        batches = sampler.batches(pass_number)
        assert sorted(np.concatenate(batches).tolist()) == list(range(800))
        assert [len(batch) for batch in batches] == sampler.sizes.tolist()
        for batch in batches:
            assert max(Counter(text for row in batch for text in dataset[int(row)].values()).values()) == 1
        assert padded(at_random, lengths, pass_number) > 0.4
        assert padded(sampler, lengths, pass_number) < (0.15 if distinct is None else 0.3)


def test_the_order_follows_from_the_seed_and_the_pass_alone():
    dataset, lengths = rows_of(200, distinct=90)
    first = NoDuplicateBatches(dataset, 10, seed=1, lengths=lengths, window=5).batches(0)

    def same(seed, pass_number, window=5):
        other = NoDuplicateBatches(dataset, 10, seed=seed, lengths=lengths, window=window).batches(pass_number)
        return all(map(np.array_equal, first, other))

    assert same(1, 0)
    assert not same(1, 1)
    assert not same(2, 0)
    assert not same(1, 0, window=6)


def test_a_window_of_one_batch_is_a_random_order():
    dataset, lengths = rows_of(100)
    at_random = NoDuplicateBatches(dataset, 10, seed=1).batches(3)
    assert all(
        map(np.array_equal, at_random, NoDuplicateBatches(dataset, 10, seed=1, lengths=lengths, window=1).batches(3))
    )


def test_rows_stay_in_their_window_and_its_batches_are_in_random_order():
    dataset, lengths = rows_of(960)
    shuffled = NoDuplicateBatches(dataset, 10, seed=1).batches(0)
    batches = NoDuplicateBatches(dataset, 10, seed=1, lengths=lengths, window=12).batches(0)
    means = [lengths[batch].mean() for batch in batches]
    for first in range(0, 96, 12):
        window = slice(first, first + 12)
        assert set(np.concatenate(batches[window])) == set(np.concatenate(shuffled[window]))
        assert means[window] != sorted(means[window])
        assert means[window] != sorted(means[window], reverse=True)


def test_each_process_gets_its_share_of_the_long_rows():
    dataset, lengths = rows_of(1024)
    sampler = NoDuplicateBatches(dataset, 8, seed=1, processes=4, lengths=lengths, window=8)
    parts = list(sampler)
    holds_longest = Counter(
        int(np.argmax([lengths[part].max() for part in parts[first : first + 4]])) for first in range(0, len(parts), 4)
    )
    assert set(holds_longest) == {0, 1, 2, 3}


def test_several_processes_draw_the_batches_of_one_with_as_many_rows():
    dataset, lengths = rows_of(720, distinct=300)
    alone = list(NoDuplicateBatches(dataset, 12, seed=1, lengths=lengths, window=7))
    parts = list(NoDuplicateBatches(dataset, 4, seed=1, processes=3, lengths=lengths, window=7))
    assert [parts[n] + parts[n + 1] + parts[n + 2] for n in range(0, len(parts), 3)] == alone


def test_no_more_rows_sit_out_than_in_a_random_order():
    # sets so full of equal passages that hardly any order has room for all rows
    out = Counter()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rows, distinct, size = int(rng.integers(20, 300)), int(rng.integers(3, 30)), int(rng.integers(4, 16))
        dataset, lengths = rows_of(rows, distinct, seed)
        for window in (1, 32):
            sampler = NoDuplicateBatches(dataset, size, seed=seed, lengths=lengths, window=window)
            out[window] += rows - sum(map(len, sampler.batches(0)))
        most = max(Counter(dataset["positive"]).values()) - len(sampler.sizes)
        out["at least"] += max(0, most)
    assert out["at least"] <= out[32] <= out[1] * 1.01


# ------------------------------------------------------------------------------------------- few shapes
def test_bucket_lengths_are_few_and_end_at_the_longest():
    assert bucket_lengths(512) == [16, 32, 48, 72, 120, 192, 320, 512]
    for longest in range(1, 1100):
        lengths = bucket_lengths(longest)
        assert len(lengths) <= 8
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == longest
        assert all(length % 8 == 0 for length in lengths[:-1])
        assert all(long <= 2 * short for short, long in pairwise(lengths))


def test_a_length_is_padded_to_the_next_bucket():
    assert [next_length(longest, [16, 32]) for longest in (0, 16, 17, 32)] == [16, 16, 32, 32]
    assert next_length(40, [16, 32]) == 40  # the static queries of inference-free SPLADE are cut elsewhere
    assert next_length(17, None) == 17
