"""Reads files into tables of a query, its positive and its negatives, and says what was left out and why."""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config import ConfigError, one_line
from trainer.data.given_scores import SCORES, numbers_of, scores_of
from trainer.data.lists import is_list, items_of, texts_of
from trainer.data.negatives import Passages
from trainer.data.roles import LABEL, roles_of
from trainer.data.texts import Reading, as_strings, have_text, is_json_lines, read_json_lines, text_of

# Twice the languages of the largest set here; more are no languages, and would fill the plan with a line of any length.
MOST_LANGUAGES = 12
ROWS_AT_ONCE = 2**16
BLANK = "passages in lists without text"
# What a column is read as -> its name in the source: anchor, positive, negative, or one of SCORES. The name that is given
# for negative stands for those with a number too: negative_1, negative_2, …
Columns = dict[str, str]
DEFAULT_COLUMNS: Columns = {name: name for name in ("anchor", "positive", "negative")}


@dataclass
class Rows:
    """Texts of one source: columns anchor, positive, language, and perhaps negative, negative2, …, and label.

    Of its negatives' columns a row fills the first; the others are null. label: a teacher's scores of its passages, the
    positive first; null where there are none.
    """

    table: pa.Table
    left_out: Counter[str] = field(default_factory=Counter)
    reading: Reading = field(default_factory=Reading)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def languages(self) -> dict[str, int]:
        """Rows per language, the most frequent first; a column that holds something else is told by its many values."""
        counts = pc.value_counts(self.table["language"]).to_pylist()
        found = Counter({row["values"]: row["counts"] for row in counts}).most_common()
        rest = {f"{len(found) - MOST_LANGUAGES:,} others": sum(count for _, count in found[MOST_LANGUAGES:])}
        return dict(found[:MOST_LANGUAGES]) | (rest if len(found) > MOST_LANGUAGES else {})

    def take(self, numbers: np.ndarray, **left_out: int) -> "Rows":
        """The rows with these numbers; `left_out` adds to the counts of what is not trained on."""
        return Rows(self.table.take(pa.array(numbers)), self.left_out + Counter(left_out), self.reading)


def read_files(pattern: str, columns: Columns | None, language: str | None, key: str) -> Rows:
    """Rows of every .jsonl or .parquet file that `pattern` (a file or a glob) names."""
    whole = str(Path(pattern).expanduser())  # Path.glob takes no absolute pattern
    files = [Path(name) for name in sorted(glob.glob(whole, recursive=True))]  # noqa: PTH207
    if not files:
        raise ConfigError(f"{key}: no file matches {pattern}")
    columns = columns or DEFAULT_COLUMNS
    parts = []
    for file in files:
        if is_json_lines(file):
            table = _read_json_table(file, columns, language)
        elif file.suffix == ".parquet":
            table = read_parquet(file)
        else:
            raise ConfigError(f"{key}: {file} is neither .jsonl[.gz] nor .parquet, and not a folder in BEIR layout")
        parts.append(rows_from_table(table, columns, language, where=str(file)))
    return join(parts)


def read_parquet(file: Path) -> pa.Table:
    """A parquet file's columns; raises ConfigError when it is not one."""
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file}: cannot be read as parquet: {one_line(error)}") from None


def negatives_in(names: Iterable[str], columns: Columns) -> list[str]:
    """The columns that hold negatives: the one that is named, and those of its name with a number, in order.

    sentence-transformers' mine_hard_negatives writes negative_1, negative_2, … as n-tuples.
    """
    if "negative" not in columns:
        return []
    numbered = re.compile(re.escape(columns["negative"]) + r"(?:_([0-9]+))?")
    found = {name: int(match[1] or 0) for name in names if (match := numbered.fullmatch(name))}
    return sorted(found.keys() - {columns["anchor"], columns["positive"]}, key=lambda name: (found[name], name))


def _read_json_table(file: Path, columns: Columns, language: str | None) -> pa.Table:
    """The columns that are read; the others are there without what they hold."""
    texts: dict[str, list[Any]] = {columns[role]: [] for role in ("anchor", "positive")}
    scores: dict[str, list[Any]] = {columns[key]: [] for key in SCORES if key in columns}
    tags: list[str | None] = []
    seen: dict[str, None] = {}
    count = 0
    for number, row in read_json_lines(file):
        if not row.keys() <= seen.keys():
            seen |= dict.fromkeys(row)
            for column in negatives_in(row, columns):
                texts.setdefault(column, [None] * count)
        for column, values in texts.items():
            is_needed = column in (columns["anchor"], columns["positive"])
            read = text_of if column == columns["anchor"] else texts_of
            values.append(read(row, column, file, number, needed=is_needed))
        for column, values in scores.items():
            values.append(numbers_of(row, column, file, number))
        tag = row.get(language) if language else None
        tags.append(None if tag is None else str(tag))
        count += 1
    if not seen:
        raise ConfigError(f"{file}: no rows")
    table = {column: pa.nulls(count) for column in seen}
    table |= {column: _array_of(values, pa.string()) for column, values in texts.items()}
    table |= {column: _array_of(values, pa.float64()) for column, values in scores.items() if column in seen}
    return pa.table(table | ({language: pa.array(tags, pa.string())} if language in seen else {}))


def _array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column of values, or of lists of them where a row has a list."""
    if not any(isinstance(value, list) for value in values):
        return pa.array(values, kind)
    return pa.array([value if isinstance(value, list | None) else [value] for value in values], pa.list_(kind))


def rows_from_table(table: pa.Table, columns: Columns, language: str | None, *, where: str) -> Rows:
    """What `_rows_of` gives for the table. One long list would widen all rows, so they are read in parts."""
    starts = range(0, max(table.num_rows, 1), ROWS_AT_ONCE)
    parts = [_rows_of(table.slice(start, ROWS_AT_ONCE), columns, language, where, start) for start in starts]
    return join(parts) if len(parts) > 1 else parts[0]


def _rows_of(table: pa.Table, columns: Columns, language: str | None, where: str, first: int) -> Rows:
    """Only the texts of a table, under the names anchor, positive[, negative, negative2, …], and their language.

    Every other column is left out, and the plan says so: sentence-transformers would train it as a negative.
    Rows without an anchor or a positive are left out and counted; one with several positives becomes one for each.
    `language` is a language, or the name of a column that says it. first: number of the table's first row.
    """
    reading = Reading()
    found = negatives_in(table.column_names, columns)
    scored = {key: columns[key] for key in SCORES if key in columns}
    needed = [columns["anchor"], columns["positive"], *scored.values()]
    if "negative" in columns and columns["negative"] != "negative" and not found:  # a name of the user's own
        needed.append(columns["negative"])
    for column in needed:
        if column not in table.column_names:
            raise ConfigError(f"{where}: there is no column '{column}'. It has: {', '.join(table.column_names)}")
    read = {*needed, *found, language}
    reading.pass_over("columns", (column for column in table.column_names if column not in read))
    positives = _cells_of(table, [columns["positive"]], reading, where)
    negatives = _cells_of(table, found, reading, where)
    passages = Passages(positives.texts, negatives.texts)
    if scored:
        passages.scores = scores_of(table, scored, (positives.given, negatives.given), where, first)
    anchors = _texts_of(table[columns["anchor"]], columns["anchor"], reading, where)
    if language in table.column_names:
        languages = _language_tags(table[language], f"{where}: column '{language}'")
    else:
        languages = pa.chunked_array([pa.repeat(pa.scalar(language or "?"), table.num_rows)])
    numbers, arranged = passages.arrange(table.num_rows, reading)
    usable = anchors.is_valid().to_numpy()[numbers]
    rows = pa.table({"anchor": anchors.take(numbers), **arranged, "language": languages.take(numbers)})
    rows = rows.filter(pa.array(usable))
    if LABEL in rows.column_names and rows[LABEL].null_count == len(rows):
        rows = rows.drop_columns(LABEL)
    left_out = Counter({"without text": table.num_rows - len(np.unique(numbers[usable]))})
    return Rows(rows, +left_out, reading)


@dataclass
class _Cells:
    """Columns of texts, null where there is nothing to see, and [rows, columns] whether a cell is there at all."""

    texts: list[pa.ChunkedArray]
    given: np.ndarray


def _cells_of(table: pa.Table, names: Sequence[str], reading: Reading, where: str) -> _Cells:
    """The texts of these columns; a column of lists gives as many columns as its longest list has texts."""
    texts: list[pa.ChunkedArray] = []
    given: list[np.ndarray] = [np.zeros((table.num_rows, 0), dtype=bool)]
    for name in names:
        columns, there = items_of(table[name], f"{where}: column '{name}'")
        read = [_texts_of(column, name, reading, where) for column in columns]
        if is_list(table[name].type):
            reading.counts[BLANK] += int(there.sum()) - sum(len(column) - column.null_count for column in read)
        texts += read
        given.append(there)
    return _Cells(texts, np.concatenate(given, axis=1))


def _texts_of(column: pa.ChunkedArray, name: str, reading: Reading, where: str) -> pa.ChunkedArray:
    """A column's texts in NFC, without blanks at their ends; null where there is nothing to see."""
    values = as_strings(column)
    if values is None:
        raise ConfigError(f"{where}: column '{name}' holds {column.type}, not text")
    _require_utf8(values, f"{where}: column '{name}'")
    values = reading.compose_column(values)
    return pc.if_else(have_text(values), pc.utf8_trim_whitespace(values), pa.scalar(None, pa.string()))


def _require_utf8(values: pa.ChunkedArray | pa.Array, column: str) -> None:
    """Raise ConfigError where bytes are not text: parquet files are read without a look at it."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{column} holds bytes that are no text in UTF-8: {one_line(error)}") from None


def _language_tags(values: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    """Short printable words for the counts per language; '?' where there is none. Nothing trains on them."""
    try:
        words = values.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise ConfigError(f"{column} holds {values.type}, not the names of languages") from None
    _require_utf8(words, column)
    printable = pc.utf8_trim_whitespace(pc.replace_substring_regex(words, r"[\p{Z}\p{C}]+", " "))
    short = pc.utf8_slice_codeunits(printable, 0, 20)
    return pc.if_else(pc.equal(pc.fill_null(short, ""), ""), "?", short)


def join(parts: list[Rows]) -> Rows:
    """The rows of several sources as one set."""
    table = pa.concat_tables([part.table for part in parts], promote_options="default")
    left_out = sum((part.left_out for part in parts), Counter())
    return Rows(table, left_out, sum((part.reading for part in parts), Reading()))


def fingerprint(table: pa.Table) -> str:
    """A hash of every text in order, the same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name in roles_of(table.column_names):
        digest.update(f"\x1d{name}".encode())
        for chunk in table[name].chunks:
            digest.update("".join(f"\x1e{text}" if text is not None else "\x1f" for text in chunk.to_pylist()).encode())
    if LABEL in table.column_names:
        digest.update(repr(table[LABEL].to_pylist()).encode())
    return digest.hexdigest()


def text_numbers(tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """[rows, columns] of each table: numbers of its texts, equal for equal texts of all tables; -1 where there is none."""
    columns = [[table[role] for role in roles_of(table.column_names)] for table in tables]
    # large: the different texts of several sets may be more than 2 GiB
    chunks = [chunk.cast(pa.large_string()) for each in columns for column in each for chunk in column.chunks]
    encoded = pc.dictionary_encode(pa.chunked_array(chunks, pa.large_string()))
    numbers = [np.zeros(0, np.int32), *(pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks)]
    ends = np.cumsum([len(each) * table.num_rows for each, table in zip(columns, tables, strict=True)])
    parts = np.split(np.concatenate(numbers), ends[:-1])
    return [part.reshape(len(each), -1).T for part, each in zip(parts, columns, strict=True)]
