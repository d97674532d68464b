"""Which rows are held out for the evaluation loss: none that shares a text with a row that is trained on."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from trainer.data.rows import Rows, text_numbers
from trainer.data.sources import LoadedSource

HELD_OUT = "held out for the evaluation loss"
BESIDE = "they share a text with rows held out"
TRAINED_ON = "they share a text with rows that are trained on"
TOO_MANY = "each shares its texts with too many"
# Rows, and at most a hundredth of a set, that are left out of training to hold out one row that shares texts with them.
MOST_BESIDE = 100


def hold_out(sources: Sequence[LoadedSource], seed: int) -> None:
    """Give each source its evaluation rows: a tenth of its rows at random, at most `hold_out`, or those it came with.

    No query and no passage of an evaluation row is in a row that is trained on, of whatever source. Rows in the way are
    left out, and counted: of training, or of the evaluation rows that a source came with.
    """
    own = [(source, source.eval_rows) for source in sources if source.eval_rows is not None]
    numbers = text_numbers([*(source.rows.table for source in sources), *(rows.table for _, rows in own)])
    numbers, of_own = numbers[: len(sources)], numbers[len(sources) :]
    sizes = [min(source.hold_out, len(source.rows) // 10) if source.eval_rows is None else 0 for source in sources]
    held = choose(numbers, sizes, seed)
    texts = texts_of(each[out] for each, out in zip(numbers, held, strict=True))
    trained = []
    for source, each, out, size in zip(sources, numbers, held, sizes, strict=True):
        is_trained = ~(out | np.isin(each, texts).any(axis=1))
        trained.append(each[is_trained])
        if source.eval_rows is None:
            source.eval_rows = Rows(source.rows.table.filter(pa.array(out)), Counter({TOO_MANY: size - int(out.sum())}))
        left_out = {HELD_OUT: int(out.sum()), BESIDE: int((~is_trained & ~out).sum())}
        source.rows = source.rows.take(np.flatnonzero(is_trained), **left_out)
    texts = texts_of(trained)
    for (source, rows), each in zip(own, of_own, strict=True):
        shared = np.isin(each, texts).any(axis=1)
        source.eval_rows = rows.take(np.flatnonzero(~shared), **{TRAINED_ON: int(shared.sum())})


def texts_of(rows: Iterable[np.ndarray]) -> np.ndarray:
    """The numbers of the different texts in some rows."""
    numbers = np.unique(np.concatenate([each.ravel() for each in rows]))
    return numbers[numbers >= 0]


def choose(numbers: Sequence[np.ndarray], sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Of each set, [rows], whether each is held out: at most `size`, in random order, with all that share a text with it.

    Where these are too many, because texts link them to ever more rows, a row is held out alone, and those that share a
    text with it are not trained on. In all, a tenth of a set at most is not. numbers: what text_numbers gives.
    """
    groups, beside = groups_of(numbers), rows_beside(numbers)
    counts = np.array([*map(len, numbers)])
    owner = np.repeat(np.arange(len(numbers)), counts)
    in_group = np.zeros((int(groups.max(initial=-1)) + 1, len(numbers)), dtype=int)
    np.add.at(in_group, (groups, owner), 1)
    left, spare = np.array(sizes), counts // 10
    most = np.minimum(MOST_BESIDE, spare // 10)
    possible = (in_group[groups] <= left).all(axis=1) | (beside.sum(axis=1) <= most[owner])
    held, group_held = np.zeros(len(groups), dtype=bool), np.zeros(len(in_group), dtype=bool)
    order = in_turn(counts, sizes, seed)
    for row in order[possible[order]].tolist():
        if not left.any():
            break
        group, own = groups[row], owner[row]
        if left[own] == 0 or group_held[group]:
            continue
        if (in_group[group] <= np.minimum(left, spare)).all():
            group_held[group] = True
            left, spare = left - in_group[group], spare - in_group[group]
            continue
        leaving = beside[row] + (np.arange(len(sizes)) == own)
        if beside[row].sum() <= most[own] and (leaving <= spare).all():
            held[row] = True
            left[own] -= 1
            spare = spare - leaving
    return np.split(held | group_held[groups], np.cumsum(counts)[:-1])


def in_turn(counts: np.ndarray, sizes: Sequence[int], seed: int) -> np.ndarray:
    """The rows of all sets that hold some out, in random order: sets take turns, the more often the more they hold out."""
    starts = np.cumsum([0, *counts])
    rows, turns = [np.zeros(0, dtype=int)], [np.zeros(0)]
    for start, count, size in zip(starts[:-1], counts, sizes, strict=True):
        if size:
            rows.append(start + np.random.default_rng([seed, 1]).permutation(count))
            turns.append(np.arange(count) / size)
    return np.concatenate(rows)[np.argsort(np.concatenate(turns), kind="stable")]


def rows_beside(numbers: Sequence[np.ndarray]) -> np.ndarray:
    """[rows of all sets, sets]: how many rows of each set share a text with a row; those that share two count twice."""
    texts = int(max(each.max(initial=-1) for each in numbers)) + 1
    holders = np.zeros((texts + 1, len(numbers)), dtype=np.int32)  # the last is for "no text", -1
    for number, each in enumerate(numbers):
        holders[:texts, number] = np.bincount(each[each >= 0], minlength=texts)
    beside = [holders[each].sum(axis=1) for each in numbers]
    for number, each in enumerate(numbers):
        beside[number][:, number] -= (each >= 0).sum(axis=1)  # itself
    return np.concatenate(beside)


def groups_of(numbers: Sequence[np.ndarray]) -> np.ndarray:
    """[rows of all sets]: numbers of groups, the same for rows that share a text, directly or through others."""
    rows = sum(map(len, numbers))
    row = np.repeat(np.arange(rows), np.concatenate([np.full(len(each), each.shape[1]) for each in numbers]))
    text = np.concatenate([each.ravel() for each in numbers])
    row, text = row[text >= 0], text[text >= 0]
    nodes = rows + int(text.max(initial=-1)) + 1  # rows, then texts
    links = sp.coo_array((np.ones(len(row), dtype=bool), (row, rows + text)), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1][:rows]
