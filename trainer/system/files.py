"""Files that are on the disk when they are said to be, whole or not at all."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, one_line


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Where to write a file, which has its name once it is whole and on the disk: a reader sees the old one or the new."""
    with _aside(file) as aside:
        yield aside
        give_usual_mode(aside)
        flush(aside)
        aside.replace(file)
        flush(file.parent)


def write_atomically(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(file) as aside:
        aside.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ConfigError when it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from None


def write_json(file: Path, values: Any) -> None:
    """Write a file, whole or not at all. Raises ConfigError when it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None


def write_once(file: Path, text: str) -> None:
    """Write a file whole unless it is there: of processes that start together, one does it for all."""
    with _aside(file) as aside:
        aside.write_text(text, encoding="utf-8")
        flush(aside)
        try:
            os.link(aside, file)
        except FileExistsError:
            return
        except OSError:  # a file system without links, where starting together is not guarded against
            if not file.exists():
                aside.replace(file)
        flush(file.parent)


@contextlib.contextmanager
def _aside(file: Path) -> Iterator[Path]:
    # not the pid: two containers or machines that share a folder may have the same
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def give_usual_mode(file: Path) -> None:
    """Let those read a file whom the umask allows it: what safetensors writes, only its owner may read.

    On a file system without modes, the file stays as it is.
    """
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(PermissionError):
        file.chmod(file.stat().st_mode | (0o666 & ~umask))


def flush(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
