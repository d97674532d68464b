"""Which rows form which batch: no text twice in a batch, no row twice in a pass, every set its share.

Everything here is a function of the seed and a batch's number, so a resumed run continues with the very next batch.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

from trainer.config import ConfigError
from trainer.data.buckets import by_length
from trainer.data.rows import text_numbers

# Exchange partners of about the same length that are tried first, nearest first, and how many batches away they may be.
NEAR_SWAPS, NEAR_BATCHES = 100, 8
# Random exchange partners tried for a row that collides with its batch before it sits out the pass.
MAX_SWAPS = 200
# Rows that are tried once more before they sit out. Where more would, texts are too frequent for any order.
MAX_RETRIES = 2_000


def text_ids(dataset: Dataset) -> np.ndarray:
    """[rows, columns] integer ids; two cells have the same id exactly when they hold the same text."""
    return text_numbers([dataset.with_format("arrow")[:]])[0]


def batch_sizes(rows: int, batch_size: int, processes: int) -> list[int]:
    """Rows of each batch of a pass, before any row sits out: as equal as can be, the last is not a small rest.

    Each size is a multiple of the number of processes, so that a batch can be dealt out in equal parts; fewer rows than
    there are processes sit out the pass.
    """
    units, per_batch = rows // processes, batch_size // processes
    count = -(-units // per_batch)
    return [processes * (units // count + (number < units % count)) for number in range(count)]


class NoDuplicateBatches(DefaultBatchSampler):
    """Batches of one data set in which no text occurs twice.

    With in-batch negatives, a text that is one row's positive and another row's positive or negative would be trained
    as a negative of a query it answers. A pass shuffles the rows, cuts them into batches of equal size (the last is not
    a small rest), and exchanges rows that collide with rows of other batches; a row for which no partner is found in
    MAX_SWAPS tries sits out this pass. Start-up hashes each text once; a pass costs a sort.

    With `lengths`, [rows] in tokens, and a `window` of more than one batch, batches hold rows of about the same
    length: see `by_length`. A row in a batch that it would repeat a text in is then exchanged with one of about the same
    length where there is one.

    `batch_size` is what one process reads at a step. Several processes share a batch of so many times that size: it is
    one batch to the rule above and to in-batch negatives, and is dealt out in equal slices, one after the other, since
    that is how accelerate hands batches to processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        processes: int = 1,
        *,
        ids: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        window: int = 1,
    ) -> None:
        """ids: what text_ids gives for the data set, if it is known already."""
        super().__init__(dataset, batch_size=batch_size, drop_last=False, seed=seed)
        self.rows, self.processes = len(dataset), processes
        self.ids = text_ids(dataset) if ids is None else ids
        self.lengths, self.window = lengths, window
        self.sizes = np.array(batch_sizes(self.rows, batch_size * processes, processes), dtype=int)
        self._passes: dict[int, list[np.ndarray]] = {}
        # accelerate leaves out batches of another size than this, and ours differ by one
        self.batch_size = None
        if self.rows and not len(self.sizes):
            raise ConfigError(
                f"{self.rows} rows are too few for {processes} processes. Start fewer, or leave the set out"
            )

    def __len__(self) -> int:
        return len(self.sizes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches(self.epoch):
            yield from (part.tolist() for part in np.split(batch, self.processes))

    def batches(self, pass_number: int) -> list[np.ndarray]:
        """Row numbers of every batch of a pass. Two passes are remembered: loaders read ahead of what is counted."""
        if pass_number not in self._passes:
            self._passes = dict([*self._passes.items()][-1:]) | {pass_number: self._batches(pass_number)}
        return self._passes[pass_number]

    def _batches(self, pass_number: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, pass_number])
        order = rng.permutation(self.rows)[: self.sizes.sum()]
        batch_of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        near = None
        if self.lengths is not None and self.window > 1:
            order, near = by_length(order, starts, self.lengths, self.window, rng)
        repair = _Repair(self.ids, order, batch_of, starts, rng, near)
        out = [slot for slot in self._collisions(order, batch_of) if not repair.swap(slot)]
        for slot in out[:MAX_RETRIES]:
            repair.retry(slot, out)
        out = sorted(repair.out)
        keep = np.ones(len(order), dtype=bool)
        keep[out] = False
        batches = [order[a:b][keep[a:b]] for a, b in itertools.pairwise(starts)]
        batches = [batch[: len(batch) // self.processes * self.processes] for batch in batches]
        if not all(map(len, batches)):
            raise ConfigError(
                f"so many rows share a text that a batch has less than one for each of {self.processes} processes"
            )
        return batches

    def _collisions(self, order: np.ndarray, batch_of: np.ndarray) -> list[int]:
        """Slots whose row shares a text with an earlier row of the same batch."""
        columns = self.ids.shape[1]
        slot = np.repeat(np.arange(len(order)), columns)
        key = batch_of[slot] * (self.ids.max() + 1) + self.ids[order].ravel()
        by_key = np.lexsort((slot, key))
        same = (key[by_key][1:] == key[by_key][:-1]) & (slot[by_key][1:] != slot[by_key][:-1])
        return sorted(set(slot[by_key][1:][same].tolist()))


class _Repair:
    """Exchanges rows between batches of one pass until no batch holds a text twice.

    near: [slots] the slots in an order in which neighbours hold rows of about the same length, or None.
    """

    def __init__(
        self,
        ids: np.ndarray,
        order: np.ndarray,
        batch_of: np.ndarray,
        starts: np.ndarray,
        rng: np.random.Generator,
        near: np.ndarray | None = None,
    ) -> None:
        self.ids, self.order, self.batch_of, self.starts, self.rng = ids, order, batch_of, starts, rng
        self.near = near
        if near is not None:
            self.place = np.argsort(near)
            self.reach = NEAR_BATCHES * int(np.diff(starts).max(initial=0))
        self.held: dict[int, Counter] = {}
        self.out: set[int] = set()

    def _texts(self, slot: int) -> set[int]:
        return set(self.ids[self.order[slot]].tolist())

    def _in_batch(self, batch: int) -> Counter:
        if batch not in self.held:
            slots = range(self.starts[batch], self.starts[batch + 1])
            self.held[batch] = Counter(text for slot in slots for text in self._texts(slot))
        return self.held[batch]

    def _fits(self, texts: set[int], batch: int, leaving: set[int]) -> bool:
        held = self._in_batch(batch)
        return all(held[text] - (text in leaving) == 0 for text in texts)

    def _partners(self, slot: int) -> Iterator[int]:
        """Slots to exchange with: of about the same length first, then any."""
        if self.near is not None:
            distances = self.rng.integers(-self.reach, self.reach + 1, NEAR_SWAPS)
            places = self.place[slot] + distances[np.argsort(abs(distances), kind="stable")]
            yield from self.near[places[(places >= 0) & (places < len(self.near))]]
        yield from self.rng.integers(0, len(self.order), MAX_SWAPS)

    def swap(self, slot: int) -> bool:
        """Exchange the row in `slot` with a row of another batch; False when none was found and it must sit out."""
        batch = self.batch_of[slot]
        mine = self._texts(slot)
        if self._fits(mine, batch, leaving=mine):
            return True  # an earlier exchange already resolved it
        for other in self._partners(slot):
            other_batch = self.batch_of[other]
            theirs = self._texts(other)
            if other_batch == batch or other in self.out or not self._fits(mine, other_batch, leaving=theirs):
                continue
            if not self._fits(theirs, batch, leaving=mine):
                continue
            self._in_batch(batch).subtract(mine)
            self._in_batch(batch).update(theirs)
            self._in_batch(other_batch).subtract(theirs)
            self._in_batch(other_batch).update(mine)
            self.order[slot], self.order[other] = self.order[other], self.order[slot]
            return True
        self._in_batch(batch).subtract(mine)
        self.out.add(slot)
        return False

    def retry(self, slot: int, gaps: list[int]) -> None:
        """Try again for a row that sits out: later exchanges may have made room for it, or left one of these gaps."""
        if slot not in self.out:
            return  # another row has filled the gap in its batch
        self.out.remove(slot)
        self._in_batch(self.batch_of[slot]).update(self._texts(slot))
        if not self.swap(slot):
            self._fill_gap(slot, gaps)

    def _fill_gap(self, slot: int, gaps: list[int]) -> None:
        """Put the row in `slot`, which sits out, where another that sits out left a gap."""
        mine = self._texts(slot)
        for place in self.rng.integers(0, len(gaps), MAX_SWAPS):
            gap = gaps[place]
            if gap in self.out and self._fits(mine, self.batch_of[gap], leaving=set()):
                self._in_batch(self.batch_of[gap]).update(mine)
                self.out.remove(gap)
                self.order[slot], self.order[gap] = self.order[gap], self.order[slot]
                return


class Mixture:
    """In which order the batches of several data sets are drawn.

    groups: per data set, the batches of each subset (triplets and pairs), which share the set's turns by size. Batch k of a
    set belongs to its pass k // size: a small set is shuffled anew for every pass, a large one goes on in the next epoch.
    """

    def __init__(self, groups: Sequence[Sequence[int]], strategy: str, epoch_rule: str, seed: int) -> None:
        self.groups, self.strategy, self.seed = [list(group) for group in groups], strategy, seed
        self.sizes = [sum(group) for group in self.groups]
        self.turns = (min if epoch_rule == "smallest" else max)(self.sizes, default=0)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Batches of one epoch."""
        return sum(self.sizes) if self.strategy == "proportional" else self.turns * len(self.groups)

    def draws(self, epoch: int, first: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """(group, subset, pass, batch within the pass) of each batch of an epoch, from number `first` on."""
        if self.strategy == "proportional":
            order = np.repeat(np.arange(len(self.groups)), self.sizes)
            np.random.default_rng([self.seed, epoch]).shuffle(order)
            taken = [epoch * size for size in self.sizes]
        else:
            order = np.tile(np.arange(len(self.groups)), self.turns)
            taken = [epoch * self.turns] * len(self.groups)
        taken = (taken + np.bincount(order[:first], minlength=len(taken))).tolist()
        for group in order[first:].tolist():
            yield (group, *self._locate(group, taken[group]))
            taken[group] += 1

    def between(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """The draws of a run from batch number `first` up to `last`, which may be epochs later."""
        while first < last:
            epoch, place = divmod(first, len(self))
            found = itertools.islice(self.draws(epoch, place), last - first)
            yield from found
            first += len(self) - place

    def _locate(self, group: int, number: int) -> tuple[int, int, int]:
        """(subset, pass, batch within the subset's pass) of batch `number` of a group."""
        pass_number, place = divmod(number, self.sizes[group])
        if (group, pass_number) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != group}
            subsets = np.repeat(np.arange(len(self.groups[group])), self.groups[group])
            np.random.default_rng([self.seed, group, pass_number]).shuffle(subsets)
            within = np.zeros(len(subsets), dtype=int)
            for subset in range(len(self.groups[group])):
                within[subsets == subset] = np.arange((subsets == subset).sum())
            self._orders[group, pass_number] = np.stack([subsets, within], axis=1)
        subset, batch = self._orders[group, pass_number][place].tolist()
        return subset, pass_number, batch

    def drawn(self, batches: int) -> list[Counter]:
        """Per group, how often each (subset, batch) is drawn in the first `batches` batches of a run, however many."""
        epochs, rest = divmod(
            batches, len(self) or 1
        )  # no batches: a set with fewer rows than processes, refused later
        per_epoch = self.sizes if self.strategy == "proportional" else [self.turns] * len(self.groups)
        taken = [epochs * turns for turns in per_epoch]
        for group, *_ in itertools.islice(self.draws(epochs), rest):
            taken[group] += 1
        counts = []
        for group, number in enumerate(taken):
            passes, rest = divmod(number, self.sizes[group] or 1)
            subsets = enumerate(self.groups[group])
            count = Counter({(subset, batch): passes for subset, size in subsets for batch in range(size)})
            for place in range(number - rest, number):
                subset, _, batch = self._locate(group, place)
                count[subset, batch] += 1
            counts.append(count)
        return counts


class MixedBatches(DefaultBatchSampler):
    """Draws batches from several NoDuplicateBatches in the order of a Mixture."""

    def __init__(self, dataset: Any, batch_samplers: Sequence[NoDuplicateBatches], mixture: Mixture) -> None:
        super().__init__(dataset, batch_size=1, drop_last=False)
        self.batch_size = None  # as in NoDuplicateBatches
        self.dataset, self.batch_samplers, self.mixture = dataset, batch_samplers, mixture
        firsts = np.cumsum([0, *(len(group) for group in mixture.groups)])
        self.first_subset = firsts.tolist()

        self.processes = batch_samplers[0].processes

    def __len__(self) -> int:
        return len(self.mixture) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        offsets = np.cumsum([0, *(len(part) for part in self.dataset.datasets)])
        for group, subset, pass_number, batch in self.mixture.draws(self.epoch):
            index = self.first_subset[group] + subset
            rows = self.batch_samplers[index].batches(pass_number)[batch]
            yield from (part.tolist() for part in np.split(rows + offsets[index], self.processes))
