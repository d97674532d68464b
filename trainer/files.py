"""Files that are on the disk when they are said to be, whole or not at all."""

import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write a file aside and put it in its place: a reader sees the old text or the new, never half of one."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, file)
        flush(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
