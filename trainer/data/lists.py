"""Cells that hold several texts: lists, as FlagEmbedding has them, and lists of passages with titles, as in Tevatron."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config import ConfigError
from trainer.data.texts import as_strings, passage_text, text_of

PASSAGE_KEYS = ("title", "text")


def texts_of(row: dict, column: str, file: Path, number: int, *, needed: bool = True) -> list[str | None] | str | None:
    """The text in a column of a line, or its list of texts. Raises ConfigError when it holds something else."""
    value = row.get(column)
    if not isinstance(value, list):
        return text_of(row, column, file, number, needed=needed)
    return [_item_of(item, column, file, number) for item in value]


def _item_of(item: Any, column: str, file: Path, number: int) -> str | None:
    if not isinstance(item, dict):
        return text_of({column: item}, column, file, number)
    parts = {key: text_of({column: item.get(key)}, column, file, number) for key in PASSAGE_KEYS}
    if "text" not in item:
        raise ConfigError(f"{file}:{number}: a passage in column '{column}' has no 'text'. It has: {', '.join(item)}")
    return passage_text(parts["title"], parts["text"] or "")


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def items_of(column: pa.ChunkedArray, where: str) -> tuple[list[pa.ChunkedArray], np.ndarray]:
    """The first, second, … items of a column of lists, null beyond a list's end, and [rows, items] whether they are there.

    A column that holds no lists is its own first items. Of a passage with a title and a text, both are read.
    """
    if not is_list(column.type):
        return [column], column.is_valid().to_numpy().reshape(-1, 1)
    lists = column.cast(pa.large_list(column.type.value_type)).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    starts, items = np.cumsum(lengths) - lengths, lists.flatten()
    if pa.types.is_struct(items.type):
        items = _passages(items, where)
    places = np.arange(lengths.max(initial=0))
    is_there = places < lengths[:, None]
    columns = [items.take(pa.array(starts + place, mask=~is_there[:, place])) for place in places.tolist()]
    return [pa.chunked_array([values]) for values in columns], is_there


def _passages(items: pa.StructArray, where: str) -> pa.Array:
    names = [field.name for field in items.type]
    if "text" not in names:
        raise ConfigError(f"{where} holds passages without 'text'. They have: {', '.join(names)}")
    parts = []
    for name in (name for name in PASSAGE_KEYS if name in names):
        strings = as_strings(pa.chunked_array([items.field(name)]))
        if strings is None:
            raise ConfigError(f"{where} holds passages whose '{name}' is {items.type.field(name).type}, not text")
        parts.append(
            pc.fill_null(pa.concat_arrays(strings.chunks) if strings.chunks else pa.array([], pa.string()), "")
        )
    return pc.utf8_trim_whitespace(pc.binary_join_element_wise(*parts, " "))
