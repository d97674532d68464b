"""Rows of about the same length in one batch: what is padded is computed for nothing."""

from collections.abc import Sequence

import numpy as np

# The shortest bucket of bucket_lengths.
SHORTEST = 16


def by_length(
    order: np.ndarray, starts: np.ndarray, lengths: np.ndarray, window: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Reorder a shuffled pass so that rows of about the same length form a batch.

    Rows are exchanged only within `window` consecutive batches; which of the window's batches gets the short rows, and the
    order of rows within a batch, are random. Returns the new order, [rows], and its places sorted so that neighbours have
    about the same length, [rows].

    Args:
        order: [rows] row numbers in shuffled order.
        starts: [batches + 1] where in `order` each batch begins, and the last one ends.
        lengths: [all rows] tokens of each row's longest passage.
    """
    new, places = np.empty_like(order), []
    for first in range(0, len(starts) - 1, window):
        batches = first + rng.permutation(min(window, len(starts) - 1 - first))
        rows = order[starts[first] : starts[batches.max() + 1]]
        sizes = starts[batches + 1] - starts[batches]
        parts = np.split(rows[np.argsort(lengths[rows], kind="stable")], np.cumsum(sizes)[:-1])
        for batch, part in zip(batches.tolist(), parts, strict=True):
            new[starts[batch] : starts[batch + 1]] = rng.permutation(part)
        of_window = [np.arange(starts[batch], starts[batch + 1]) for batch in batches]
        # every other window from long to short, so that neighbours are alike where two windows meet too
        places += of_window if first // window % 2 == 0 else of_window[::-1]
    return new, np.concatenate(places) if places else order


def next_length(longest: int, shapes: Sequence[int] | None) -> int:
    """The first of these ascending lengths that is enough; `longest` itself where none is, or without any."""
    return next((length for length in shapes or () if length >= longest), longest)


def bucket_lengths(max_seq_length: int) -> list[int]:
    """The lengths, ascending and at most eight, that texts are padded to where each new length costs a compilation.

    Each is about 1.6 times the one before (16 to 512 tokens), and a multiple of 8, as matrix units like it. Steps of equal
    size would pad sentences of 15 tokens to 64.
    """
    spread = np.geomspace(min(SHORTEST, max_seq_length), max_seq_length, 8)
    return sorted({min(int(np.ceil(round(length / 8, 6))) * 8, max_seq_length) for length in spread})
