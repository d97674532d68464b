"""Parquet: vectors for whatever reads columns, as lists of dimensions and weights, with the vocabulary beside them."""

from collections.abc import Iterable
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.export.formats import NumberedFormat, Store, by_term, full, sorted_by_number
from trainer.export.request import Request
from trainer.export.vectors import Encoder, Vector
from trainer.system.files import flush

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("indices", pa.list_(pa.int32()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
    ]
)
# Records in a file, which are what a kill can lose: a multiple of those encoded at once, so that a resumed shard is the
# same byte for byte. Weights in a row group, which are what is in memory: 8 MiB.
PART, ROW_GROUP_WEIGHTS = 8192, 2**20


class Parquet(NumberedFormat):
    """id, indices in ascending order, values; no text, which the corpus has."""

    suffix = ".parquet"
    beside = ("vocabulary.parquet",)

    def document(self, name: str, text: str, vector: Vector) -> dict[str, Any]:
        """A row."""
        return {"id": name} | sorted_by_number(vector)

    def read_document(self, record: dict[str, Any]) -> tuple[str, Vector]:
        """Out of a row."""
        return record["id"], by_term(record)

    def documents_at(self, stem: Path) -> Store:
        """Parts."""
        return ParquetParts(stem)

    queries_at = documents_at

    def write_beside(self, folder: Path, encoder: Encoder, request: Request) -> None:
        """vocabulary.parquet: what each dimension is called."""
        numbers = pa.array(range(len(encoder.terms)), pa.int32())
        pq.write_table(pa.table({"index": numbers, "token": encoder.terms}), folder / "vocabulary.parquet")


class ParquetParts:
    """Files of PART records each, `<stem>-00001.parquet` and so on.

    A part is written under another name, flushed, and renamed when it is complete; one without a footer is written again.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.number, self.rows, self.weights = 1, 0, 0
        self.waiting: list[pa.Table] = []
        self.writer: pq.ParquetWriter | None = None

    def __str__(self) -> str:
        return f"{self.stem}-*.parquet"

    def part(self, number: int) -> Path:
        """Where a part is."""
        return self.stem.with_name(f"{self.stem.name}-{number:05d}.parquet")

    def recover(self) -> int:
        """Remove what follows the first parts without a gap; the number of rows in these."""
        rows = 0
        for self.number in count(1):
            rows_in_part = rows_of(self.part(self.number))
            if rows_in_part is None:
                break
            rows += rows_in_part
        complete = [self.part(number) for number in range(1, self.number)]
        for file in self.stem.parent.glob(f"{self.stem.name}-*.parquet*"):
            if file not in complete and not file.name.endswith(".refused"):
                file.unlink()
        return rows

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add rows; a part that is full is closed. Raises ConfigError when the disk is full or gone."""
        table = pa.Table.from_pylist(list(records), SCHEMA)
        while len(table):
            piece, table = table.slice(0, PART - self.rows), table.slice(PART - self.rows)
            self.waiting.append(piece)
            self.rows += len(piece)
            self.weights += pc.sum(pc.list_value_length(piece["indices"])).as_py()
            if self.weights >= ROW_GROUP_WEIGHTS:
                self._write_row_group()
            if self.rows == PART:
                self.close()

    def close(self) -> None:
        """Close the part that is being written, if any."""
        if not self.rows:
            return
        self._write_row_group()
        assert self.writer is not None
        unfinished = self._unfinished()
        try:
            self.writer.close()
            flush(unfinished)
            unfinished.replace(self.part(self.number))
            flush(self.stem.parent)
        except OSError as error:
            raise full(unfinished, error) from None
        self.number, self.rows, self.writer = self.number + 1, 0, None

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first rows, a row group at a time; every page's checksum is compared."""
        batches = (
            batch
            for file in self.paths()
            for batch in pq.ParquetFile(file, page_checksum_verification=True).iter_batches(batch_size=256)
        )
        return list(islice((row for batch in batches for row in batch.to_pylist()), count))

    def paths(self) -> list[Path]:
        """The parts."""
        return sorted(self.stem.parent.glob(f"{self.stem.name}-?????.parquet"))

    def _unfinished(self) -> Path:
        return self.part(self.number).with_suffix(".parquet.unfinished")

    def _write_row_group(self) -> None:
        try:
            if self.writer is None:
                self.writer = pq.ParquetWriter(self._unfinished(), SCHEMA, compression="zstd", write_page_checksum=True)
            if self.waiting:
                self.writer.write_table(pa.concat_tables(self.waiting))
        except OSError as error:
            raise full(self._unfinished(), error) from None
        self.waiting, self.weights = [], 0


def rows_of(file: Path) -> int | None:
    """How many rows a part has; None for one that is not there, is torn or is something else."""
    try:
        part = pq.ParquetFile(file)
    except (OSError, pa.ArrowException):
        return None
    return part.metadata.num_rows if part.schema_arrow.equals(SCHEMA) else None
