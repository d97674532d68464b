"""Texts on their way in: rows of files, with file and line; one form of Unicode; and a word on what was not read."""

import gzip
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config import ConfigError, one_line

# Letters and marks below U+0300 stand in NFC as they are. Looking for others takes 0.4 s in a million texts of 20 words;
# bringing all of them into NFC would take 3 s.
PERHAPS_NOT_NFC = r"[^\x{0}-\x{2FF}]"
VISIBLE = r"[^\p{Z}\p{C}]"
# Names in a line of the plan; more would fill a page.
MOST_NAMES = 6
IDS = ("_id", "id")
COMPOSED = "texts were not in Unicode's form NFC, and are now"
WITHOUT_TEXT = "passages or queries are without text, and stay in the search, where they find nothing"
# Rows of a column that become plain strings at a time, whose bytes must be less than 2 GiB.
ROWS = 2**16


# ------------------------------------------------------------------------------------------- what is said of reading
@dataclass
class Reading:
    """What the plan says of how a source was read: nothing is passed over, and no text changed, in silence."""

    names: dict[str, dict[str, None]] = field(default_factory=dict)  # not read, by kind: columns, splits, files
    counts: Counter[str] = field(default_factory=Counter)  # what else is not read
    notes: Counter[str] = field(default_factory=Counter)  # what is read, but not as it came

    def __add__(self, other: "Reading") -> "Reading":
        total = Reading(dict(self.names), self.counts + other.counts, self.notes + other.notes)
        for kind, names in other.names.items():
            total.pass_over(kind, names)
        return total

    def pass_over(self, kind: str, names: Iterable[str]) -> None:
        """Note what is not read."""
        self.names[kind] = self.names.get(kind, {}) | dict.fromkeys(names)

    def compose(self, text: str) -> str:
        """A text in NFC. Ids never come here: they are keys, and engines compare them byte by byte."""
        if unicodedata.is_normalized("NFC", text):
            return text
        self.notes[COMPOSED] += 1
        return unicodedata.normalize("NFC", text)

    def compose_column(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """The same for a column."""
        chunks = []
        for chunk in values.chunks:
            perhaps = pc.fill_null(pc.match_substring_regex(chunk, PERHAPS_NOT_NFC), False)
            before = chunk.filter(perhaps)
            after = pc.utf8_normalize(before, form="NFC")
            self.notes[COMPOSED] += pc.sum(pc.not_equal(before, after)).as_py() or 0
            chunks.append(pc.replace_with_mask(chunk, perhaps, after))
        return pa.chunked_array(chunks, pa.string())

    def lines(self) -> Iterator[str]:
        """What the plan says; nothing where all is read as it is."""
        parts = [f"{kind} {listed(names)}" for kind, names in self.names.items() if names]
        parts += [f"{count:,} {what}" for what, count in self.counts.items() if count]
        if parts:
            yield f"not read: {'; '.join(parts)}"
        yield from (f"{count:,} {what}" for what, count in self.notes.items() if count)


def have_text(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Which texts have a character that is neither blank nor invisible (zero-width, control, direction), hence tokens."""
    return pc.match_substring_regex(values, VISIBLE)


def listed(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    short = [" ".join(name.split())[:40] for name in names]
    more = f" and {len(short) - MOST_NAMES:,} more" if len(short) > MOST_NAMES else ""
    return ", ".join(short[:MOST_NAMES]) + more


# ------------------------------------------------------------------------------------------- columns of tables
def as_strings(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """A column of any type that Arrow holds text in, as plain strings; None when it holds something else."""
    held = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(held) for is_kind in kinds):
        return None
    pieces = (chunk.slice(start, ROWS) for chunk in values.chunks for start in range(0, len(chunk), ROWS))
    return pa.chunked_array([piece.cast(pa.string()) for piece in pieces], pa.string())


# ------------------------------------------------------------------------------------------- rows of files
def is_json_lines(file: Path) -> bool:
    """Whether a file's name says that it holds lines of JSON, compressed or not."""
    return Path(file.name.removesuffix(".gz")).suffix in (".jsonl", ".json")


def read_rows(file: Path, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each row of a .jsonl[.gz] or .parquet file. Parquet's other columns stand there as None."""
    if is_json_lines(file):
        yield from read_json_lines(file)
    elif file.suffix == ".parquet":
        try:
            opened = pq.ParquetFile(file)
            names = opened.schema_arrow.names
            batches = opened.iter_batches(1000, columns=[name for name in names if name in columns])
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield number, dict.fromkeys(names) | row
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{file}: cannot be read as parquet: {one_line(error)}") from None
    else:
        raise ConfigError(f"{file} is neither .jsonl, .jsonl.gz nor .parquet")


def read_json_lines(file: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of each line; raises ConfigError with file:line."""
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{number}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
            raise ConfigError(f"{file}:{number}: JSON that cannot be read: {one_line(error, 60)}") from None
        if not isinstance(row, dict):
            raise ConfigError(f'{file}:{number}: a line must be an object, {{"column": "text", …}}')
        yield number, row


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a text file, .gz or not, with a byte order mark or without."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{file}: cannot be read: {reason}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:{number}: not text in UTF-8 (byte {error.start}). Save it as UTF-8") from None


def text_of(row: dict, column: str, file: Path, number: int, *, needed: bool = True) -> str | None:
    """A column's text; raises ConfigError when the column is not there or holds something else."""
    if column not in row:
        if not needed:
            return None
        raise ConfigError(f"{file}:{number}: there is no column '{column}'. The line has: {', '.join(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        held = json.dumps(value, default=str)[:40]
        raise ConfigError(f"{file}:{number}: column '{column}' holds {held}, not text")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{file}:{number}: column '{column}' holds half a character (a lone surrogate \\ud800-\\udfff). Remove it"
        ) from None
    return value


def passage_text(title: str | None, text: str) -> str:
    """What of a passage is read: its title in front of its text, as in BEIR."""
    return f"{title or ''} {text}".strip()


def id_of(row: dict, file: Path, number: int) -> tuple[str, str]:
    """The name of the column that holds a row's id, and the id as text: 1 and "1" are the same."""
    name = next((column for column in IDS if row.get(column) is not None), None)
    if name is None:
        raise ConfigError(f"{file}:{number}: there is no '_id'. The row has: {', '.join(row)}")
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return name, str(value)
    if not isinstance(value, str):
        held = json.dumps(value, default=str)[:40]
        raise ConfigError(f"{file}:{number}: '{name}' holds {held}. An id is text or a whole number")
    if not value:
        raise ConfigError(f"{file}:{number}: '{name}' is empty")
    return name, str(text_of(row, name, file, number))
