"""Streams a corpus in: JSONL or parquet of any size, one shard of it, from where an earlier run stopped."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trainer.config import ConfigError
from trainer.data.beir import read_records, unique
from trainer.data.texts import Reading
from trainer.system.progress_bar import ProgressReport, in_columns

T = TypeVar("T")

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


def read_passages(file: Path, reading: Reading | None = None) -> Iterator[Passage]:
    """Passages of a .jsonl or .parquet file, one after the other: `_id` or `id`, `text` or `contents`, perhaps `title`."""
    for record in read_records(file, Reading() if reading is None else reading):
        if len(record.id.encode()) > MAX_ID_BYTES:
            raise ConfigError(f"{file}:{record.number}: engines refuse ids longer than {MAX_ID_BYTES} bytes")
        yield Passage(record.id, record.passage)


def survey(file: Path) -> Reading:
    """Read a corpus to its end, before hours of encoding. ConfigError for what is wrong, as an id that is there twice.

    8 bytes are kept of each document, the hash of its id. Documents of equal hashes are looked at again.
    """
    reading = Reading()
    what = in_columns("reading", file.name)
    with ProgressReport(read_passages(file, reading), desc=what, unit="documents") as passages:
        hashes = np.sort(np.fromiter((hash(passage.id) for passage in passages), np.int64))
    perhaps = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if perhaps:
        for _ in unique((record for record in read_records(file, Reading()) if hash(record.id) in perhaps), file):
            pass
    return reading


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


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk
