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
# What a role's texts are to a search, and so which prompt stands in front of them.
SIDES = {"anchor": "query", "positive": "document", "negative": "document"}
LABEL = "label"  # a teacher's scores of a row; what the library takes for labels, and hands to the loss
# Twice the languages of the largest set here; more are no languages, and would fill the plan with a line of any length.
MOST_LANGUAGES = 12
# A text with a character that is neither blank nor invisible (zero-width, control, direction): others have no tokens.
VISIBLE = r"[^\p{Z}\p{C}]"
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
        """Rows per language, the most frequent first; a column that holds something else is told by its many values."""
        counts = pc.value_counts(self.table["language"]).to_pylist()
        found = Counter({row["values"]: row["counts"] for row in counts}).most_common()
        rest = {f"{len(found) - MOST_LANGUAGES:,} others": sum(count for _, count in found[MOST_LANGUAGES:])}
        return dict(found[:MOST_LANGUAGES]) | (rest if len(found) > MOST_LANGUAGES else {})

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
        _require_utf8(values, f"{where}: column '{column}'")
        # stops at the first such character, so a long text costs no more than a short one
        is_text = pc.match_substring_regex(values, VISIBLE)
        picked[role] = pc.if_else(is_text, pc.utf8_trim_whitespace(values), pa.scalar(None, pa.string()))
    if "negative" in picked and picked["negative"].null_count == table.num_rows:
        del picked["negative"]
    if language in table.column_names:
        picked["language"] = _language_tags(table[language], f"{where}: column '{language}'")
    else:
        picked["language"] = pa.repeat(pa.scalar(language or "?"), table.num_rows)
    usable = pc.and_(pc.is_valid(picked["anchor"]), pc.is_valid(picked["positive"]))
    rows = Rows(pa.table(picked).filter(usable))
    if len(rows) < table.num_rows:
        rows.left_out["without text"] = table.num_rows - len(rows)
    return rows


def _require_utf8(values: pa.ChunkedArray | pa.Array, column: str) -> None:
    """Raise ConfigError with the number of rows that are not text: parquet files are read without a look at it."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        wrong = sum(not _is_utf8(value) for value in values.cast(pa.binary()).to_pylist())
        raise ConfigError(
            f"{column} holds bytes that are no text in UTF-8, in {wrong:,} of {len(values):,} rows"
        ) from None


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


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
    return Rows(table, sum((part.left_out for part in parts), Counter()))


def fingerprint(table: pa.Table) -> str:
    """A hash of every text in order, the same on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (role for role in ROLES if role in table.column_names):
        digest.update(f"\x1d{name}".encode())
        for chunk in table[name].chunks:
            digest.update("".join(f"\x1e{text}" if text is not None else "\x1f" for text in chunk.to_pylist()).encode())
    return digest.hexdigest()
