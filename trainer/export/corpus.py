"""Streams a corpus in: JSONL or parquet of any size, one shard of it, from where an earlier run stopped."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.beir import passage_text, read_json_lines, text_of
from trainer.config import ConfigError

IDS, TEXTS = ("_id", "id"), ("text", "contents")
# OpenSearch and Elasticsearch take no longer ones.
MAX_ID_BYTES = 512


@dataclass(frozen=True)
class Passage:
    """A document to index, or a query."""

    id: str
    text: str


@dataclass(frozen=True)
class Shard:
    """Every `of`-th passage, from number `number` on: shards of one corpus can be encoded on different machines."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `2/8`."""
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"--shard {text}: write it as number/of, from 1/8 to 8/8 for eight shards")
        return cls(int(match[1]), int(match[2]))

    def of_passages(self, passages: Iterable[Passage]) -> Iterator[Passage]:
        """This shard's passages."""
        return islice(passages, self.number - 1, None, self.of)


def read_passages(file: Path) -> Iterator[Passage]:
    """Passages of a .jsonl or .parquet file, one after the other: `_id` or `id`, `text` or `contents`, perhaps `title`."""
    for number, row in _rows(file):
        name = next((column for column in IDS if column in row), None)
        if name is None or row[name] is None:
            raise ConfigError(f"{file}:{number}: there is no '_id'. The row has: {', '.join(row)}")
        column = next((column for column in TEXTS if column in row), TEXTS[0])
        title = text_of(row, "title", file, number, needed=False)
        found = Passage(str(row[name]), passage_text(title, text_of(row, column, file, number) or ""))
        if not 0 < len(found.id.encode()) <= MAX_ID_BYTES:
            raise ConfigError(f"{file}:{number}: '{name}' is empty or longer than {MAX_ID_BYTES} bytes")
        yield found


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix == ".parquet":
        try:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    elif file.suffix in (".jsonl", ".json"):
        yield from read_json_lines(file)
    else:
        raise ConfigError(f"{file} is neither .jsonl nor .parquet")


def describe(file: Path) -> dict[str, Any]:
    """What tells a corpus from another without reading all of it: name, size, and a hash of both ends."""
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            digest = hashlib.sha256(data.read(2**20))
            data.seek(max(0, size - 2**20))
            digest.update(data.read())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    return {"name": file.name, "bytes": size, "sha256_of_both_ends": digest.hexdigest()}


def chunks(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    """Lists of `size` passages; the last may be shorter."""
    passages = iter(passages)
    while chunk := list(islice(passages, size)):
        yield chunk
