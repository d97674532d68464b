"""Reads files into tables of anchor, positive[, negative], and says what was left out and why."""

import glob
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.beir import read_json_lines, text_of
from trainer.config import ConfigError

ROLES = ["anchor", "positive", "negative"]
Columns = dict[str, str]  # role -> column name in the source


@dataclass
class Rows:
    """Texts of one source: columns anchor, positive, perhaps negative (null where a row has none), and language."""

    table: pa.Table
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def languages(self) -> dict[str, int]:
        """Rows per language, the most frequent first."""
        counts = pc.value_counts(self.table["language"]).to_pylist()
        return dict(Counter({row["values"]: row["counts"] for row in counts}).most_common())

    def take(self, numbers: np.ndarray, **left_out: int) -> "Rows":
        """The rows with these numbers; `left_out` adds to the counts of what is not trained on."""
        return Rows(self.table.take(pa.array(numbers)), self.left_out + Counter(left_out))


def read_files(pattern: str, columns: Columns | None, language: str | None, key: str) -> Rows:
    """Rows of every .jsonl or .parquet file that `pattern` (a file or a glob) names."""
    files = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    if not files:
        raise ConfigError(f"{key}: no file matches {pattern}")
    columns = columns or {role: role for role in ROLES}
    parts = []
    for file in files:
        if file.suffix in (".jsonl", ".json"):
            table = _read_json_table(file, columns, language)
        elif file.suffix == ".parquet":
            table = read_parquet(file)
        else:
            raise ConfigError(f"{key}: {file} is neither .jsonl nor .parquet, and not a folder in BEIR layout")
        parts.append(rows_from_table(table, columns, language, where=str(file)))
    return join(parts)


def read_parquet(file: Path) -> pa.Table:
    """A parquet file's columns; raises ConfigError when it is not one."""
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _read_json_table(file: Path, columns: Columns, language: str | None) -> pa.Table:
    values: dict[str, list] = {column: [] for column in columns.values()}
    tags: list[str | None] = []
    seen: set[str] = set()
    for number, row in read_json_lines(file):
        seen.update(row)
        for role, column in columns.items():
            values[column].append(text_of(row, column, file, number, needed=role != "negative"))
        tag = row.get(language) if language else None
        tags.append(None if tag is None else str(tag))
    if not seen:
        raise ConfigError(f"{file}: no rows")
    missing = [column for column in columns.values() if column not in seen and column != "negative"]
    if missing:
        raise ConfigError(f"{file}: there is no column '{missing[0]}'. It has: {', '.join(sorted(seen))}")
    table = {column: pa.array(texts, pa.string()) for column, texts in values.items()}
    return pa.table(table | ({language: pa.array(tags, pa.string())} if language in seen else {}))


def rows_from_table(table: pa.Table, columns: Columns, language: str | None, *, where: str) -> Rows:
    """Only the texts of a table, under the names anchor, positive[, negative], and their language.

    Every other column goes: sentence-transformers would embed a stray column and train it as a negative. Rows without an
    anchor or a positive are left out and counted. `language` is a language, or the name of a column that says it.
    """
    picked: dict[str, pa.ChunkedArray | pa.Array] = {}
    for role, column in columns.items():
        if column not in table.column_names:
            if role == column == "negative":
                continue
            raise ConfigError(f"{where}: there is no column '{column}'. It has: {', '.join(table.column_names)}")
        values = table[column]
        if pa.types.is_null(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.string())
        if not pa.types.is_string(values.type):
            raise ConfigError(f"{where}: column '{column}' holds {values.type}, not text")
        trimmed = pc.utf8_trim_whitespace(values)
        picked[role] = pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), pa.scalar(None, pa.string()), trimmed)
    if "negative" in picked and picked["negative"].null_count == table.num_rows:
        del picked["negative"]
    if language in table.column_names:
        picked["language"] = pc.fill_null(table[language].cast(pa.string()), "?")
    else:
        picked["language"] = pa.repeat(pa.scalar(language or "?"), table.num_rows)
    usable = pc.and_(pc.is_valid(picked["anchor"]), pc.is_valid(picked["positive"]))
    rows = Rows(pa.table(picked).filter(usable))
    if len(rows) < table.num_rows:
        rows.left_out["without text"] = table.num_rows - len(rows)
    return rows


def join(parts: list[Rows]) -> Rows:
    """The rows of several sources as one set."""
    table = pa.concat_tables([part.table for part in parts], promote_options="default")
    return Rows(table, sum((part.left_out for part in parts), Counter()))


def fingerprint(table: pa.Table) -> str:
    """A hash of every text in order, the same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (role for role in ROLES if role in table.column_names):
        digest.update(f"\x1d{name}".encode())
        for chunk in table[name].chunks:
            digest.update("".join(f"\x1e{text}" if text is not None else "\x1f" for text in chunk.to_pylist()).encode())
    return digest.hexdigest()
