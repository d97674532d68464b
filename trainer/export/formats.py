"""What the formats of an export share: names for dimensions, rounding, and the files that records are written to."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from trainer.config import ConfigError
from trainer.export.check import Rounding
from trainer.export.corpus import chunks
from trainer.export.request import Request
from trainer.export.vectors import Encoder, Vector, require_distinct


class Store(Protocol):
    """Where the records of documents, or of queries, are written one after the other."""

    def recover(self) -> int:
        """Remove what a killed run left incomplete; the number of complete records."""

    def append(self, records: Iterable[Any]) -> None:
        """Add records. Raises ConfigError when the disk is full or gone."""

    def close(self) -> None:
        """Have everything in its place."""

    def first(self, count: int) -> list[Any]:
        """The first records, fewer if there are no more."""

    def paths(self) -> list[Path]:
        """Its files."""


class Format:
    """How one engine takes sparse vectors. `quantisation` says in words what the two roundings say in numbers."""

    suffix: ClassVar[str] = ".jsonl"
    lines_per_document: ClassVar[int] = 1
    signed: ClassVar[bool] = False  # whether the engine takes weights below 0, which a trained query word may have
    beside: ClassVar[tuple[str, ...]] = ()  # names of what write_beside makes
    scales: ClassVar[tuple[int, ...]] = ()  # what to try for whole numbers; none where weights are floating-point
    engine_rounds: ClassVar[bool] = False  # whether the precision is the engine's own, and not ours to choose
    document_rounding = query_rounding = Rounding()
    quantisation: str = "float32"
    remedy: str = ""  # what to do when quantisation changes a top 10

    def __init__(self, scale: int | None = None) -> None:
        """Scale is that of whole numbers."""

    def terms(self, tokens: list[str]) -> list[str]:
        """What dimensions are called in this engine; the tokens themselves where it takes every character."""
        return require_distinct(tokens)

    def document(self, name: str, text: str, vector: Vector) -> Any:
        """A document's record."""
        raise NotImplementedError

    def read_document(self, record: Any) -> tuple[str, Vector]:
        """A document's id, and its vector as the engine will hold it."""
        raise NotImplementedError

    def query(self, name: str, text: str, vector: Vector) -> Any:
        """A query's record; as a document's where the engine has no other form for it."""
        return self.document(name, text, vector)

    def read_query(self, record: Any) -> Vector:
        """A query's vector as the engine will use it."""
        return self.read_document(record)[1]

    def documents_at(self, stem: Path) -> Store:
        """Where documents are written."""
        return LineFile(stem.with_name(stem.name + self.suffix), self.lines_per_document)

    def queries_at(self, stem: Path) -> Store:
        """Where queries are written."""
        return LineFile(stem.with_name(f"{stem.name}.jsonl"))

    def write_beside(self, folder: Path, encoder: Encoder, request: Request) -> None:
        """Mappings and the like."""


class NumberedFormat(Format):
    """A format whose dimensions are numbers, and that takes weights below 0."""

    signed = True

    def terms(self, tokens: list[str]) -> list[str]:
        """The dimensions' numbers."""
        return [str(number) for number in range(len(tokens))]


def json_line(values: Any) -> str:
    """One line of JSON, in which letters stay as they are."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def sorted_by_number(vector: Vector) -> dict[str, list]:
    """A vector as two lists, in ascending order of its dimensions."""
    pairs = sorted((int(term), weight) for term, weight in vector.items())
    return {"indices": [number for number, _ in pairs], "values": [weight for _, weight in pairs]}


def by_term(row: dict[str, list]) -> Vector:
    """A vector out of two such lists."""
    return dict(zip(map(str, row["indices"]), row["values"], strict=True))


class LineFile:
    """A text file, of which each record is one line or several."""

    def __init__(self, file: Path, lines_per_record: int = 1) -> None:
        self.file = file
        self.lines_per_record = lines_per_record

    def recover(self) -> int:
        """Cut off what a killed run left incomplete; the number of complete records."""
        if not self.file.exists():
            return 0
        lines = offset = whole = 0
        with self.file.open("r+b") as data:
            for line in data:
                if not line.endswith(b"\n"):
                    break
                lines, offset = lines + 1, offset + len(line)
                if lines % self.lines_per_record == 0:
                    whole = offset
            data.truncate(whole)
        return lines // self.lines_per_record

    def append(self, records: Iterable[str]) -> None:
        """Add records. Raises ConfigError when the disk is full or gone."""
        try:
            with self.file.open("a", encoding="utf-8") as out:
                out.write("".join(records))
        except OSError as error:
            raise full(self.file, error) from None

    def close(self) -> None:
        """There is nothing to do: what is appended is in its place."""

    def first(self, count: int) -> list[str]:
        """The first records; not by splitlines, for a text may hold other line separators."""
        with self.file.open(encoding="utf-8") as lines:
            return ["".join(record) for record in islice(chunks(lines, self.lines_per_record), count)]

    def __str__(self) -> str:
        return str(self.file)

    def paths(self) -> list[Path]:
        """The file, if it is there."""
        return [self.file] if self.file.exists() else []


def full(file: Path, error: OSError) -> ConfigError:
    """What to say when a file of documents cannot be written any further."""
    return ConfigError(f"{file} cannot be written: {error.strerror or error}. To go on from there, run this again")
