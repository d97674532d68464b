from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset

from tests.conftest import TINY
from trainer.config import load_config
from trainer.data import shapes_of
from trainer.data.batches import NoDuplicateBatches
from trainer.data.buckets import bucket_lengths, next_length, padding


def rows_of(count, distinct=None, seed=0):
    """Rows whose positives are one of `distinct` passages, and the lengths of the passages, [rows, 1]."""
    rng = np.random.default_rng(seed)
    passages = rng.integers(0, distinct or count, count) if distinct else np.arange(count)
    dataset = Dataset.from_dict(
        {"anchor": [f"query {n}" for n in range(count)], "positive": [f"passage {n}" for n in passages]}
    )
    return dataset, rng.gamma(2.0, 60.0, distinct or count).astype(int)[passages][:, None] + 5


def padded(sampler, lengths, pass_number=0):
    tokens, positions = padding(sampler.batches(pass_number), lengths, sampler.processes)
    return 1 - tokens / positions


def test_rows_of_the_same_length_come_together():
    dataset, _ = rows_of(16)
    lengths = np.array([[3], [9]] * 8)
    batches = NoDuplicateBatches(dataset, 4, lengths=lengths, window=4).batches(0)
    assert [len(set(lengths[batch, 0])) for batch in batches] == [1, 1, 1, 1]
    at_random = NoDuplicateBatches(dataset, 4, lengths=lengths, window=1).batches(0)
    assert max(len(set(lengths[batch, 0])) for batch in at_random) == 2


def test_padding_is_counted_as_a_loop_would():
    rng = np.random.default_rng(0)
    for processes, shapes in ((1, None), (2, None), (3, [16, 64, 256])):
        lengths = rng.integers(1, 200, (60, 2))
        batches = np.split(rng.permutation(60), [12, 30, 36])
        tokens = positions = 0
        for batch in batches:
            for part in np.split(batch, processes):
                for column in (0, 1):
                    longest = max(lengths[row, column] for row in part)
                    longest = min(n for n in shapes or [longest] if n >= longest)
                    positions += longest * len(part)
                    tokens += sum(lengths[row, column] for row in part)
        assert padding(batches, lengths, processes, shapes) == (tokens, positions)


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


def test_both_documents_of_a_triplet_count():
    rng = np.random.default_rng(0)
    dataset = Dataset.from_dict(
        {name: [f"{name} {n}" for n in range(1024)] for name in ("anchor", "positive", "negative")}
    )
    lengths = rng.integers(5, 250, (1024, 2))  # a negative's length says nothing of the positive's
    both = padded(NoDuplicateBatches(dataset, 16, lengths=lengths, window=64), lengths)
    longer = padded(NoDuplicateBatches(dataset, 16, lengths=lengths.max(1, keepdims=True), window=64), lengths)
    at_random = padded(NoDuplicateBatches(dataset, 16), lengths)
    assert both < 0.6 * longer < 0.6 * at_random


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


@pytest.mark.parametrize(
    ("device", "compiled", "longest", "shapes"),
    [
        ("cuda", False, 70, [16, 32, 48, 64, 70]),
        ("cuda", False, 64, [16, 32, 48, 64]),
        ("cuda", False, 10, [10]),
        ("cuda", True, 512, bucket_lengths(512)),
        ("cpu", True, 512, bucket_lengths(512)),
        ("cpu", False, 70, None),
        ("mps", False, 70, None),
    ],
)
def test_padded_texts_have_a_multiple_of_sixteen_tokens_on_cuda_and_few_lengths_when_compiled(
    tmp_path, device, compiled, longest, shapes
):
    (tmp_path / "a.yaml").write_text(TINY)
    overrides = [f"training.max_seq_length={longest}", f"training.torch_compile={str(compiled).lower()}"]
    assert shapes_of(load_config(tmp_path / "a.yaml", overrides).config, device) == shapes
