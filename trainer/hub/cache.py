"""What took long to compute and is kept beside the models that were downloaded: HF_HOME/nordsparse, by content."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import ConfigError
from trainer.hub.download import Snapshot
from trainer.system.files import sha256_of, written_whole
from trainer.system.progress_bar import ProgressReport


def digest(*parts: str | None) -> str:
    """A hash of texts, each apart from the next."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(b"\x1f" if part is None else f"\x1e{part}".encode())
    return hasher.hexdigest()


def identity(snapshot: Snapshot) -> str:
    """What a model is told by: its commit, or the content of a local folder's weights and settings."""
    if snapshot.commit:
        return f"{snapshot.source}@{snapshot.commit}"
    kinds = (".json", ".safetensors", ".bin", ".txt")
    files = sorted(file for file in snapshot.folder.rglob("*") if file.suffix in kinds)
    return digest(*(f"{file.relative_to(snapshot.folder)} {sha256_of(file)}" for file in files))


def folder_of(kind: str, key: str = "") -> Path:
    """The folder of one computation, or of all of a kind."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "nordsparse" / kind / key


def cached_table(file: Path, make: Callable[[], pa.Table]) -> pa.Table:
    """The table in a file; made and written when there is none. The file appears whole: a killed run leaves none.

    Raises ConfigError when it cannot be read or written.
    """
    try:
        if file.is_file():
            return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}. Remove it") from None
    table = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as aside:
            pq.write_table(table, aside, compression="zstd")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}. Set HF_HOME") from None
    return table


def cached_tables(
    folder: Path, items: list, size: int, make: Callable[[list], pa.Table], progress: ProgressReport
) -> list[pa.Table]:
    """One table per `size` items, each kept in a file of its own, so that a killed computation goes on where it was."""
    tables = []
    for number, start in enumerate(range(0, len(items), size)):
        part = items[start : start + size]
        tables.append(cached_table(folder / f"part-{number:05d}.parquet", partial(make, part)))
        progress.reach(start + len(part))
    return tables


def cached_vectors(
    folder: Path, items: list, size: int, encode: Callable[[list], np.ndarray], progress: ProgressReport
) -> np.ndarray:
    """Vectors of the items, [items, width], float32; those of each `size` items are kept in a file of their own."""

    def make(part: list) -> pa.Table:
        vectors = encode(part).astype(np.float32)
        return pa.table({"vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])})

    tables = cached_tables(folder, items, size, make, progress)
    chunks = [chunk for table in tables for chunk in table["vector"].chunks]
    return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]).reshape(len(items), -1)
