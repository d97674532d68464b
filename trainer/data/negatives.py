"""Rows with several passages: each has one positive, and its negatives stand in columns that are filled from the left."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.roles import LABEL, POSITIVE, negative_roles, negatives_of
from trainer.data.texts import Reading, as_strings

# Rows with the same number of negatives that are parted from others. Fewer would make batches of a few rows.
FEW = 64
OWN_POSITIVE = "negatives that are their row's own positive"
TWICE = "passages that their row has twice"
SEVERAL_POSITIVES = "rows are of ones with several positives, one for each"


@dataclass
class Passages:
    """The passages of some rows, and a teacher's scores of them where the data has any.

    Texts are null where a row has no such passage; scores are [rows, columns], NaN where there is none.
    """

    positives: list[pa.ChunkedArray]
    negatives: list[pa.ChunkedArray]
    scores: tuple[np.ndarray, np.ndarray] | None = None

    def arrange(self, rows: int, reading: Reading) -> tuple[np.ndarray, dict[str, pa.ChunkedArray | pa.Array]]:
        """For each positive of each of the rows: the row's number, and its columns positive, negative, negative2, …, label.

        A negative that is a positive of its row would teach that it is no answer, and is left out; so is a repeated text.
        """
        texts, ids = _numbered([*self.positives, *self.negatives], rows)
        positives, negatives = ids[:, : len(self.positives)], ids[:, len(self.positives) :]
        own = np.zeros(negatives.shape, dtype=bool)
        for column in positives.T:
            own |= (negatives == column[:, None]) & (negatives >= 0)
        negatives[own] = -1
        reading.counts[OWN_POSITIVE] += int(own.sum())
        for those in (positives, negatives):
            twice = _repeated(those)
            those[twice] = -1
            reading.counts[TWICE] += int(twice.sum())
        from_left = np.argsort(negatives < 0, axis=1, kind="stable")
        negatives = np.take_along_axis(negatives, from_left, axis=1)
        numbers, places = (positives >= 0).nonzero()
        if further := len(numbers) - int((positives >= 0).any(axis=1).sum()):
            reading.notes[SEVERAL_POSITIVES] += further + int(((positives >= 0).sum(axis=1) > 1).sum())
        most = int((negatives >= 0).sum(axis=1).max(initial=0))
        columns = [positives[numbers, places], *negatives[numbers, :most].T]
        names = [POSITIVE, *negative_roles(most)]
        table = {name: _taken(texts, cells) for name, cells in zip(names, columns, strict=True)}
        if self.scores is not None:
            of_positives, of_negatives = self.scores
            of_negatives = np.take_along_axis(of_negatives, from_left, axis=1)[numbers, :most]
            of_negatives[negatives[numbers, :most] < 0] = np.nan
            table[LABEL] = _labels(
                np.column_stack([of_positives[numbers, places], of_negatives]), np.stack(columns, axis=1)
            )
        return numbers, table


def _numbered(columns: Sequence[pa.ChunkedArray], rows: int) -> tuple[pa.Array, np.ndarray]:
    """The different texts, and [rows, columns] their numbers; -1 for null."""
    large = pa.large_string()  # the different texts may be more than 2 GiB
    chunks = [chunk.cast(large) for column in columns for chunk in column.chunks]
    encoded = pc.dictionary_encode(pa.chunked_array(chunks, large)).unify_dictionaries()
    texts = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], large)
    numbers = [pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks]
    joined = np.concatenate([np.zeros(0, np.int32), *numbers])
    return texts, joined.reshape(len(columns), rows).T.copy()


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Which cells hold a number that stands further left in their row."""
    order = np.argsort(ids, axis=1, kind="stable")
    ascending = np.take_along_axis(ids, order, axis=1)
    same = np.zeros(ids.shape, dtype=bool)
    same[:, 1:] = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    repeated = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(repeated, order, same, axis=1)
    return repeated


def _taken(texts: pa.Array, numbers: np.ndarray) -> pa.ChunkedArray:
    taken = texts.take(pa.array(numbers, mask=numbers < 0))
    strings = as_strings(pa.chunked_array([taken]))
    assert strings is not None
    return strings


def _labels(scores: np.ndarray, ids: np.ndarray) -> pa.Array:
    """A list per row: the scores of its passages; null where one has none, or is alone. ids: -1 where there is none."""
    is_there = ids >= 0
    known = np.where(is_there, np.isfinite(scores), True).all(axis=1) & (is_there.sum(axis=1) > 1)
    found = [
        row[there].tolist() if all_known else None
        for row, there, all_known in zip(scores, is_there, known, strict=True)
    ]
    return pa.array(found, pa.list_(pa.float32()))


# ------------------------------------------------------------------------------------------- how many a row has
def count_negatives(table: pa.Table) -> np.ndarray:
    """[rows]: negatives of each row."""
    counts = np.zeros(table.num_rows, dtype=int)
    for name in negatives_of(table.column_names):
        counts += table[name].is_valid().to_numpy()
    return counts


def with_at_most(table: pa.Table, most: int | None) -> pa.Table:
    """The same rows; one with more than `most` negatives becomes several, which share them in order. None: no limit."""
    names, counts = negatives_of(table.column_names), count_negatives(table)
    if most is None or counts.max(initial=0) <= most:
        return table
    parts = np.maximum(1, -(-counts // most))
    rows = np.repeat(np.arange(len(parts)), parts)
    first = most * (np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts))
    every = pa.chunked_array([chunk for name in names for chunk in table[name].chunks], pa.string())
    taken = table.drop_columns(names).take(pa.array(rows))
    for number, name in enumerate(negative_roles(most)):
        places = first + number
        cells = pa.array(places * table.num_rows + rows, mask=places >= counts[rows])
        taken = taken.append_column(name, every.take(cells))
    if LABEL in taken.column_names:
        cut = [
            None if scores is None else [scores[0], *scores[1 + start : 1 + start + most]]
            for scores, start in zip(taken[LABEL].to_pylist(), first.tolist(), strict=True)
        ]
        place = taken.column_names.index(LABEL)
        taken = taken.set_column(place, LABEL, pa.array(cut, pa.list_(pa.float32())))
    return taken


def by_count(name: str, table: pa.Table) -> dict[str, pa.Table]:
    """The rows of a set by their number of negatives, most first, so that all rows of a batch have the same.

    A row whose number is rarer than FEW becomes several, of a smaller number that is not rare, and the rest of it: none of
    its negatives is lost. A set whose rows are all of one kind keeps its name.
    """
    kinds, sizes = np.unique(count_negatives(table), return_counts=True)
    frequent = {1, *kinds[sizes >= FEW].tolist()}
    while len(kinds) > 1 and (rare := [count for count in kinds.tolist() if count > 1 and count not in frequent]):
        is_rare = pa.array(count_negatives(table) == rare[-1])
        smaller = max(other for other in frequent if 0 < other < rare[-1])
        parts = [table.filter(pc.invert(is_rare)), with_at_most(table.filter(is_rare), smaller)]
        table = pa.concat_tables(parts, promote_options="default")
        kinds = np.unique(count_negatives(table))
    return _parted(name, table)


def parted_like(name: str, table: pa.Table, kinds: Collection[int]) -> tuple[dict[str, pa.Table], int]:
    """Held-out rows by their number of negatives, which is one that rows to train on have, and how many are left out.

    A row with another number has its first negatives: more rows of one query would be left out of its batch.
    """
    counts = count_negatives(table)
    kept = np.array([max((kind for kind in kinds if kind <= count), default=0) for count in counts.tolist()], dtype=int)
    for number, role in enumerate(negatives_of(table.column_names)):
        column = pc.if_else(pa.array(kept > number), table[role], pa.scalar(None, pa.string()))
        table = table.set_column(table.column_names.index(role), role, column)
    return _parted(name, table), int((counts - kept).sum())


def _parted(name: str, table: pa.Table) -> dict[str, pa.Table]:
    table = table.combine_chunks()
    counts = count_negatives(table)
    kinds = np.unique(counts)[::-1].tolist()
    return {
        name if len(kinds) == 1 else f"{name}-{kind_of(count)}": _columns_for(
            table.filter(pa.array(counts == count)), count
        )
        for count in kinds
    }


def kind_of(count: int) -> str:
    """What rows with so many negatives are called."""
    return {0: "pairs", 1: "triplets"}.get(count, f"{count}-negatives")


def _columns_for(table: pa.Table, count: int) -> pa.Table:
    labels = [LABEL] if LABEL in table.column_names and table[LABEL].null_count < table.num_rows and count else []
    return table.select(["anchor", POSITIVE, *negative_roles(count), *labels, "language"])
