"""A teacher's scores that come with the rows: of the positive and of each negative, or the margin between two."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.config import ConfigError
from trainer.data.lists import items_of

# What the columns hold: all scores of a row, or those of its positives and of its negatives.
SCORES = ("scores", "positive_scores", "negative_scores")


def numbers_of(row: dict, column: str, file: Path, number: int) -> list[float] | float | None:
    """The number in a column of a line, or its list of numbers. Raises ConfigError when it holds something else."""
    value = row.get(column)
    for item in value if isinstance(value, list) else [value]:
        is_number = isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
        if not is_number and not (item is None and value is None):
            raise ConfigError(f"{file}:{number}: column '{column}' holds {_short(item)}, not a teacher's score")
    return value


def scores_of(
    table: pa.Table, columns: dict[str, str], positives: np.ndarray, negatives: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the cells that hold positives, and of those that hold negatives; NaN where a row has none.

    columns: the names of those in SCORES that the table has. positives, negatives: [rows, columns] which cells are there.
    Raises ConfigError for a row that has another number of scores than passages.
    """
    if "scores" in columns:
        name = columns["scores"]
        values, is_there = _matrix(table, name, where)
        is_margin = _is_number(table[name].type)
        cells = np.concatenate([positives, negatives], axis=1)
        if is_margin:
            _require(
                cells.sum(axis=1) == 2, is_there, name, where, "one number, so it needs one positive and one negative"
            )
            values, is_there = np.column_stack([values, np.zeros(len(values))]), np.repeat(is_there, 2, axis=1)
        placed = _placed(values, is_there, cells, name, where)
        return np.split(placed, [positives.shape[1]], axis=1)[0], placed[:, positives.shape[1] :]
    if missing := [key for key in SCORES[1:] if key not in columns]:
        raise ConfigError(f"{where}: there are scores of one side only. Name the column of '{missing[0]}' too")
    return (
        _placed(*_matrix(table, columns["positive_scores"], where), positives, columns["positive_scores"], where),
        _placed(*_matrix(table, columns["negative_scores"], where), negatives, columns["negative_scores"], where),
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _matrix(table: pa.Table, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """[rows, items] numbers, and whether they are there."""
    columns, is_there = items_of(table[name], f"{where}: column '{name}'")
    for column in columns:
        if not _is_number(column.type) and not pa.types.is_null(column.type):
            raise ConfigError(f"{where}: column '{name}' holds {table[name].type}, not a teacher's scores")
    values = [column.cast(pa.float64()).to_numpy(zero_copy_only=False) for column in columns]
    numbers = np.column_stack(values) if values else np.zeros((table.num_rows, 0))
    broken: list[int] = np.argwhere(is_there & ~np.isfinite(numbers))[:, 0].tolist()
    if broken:
        row = broken[0]
        raise ConfigError(f"{where}: row {row + 1}: column '{name}' holds {_short(numbers[row].tolist())}, not numbers")
    return numbers, is_there


def _placed(values: np.ndarray, is_there: np.ndarray, cells: np.ndarray, name: str, where: str) -> np.ndarray:
    """The scores of each row in the cells that it has, in order."""
    _require(is_there.sum(axis=1) == cells.sum(axis=1), is_there, name, where, "another number of scores than passages")
    placed = np.full(cells.shape, np.nan)
    scored = is_there.any(axis=1, keepdims=True)
    placed[cells & scored] = values[is_there]
    return placed


def _require(fits: np.ndarray, is_there: np.ndarray, name: str, where: str, what: str) -> None:
    """Raise ConfigError for the first row whose scores do not fit; a row without any is not taught."""
    wrong = ~fits & is_there.any(axis=1)
    if wrong.any():
        raise ConfigError(f"{where}: row {int(wrong.argmax()) + 1}: column '{name}' holds {what}")


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
