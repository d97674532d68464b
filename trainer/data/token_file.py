"""Token ids of many texts in one Arrow file, memory-mapped, with a checksum of each part."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.system.files import written_whole

# Texts per part, all but the last. A part is what is tokenised, written and checked at a time.
TEXTS_PER_PART = 10_000


class TokenFile:
    """Token ids of numbered texts, in parts of TEXTS_PER_PART texts; a table in memory, or mapped from a file."""

    def __init__(self, table: pa.Table, path: Path | None = None) -> None:
        self.table, self.path = table, path
        self.parts = [(part.offsets.to_numpy(), part.values.to_numpy()) for part in table["ids"].chunks]

    @classmethod
    def open(cls, path: Path) -> "TokenFile":
        """Map a file that `write` made. Raises OSError or pa.ArrowException when it is damaged."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = []
        for number in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(number)
            if not metadata or metadata.get(b"crc32") != _checksum(batch):
                raise pa.ArrowInvalid("its checksum differs")
            batches.append(batch)
        return cls(pa.Table.from_batches(batches, reader.schema), path)

    @classmethod
    def write(cls, path: Path, ids_type: pa.DataType, parts: Iterator[pa.Array]) -> "TokenFile":
        """Store parts, each but the last of TEXTS_PER_PART texts. The file gets its name when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = pa.schema({"ids": pa.list_(ids_type)})
        with written_whole(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for part in parts:
                batch = pa.record_batch([part], schema=schema)
                writer.write_batch(batch, custom_metadata={"crc32": _checksum(batch)})
        return cls.open(path)

    def __reduce__(self) -> tuple:
        """A loader worker that is started anew (not forked) maps the same file."""
        return (TokenFile.open, (self.path,)) if self.path else (TokenFile, (self.table,))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> np.ndarray:
        """Token ids of a text, special tokens included, [length]."""
        offsets, values = self.parts[number // TEXTS_PER_PART]
        place = number % TEXTS_PER_PART
        return values[offsets[place] : offsets[place + 1]]

    def lengths(self) -> np.ndarray:
        """Tokens of each text, [texts]."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *(np.diff(offsets) for offsets, _ in self.parts)])


def _checksum(batch: pa.RecordBatch) -> bytes:
    ids = batch["ids"]
    return f"{zlib.crc32(ids.values.to_numpy(), zlib.crc32(ids.offsets.to_numpy())):08x}".encode()
