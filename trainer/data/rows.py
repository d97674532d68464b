"""Reads files into tables of anchor, positive[, negative], and says what was left out and why."""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config import ConfigError, one_line
from trainer.data.texts import (
    SEVERAL_NEGATIVES,
    Reading,
    as_strings,
    have_text,
    is_json_lines,
    read_json_lines,
    text_of,
)

ROLES = ["anchor", "positive", "negative"]
# What a role's texts are to a search, and so which prompt stands in front of them.
SIDES = {"anchor": "query", "positive": "document", "negative": "document"}
LABEL = "label"  # a teacher's scores of a row; what the library takes for labels, and hands to the loss
# Twice the languages of the largest set here; more are no languages, and would fill the plan with a line of any length.
MOST_LANGUAGES = 12
Columns = dict[str, str]  # role -> column name in the source; `negative` stands for negative_1, negative_2, … too


@dataclass
class Rows:
    """Texts of one source: columns anchor, positive, perhaps negative (null where a row has none), and language."""

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
    columns = columns or {role: role for role in ROLES}
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
    values: dict[str, list] = {columns[role]: [] for role in ("anchor", "positive")}
    tags: list[str | None] = []
    seen: dict[str, None] = {}
    count = 0
    for number, row in read_json_lines(file):
        if not row.keys() <= seen.keys():
            seen |= dict.fromkeys(row)
            for column in negatives_in(row, columns):
                values.setdefault(column, [None] * count)
        for column, texts in values.items():
            is_needed = column in (columns["anchor"], columns["positive"])
            texts.append(text_of(row, column, file, number, needed=is_needed))
        tag = row.get(language) if language else None
        tags.append(None if tag is None else str(tag))
        count += 1
    if not seen:
        raise ConfigError(f"{file}: no rows")
    table = {column: pa.nulls(count) for column in seen}
    table |= {column: pa.array(texts, pa.string()) for column, texts in values.items()}
    return pa.table(table | ({language: pa.array(tags, pa.string())} if language in seen else {}))


def rows_from_table(table: pa.Table, columns: Columns, language: str | None, *, where: str) -> Rows:
    """Only the texts of a table, under the names anchor, positive[, negative], and their language.

    Every other column is left out, and the plan says so: sentence-transformers would train it as a negative.
    Rows without an anchor or a positive are left out and counted; one with several negatives becomes several rows.
    `language` is a language, or the name of a column that says it.
    """
    reading = Reading()
    found = negatives_in(table.column_names, columns)
    needed = [columns["anchor"], columns["positive"]]
    if "negative" in columns and columns["negative"] != "negative" and not found:  # a name of the user's own
        needed.append(columns["negative"])
    for column in needed:
        if column not in table.column_names:
            raise ConfigError(f"{where}: there is no column '{column}'. It has: {', '.join(table.column_names)}")
    read = {*needed, *found, language}
    reading.pass_over("columns", (column for column in table.column_names if column not in read))
    picked = {role: _texts_of(table, columns[role], reading, where) for role in ("anchor", "positive")}
    negatives = [_unlike(picked["positive"], _texts_of(table, column, reading, where), reading) for column in found]
    if language in table.column_names:
        picked["language"] = _language_tags(table[language], f"{where}: column '{language}'")
    else:
        picked["language"] = pa.repeat(pa.scalar(language or "?"), table.num_rows)
    usable = pc.and_(pc.is_valid(picked["anchor"]), pc.is_valid(picked["positive"]))
    negatives = [column.filter(usable) for column in negatives if column.null_count < table.num_rows]
    rows = Rows(_one_negative_a_row(pa.table(picked).filter(usable), negatives, reading), reading=reading)
    if without := table.num_rows - pc.sum(usable).as_py() if table.num_rows else 0:
        rows.left_out["without text"] = without
    return rows


def _texts_of(table: pa.Table, column: str, reading: Reading, where: str) -> pa.ChunkedArray:
    """A column's texts in NFC, without blanks at their ends; null where there is nothing to see."""
    values = as_strings(table[column])
    if values is None:
        raise ConfigError(f"{where}: column '{column}' holds {table[column].type}, not text. {SEVERAL_NEGATIVES}")
    _require_utf8(values, f"{where}: column '{column}'")
    values = reading.compose_column(values)
    return pc.if_else(have_text(values), pc.utf8_trim_whitespace(values), pa.scalar(None, pa.string()))


def _unlike(positives: pa.ChunkedArray, negatives: pa.ChunkedArray, reading: Reading) -> pa.ChunkedArray:
    """The negatives without those that are their row's own positive, which would teach that it is no answer."""
    same = pc.fill_null(pc.equal(negatives, positives), False)
    count = pc.sum(same).as_py() or 0
    reading.counts["negatives that are their row's own positive"] += count
    return pc.if_else(same, pa.scalar(None, pa.string()), negatives) if count else negatives


def _one_negative_a_row(rows: pa.Table, negatives: list[pa.ChunkedArray], reading: Reading) -> pa.Table:
    """A row for each negative of each row, in their order. A row without any stays as it is."""
    if len(negatives) < 2:
        return rows.add_column(2, "negative", negatives[0]) if negatives else rows
    there = np.stack([column.is_valid().to_numpy() for column in negatives], axis=1)
    counts = there.sum(axis=1)
    reading.triplets = int(counts[counts > 1].sum())
    there[counts == 0, 0] = True
    numbers, places = there.nonzero()
    every = pa.chunked_array([chunk for column in negatives for chunk in column.chunks], pa.string())
    return rows.take(numbers).add_column(2, "negative", every.take(places * rows.num_rows + numbers))


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
    for name in (role for role in ROLES if role in table.column_names):
        digest.update(f"\x1d{name}".encode())
        for chunk in table[name].chunks:
            digest.update("".join(f"\x1e{text}" if text is not None else "\x1f" for text in chunk.to_pylist()).encode())
    return digest.hexdigest()


def text_numbers(tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """[rows, columns] of each table: numbers of its texts, equal for equal texts of all tables; -1 where there is none."""
    columns = [[table[role] for role in ROLES if role in table.column_names] for table in tables]
    # large: the different texts of several sets may be more than 2 GiB
    chunks = [chunk.cast(pa.large_string()) for each in columns for column in each for chunk in column.chunks]
    encoded = pc.dictionary_encode(pa.chunked_array(chunks, pa.large_string()))
    numbers = [np.zeros(0, np.int32), *(pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks)]
    ends = np.cumsum([len(each) * table.num_rows for each, table in zip(columns, tables, strict=True)])
    parts = np.split(np.concatenate(numbers), ends[:-1])
    return [part.reshape(len(each), -1).T for part, each in zip(parts, columns, strict=True)]
