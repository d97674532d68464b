"""A teacher's scores that come with the rows: of the positive and of each negative, or the margin between two."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from trainer.config import ConfigError
from trainer.data.lists import items_of

# What the columns hold: all scores of a row, or those of its positives and of its negatives.
SCORES = ("scores", "positive_scores", "negative_scores")


def numbers_of(row: dict, column: str, file: Path, number: int) -> list[float] | float | None:
    """The number in a column of a line, or its list of numbers. Raises ConfigError when it holds something else."""
    value = row.get(column)
    if value is None:
        return None
    numbers = [_number(item) for item in (value if isinstance(value, list) else [value])]
    if None in numbers:
        item = value[numbers.index(None)] if isinstance(value, list) else value
        raise ConfigError(f"{file}:{number}: column '{column}' holds {_short(item)}, not a teacher's score")
    known = [value for value in numbers if value is not None]
    return known if isinstance(value, list) else known[0]


def _number(value: Any) -> float | None:
    """None for what is no number, or one that is not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def scores_of(
    table: pa.Table, columns: dict[str, str], cells: tuple[np.ndarray, np.ndarray], where: str, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the cells that hold positives, and of those that hold negatives; NaN where a row has none.

    Raises ConfigError for a row that has another number of scores than passages.

    Args:
        columns: the names of those in SCORES that the table has.
        cells: of positives and of negatives, [rows, columns] which are there.
        first: number of the table's first row.
    """
    if "scores" in columns:
        place = _Place(where, columns["scores"], first)
        values, is_there = _matrix(table, place)
        both = np.concatenate(cells, axis=1)
        if _is_number(table[place.column].type):
            place.require(both.sum(axis=1) == 2, is_there, "one number, so it needs one positive and one negative")
            values, is_there = np.column_stack([values, np.zeros(len(values))]), np.repeat(is_there, 2, axis=1)
        placed = _placed(values, is_there, both, place)
        positives = cells[0].shape[1]
        return placed[:, :positives], placed[:, positives:]
    places = [_Place(where, columns[key], first) for key in SCORES[1:]]
    of_positives, of_negatives = (
        _placed(*_matrix(table, place), own, place) for place, own in zip(places, cells, strict=True)
    )
    return of_positives, of_negatives


@dataclass(frozen=True)
class _Place:
    """A column, and the number of its first row, for messages."""

    where: str
    column: str
    first: int

    def fail(self, row: int, what: str) -> NoReturn:
        """Raise ConfigError for a row."""
        raise ConfigError(f"{self.where}: row {self.first + row + 1}: column '{self.column}' holds {what}")

    def require(self, fits: np.ndarray, is_there: np.ndarray, what: str) -> None:
        """Raise ConfigError for the first row whose scores do not fit; a row without any is not taught."""
        wrong = ~fits & is_there.any(axis=1)
        if wrong.any():
            self.fail(int(wrong.argmax()), what)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _matrix(table: pa.Table, place: _Place) -> tuple[np.ndarray, np.ndarray]:
    """[rows, items] numbers, and whether they are there."""
    held = table[place.column]
    columns, is_there = items_of(held, f"{place.where}: column '{place.column}'")
    for column in columns:
        if not _is_number(column.type) and not pa.types.is_null(column.type):
            raise ConfigError(f"{place.where}: column '{place.column}' holds {held.type}, not a teacher's scores")
    values = [column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) for column in columns]
    numbers = np.column_stack(values) if values else np.zeros((table.num_rows, 0))
    broken: list[int] = np.argwhere(is_there & ~np.isfinite(numbers))[:, 0].tolist()
    if broken:
        place.fail(broken[0], f"{_short(numbers[broken[0]].tolist())}, not numbers")
    return numbers, is_there


def _placed(values: np.ndarray, is_there: np.ndarray, cells: np.ndarray, place: _Place) -> np.ndarray:
    """The scores of each row in the cells that it has, in order."""
    place.require(is_there.sum(axis=1) == cells.sum(axis=1), is_there, "another number of scores than passages")
    placed = np.full(cells.shape, np.nan)
    placed[cells & is_there.any(axis=1, keepdims=True)] = values[is_there]
    return placed


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
