"""Reads files into tables of anchor, positive[, negative], and says what was left out and why."""

import glob
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.beir import read_json_lines, text_of
from trainer.config import ConfigError

ROLES = ("anchor", "positive", "negative")
Columns = dict[str, str]  # role -> column name in the source


@dataclass
class Rows:
    """Texts of one source: columns anchor, positive and perhaps negative (null where a row has none)."""

    table: pa.Table
    languages: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return self.table.num_rows


def read_files(pattern: str, columns: Columns | None, language: str | None, key: str) -> Rows:
    """Rows of every .jsonl or .parquet file that `pattern` (a file or a glob) names."""
    files = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    if not files:
        raise ConfigError(f"{key}: no file matches {pattern}")
    columns = columns or {role: role for role in ROLES}
    parts = []
    for file in files:
        if file.suffix in (".jsonl", ".json"):
            parts.append(_read_json_table(file, columns, language))
        elif file.suffix == ".parquet":
            try:
                parts.append(pq.read_table(file))
            except (OSError, pa.ArrowException) as error:
                raise ConfigError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
        else:
            raise ConfigError(f"{key}: {file} is neither .jsonl nor .parquet, and not a folder in BEIR layout")
    table = pa.concat_tables(parts, promote_options="permissive")
    return rows_from_table(table, columns, language, where=pattern)


def _read_json_table(file: Path, columns: Columns, language: str | None) -> pa.Table:
    values: dict[str, list] = {column: [] for column in columns.values()}
    if language:
        values[language] = []
    seen: set[str] = set()
    for number, row in read_json_lines(file):
        seen.update(row)
        for role, column in columns.items():
            values[column].append(text_of(row, column, file, number, needed=role != "negative"))
        if language:
            values[language].append(row.get(language))
    if not seen:
        raise ConfigError(f"{file}: no rows")
    missing = [column for column in columns.values() if column not in seen and column != "negative"]
    if missing:
        raise ConfigError(f"{file}: there is no column '{missing[0]}'. It has: {', '.join(sorted(seen))}")
    if language and language not in seen:
        del values[language]
    return pa.table({column: pa.array(texts, pa.string()) for column, texts in values.items()})


def rows_from_table(table: pa.Table, columns: Columns, language: str | None, *, where: str) -> Rows:
    """Only the texts of a table, under the names anchor, positive[, negative].

    Every other column goes: sentence-transformers would embed a stray column and train it as a negative. Rows without an
    anchor or a positive are left out and counted. `language` is a language, or the name of a column that says it.
    """
    picked: dict[str, pa.ChunkedArray] = {}
    for role, column in columns.items():
        if column not in table.column_names:
            if role == "negative" and column == "negative":
                continue
            raise ConfigError(f"{where}: there is no column '{column}'. It has: {', '.join(table.column_names)}")
        values = table[column]
        if pa.types.is_null(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.string())
        if not pa.types.is_string(values.type):
            raise ConfigError(f"{where}: column '{column}' holds {values.type}, not text")
        trimmed = pc.utf8_trim_whitespace(values)
        picked[role] = pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), pa.scalar(None, pa.string()), trimmed)
    if language in table.column_names:
        tags = pc.fill_null(table[language].cast(pa.string()), "?")
    else:
        tags = pa.chunked_array([pa.repeat(pa.scalar(language or "?"), table.num_rows)])
    usable = pc.and_(pc.is_valid(picked["anchor"]), pc.is_valid(picked["positive"]))
    if "negative" in picked and picked["negative"].null_count == table.num_rows:
        del picked["negative"]
    result = pa.table(picked).filter(usable)
    counts = Counter({row["values"]: row["counts"] for row in pc.value_counts(tags.filter(usable)).to_pylist()})
    left_out = (
        Counter({"without text": table.num_rows - result.num_rows}) if result.num_rows < table.num_rows else Counter()
    )
    return Rows(result, counts, left_out)


def join(parts: list[Rows]) -> Rows:
    """The rows of several sources as one set."""
    table = pa.concat_tables([part.table for part in parts], promote_options="default")
    return Rows(
        table,
        sum((part.languages for part in parts), Counter()),
        sum((part.left_out for part in parts), Counter()),
    )


def fingerprint(table: pa.Table) -> str:
    """A hash of every text in order, the same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name in table.column_names:
        digest.update(f"\x1d{name}".encode())
        for chunk in table[name].chunks:
            digest.update("".join(f"\x1e{text}" if text is not None else "\x1f" for text in chunk.to_pylist()).encode())
    return digest.hexdigest()
