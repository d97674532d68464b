from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import ConcatDataset

from trainer.data.batches import MixedBatches, Mixture, NoDuplicateBatches, text_ids


def pairs(rows, anchors=None, positives=None, name=""):
    return Dataset.from_dict(
        {
            "anchor": [f"{name}query {i if anchors is None else anchors[i]}" for i in range(rows)],
            "positive": [f"{name}passage {i if positives is None else positives[i]}" for i in range(rows)],
        }
    )


def texts_of(dataset, batch):
    """Every text of a batch; a row that holds the same text in two columns counts it once."""
    return [text for index in batch for text in {value for value in dataset[int(index)].values() if value}]


def test_two_cells_have_the_same_id_exactly_when_their_texts_are_equal():
    dataset = Dataset.from_dict({"anchor": ["a", "b", "a"], "positive": ["b", "c", "d"]})
    ids = text_ids(dataset)
    assert ids.shape == (3, 2)
    assert ids[0, 0] == ids[2, 0]
    assert ids[1, 0] == ids[0, 1]
    assert len(set(ids.ravel().tolist())) == 4


@pytest.mark.parametrize(
    ("rows", "distinct", "batch_size"), [(200, 200, 16), (200, 40, 16), (500, 30, 25), (97, 20, 8)]
)
def test_no_batch_holds_a_text_twice_and_no_row_repeats_in_a_pass(rows, distinct, batch_size):
    dataset = pairs(rows, positives=[i % distinct for i in range(rows)])
    sampler = NoDuplicateBatches(dataset, batch_size, seed=3)
    for pass_number in range(3):
        batches = sampler.batches(pass_number)
        for batch in batches:
            assert max(Counter(texts_of(dataset, batch)).values()) == 1
            assert len(batch) <= batch_size
        drawn = np.concatenate(batches).tolist()
        assert len(drawn) == len(set(drawn)) == rows  # these sets can all be placed: nothing sits out
        assert len(batches) == len(sampler)


def test_without_the_repair_batches_do_hold_a_text_twice(monkeypatch):
    dataset = pairs(200, positives=[i % 40 for i in range(200)])
    sampler = NoDuplicateBatches(dataset, 16, seed=3)
    monkeypatch.setattr(sampler, "_collisions", lambda order, batch_of: [])
    assert any(max(Counter(texts_of(dataset, batch)).values()) > 1 for batch in sampler.batches(0))


def test_a_query_that_is_anothers_passage_is_kept_apart_too():
    dataset = Dataset.from_dict(
        {"anchor": [f"t{i}" for i in range(60)], "positive": [f"t{i + 1}" for i in range(60)], "negative": ["n"] * 60}
    )
    for batch in NoDuplicateBatches(dataset, 6, seed=0).batches(0):
        assert max(Counter(texts_of(dataset, batch)).values()) == 1


def test_a_row_that_fits_nowhere_sits_out_instead_of_breaking_the_rule():
    dataset = pairs(8, positives=[0] * 8)
    batches = NoDuplicateBatches(dataset, 4, seed=0).batches(0)
    assert [len(batch) for batch in batches] == [1, 1]


def test_no_batch_holds_a_text_twice_even_where_many_rows_sit_out():
    # an exchange with a row that already sat out once let a duplicate in, in 4 of 800 such sets
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rows, distinct = int(rng.integers(20, 120)), int(rng.integers(3, 12))
        dataset = pairs(rows, positives=rng.integers(0, distinct, rows).tolist())
        sampler = NoDuplicateBatches(dataset, int(rng.integers(4, 16)), seed=seed)
        for batch in sampler.batches(0):
            texts = texts_of(dataset, batch)
            assert len(texts) == len(set(texts)), seed


def test_a_row_whose_own_texts_are_equal_is_not_a_collision():
    dataset = Dataset.from_dict({"anchor": ["a", "b", "c", "d"], "positive": ["a", "b", "c", "d"]})
    assert sum(len(batch) for batch in NoDuplicateBatches(dataset, 2, seed=0).batches(0)) == 4


def test_batches_of_a_pass_differ_in_size_by_one_row_at_most():
    assert NoDuplicateBatches(pairs(33), 16).sizes.tolist() == [11, 11, 11]


def test_the_order_follows_from_the_seed_and_the_pass_alone():
    dataset = pairs(100)
    first = NoDuplicateBatches(dataset, 10, seed=1).batches(0)
    assert all(map(np.array_equal, first, NoDuplicateBatches(dataset, 10, seed=1).batches(0)))
    assert not all(map(np.array_equal, first, NoDuplicateBatches(dataset, 10, seed=1).batches(1)))
    assert not all(map(np.array_equal, first, NoDuplicateBatches(dataset, 10, seed=2).batches(0)))


# ---------------------------------------------------------------------------------- several sets
def groups_drawn(mixture, epoch=0):
    return [group for group, *_ in mixture.draws(epoch)]


def test_round_robin_gives_every_set_the_same_turns_although_one_has_two_halves():
    mixture = Mixture([[10], [6, 14], [5]], "round_robin", "smallest", seed=0)
    assert groups_drawn(mixture) == [0, 1, 2] * 5
    assert len(mixture) == 15


def test_round_robin_over_the_largest_set_sees_all_of_it_and_reshuffles_the_small_ones():
    mixture = Mixture([[10], [6, 14], [5]], "round_robin", "largest", seed=0)
    counts = mixture.drawn(len(mixture))
    assert len(mixture) == 60
    assert set(counts[1].values()) == {1}
    assert sum(counts[1].values()) == 20
    assert set(counts[0].values()) == {2}
    assert set(counts[2].values()) == {4}


def test_proportional_sees_every_batch_once_in_a_mixed_order():
    mixture = Mixture([[10], [6, 14], [5]], "proportional", "smallest", seed=0)
    order = groups_drawn(mixture)
    assert Counter(order) == {0: 10, 1: 20, 2: 5}
    assert order != sorted(order)
    assert all(set(count.values()) == {1} for count in mixture.drawn(len(mixture)))


def test_a_large_set_goes_on_in_the_next_epoch_where_it_stopped():
    mixture = Mixture([[4], [12]], "round_robin", "smallest", seed=0)
    seen = [
        (half, number, batch) for epoch in range(3) for group, half, number, batch in mixture.draws(epoch) if group == 1
    ]
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize("strategy", ["round_robin", "proportional"])
@pytest.mark.parametrize("rule", ["smallest", "largest"])
def test_batches_are_counted_as_they_are_drawn_in_epochs_that_end_anywhere(strategy, rule):
    mixture = Mixture([[10], [6, 14], [5]], strategy, rule, seed=3)
    drawn = chain.from_iterable(mixture.draws(epoch) for epoch in range(40))
    one_by_one = [Counter() for _ in range(3)]
    for number, (group, half, _, batch) in enumerate(islice(drawn, 500), 1):
        one_by_one[group][half, batch] += 1
        if number in (1, 7, 14, 60, 61, 123, 499, 500):
            assert mixture.drawn(number) == one_by_one
    # without going through them: a run of 10**30 steps is planned at once
    assert sum(count.total() for count in mixture.drawn(10**30)) == 10**30


def test_a_mixture_without_a_batch_is_counted_too():
    assert Mixture([[0], [3]], "round_robin", "smallest", seed=0).drawn(9)[0].total() == 0


def test_halves_share_a_sets_turns_by_their_size():
    mixture = Mixture([[3, 9]], "round_robin", "smallest", seed=5)
    subsets = [subset for _, subset, *_ in mixture.draws(0)]
    assert Counter(subsets) == {0: 3, 1: 9}
    assert subsets not in ([0] * 3 + [1] * 9, [1] * 9 + [0] * 3)


def test_mixed_batches_never_mix_halves_and_point_at_the_right_rows():
    parts = [pairs(40, name="a "), pairs(24, name="b "), pairs(16, name="c ")]
    samplers = [NoDuplicateBatches(part, 8, seed=1) for part in parts]
    mixture = Mixture([[len(samplers[0])], [len(samplers[1]), len(samplers[2])]], "round_robin", "largest", seed=1)
    whole = ConcatDataset(parts)
    sampler = MixedBatches(whole, samplers, mixture)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10
    names = [{whole[index]["anchor"][0] for index in batch} for batch in batches]
    assert all(len(name) == 1 for name in names)
    assert [name == {"a"} for name in names] == [True, False] * 5
    assert Counter(index for batch in batches for index in batch).most_common(1)[0][1] == 1


def test_a_second_epoch_is_shuffled_anew():
    part = pairs(40)
    samplers = [NoDuplicateBatches(part, 8, seed=1)]
    sampler = MixedBatches(ConcatDataset([part]), samplers, Mixture([[5]], "round_robin", "smallest", 1))
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(40))
