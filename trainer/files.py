"""Files that are on the disk when they are said to be, whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write a file aside and put it in its place: a reader sees the old text or the new, never half of one."""
    with _written_aside(file, text) as aside:
        os.replace(aside, file)
        flush(file.parent)


def write_once(file: Path, text: str) -> None:
    """Write a file whole unless it is there: of processes that start together, one does it for all."""
    with _written_aside(file, text) as aside:
        try:
            os.link(aside, file)
        except FileExistsError:
            return
        except OSError:  # a file system without links, where starting together is not guarded against
            if not file.exists():
                os.replace(aside, file)
        flush(file.parent)


@contextlib.contextmanager
def _written_aside(file: Path, text: str) -> Iterator[Path]:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
