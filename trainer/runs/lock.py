"""One training at a time in a run folder: the first holds a lock, a second is told who holds it and since when."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config import ConfigError
from trainer.runs.run import cannot_be_written
from trainer.system.durations import duration

NAME = ".lock"
NOT_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_one_in(folder: Path, echo: Callable[[str], None], doing: str = "trained") -> Iterator[None]:
    """Hold the folder's lock. Raises ConfigError, one line with the owner and its age, when another process holds it.

    The lock is the kernel's (fcntl, POSIX): it ends with its process, even by SIGKILL, so none is ever stale; it holds
    between containers, whose pids and host names say nothing to each other, and over NFS. Not flock(), which a loader
    worker inherits and keeps for up to 5 s after its parent was killed. What stands in the file is for people. The file
    stays: removing it would let a third process lock a new one while a second waits with the old.
    """
    handle = _open(folder)
    try:
        if _lock(handle, folder, echo, doing) and (left := _owner(handle)):
            echo(f"lock      {folder} was left by {left}, which ended without a word: taken over")
        _write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        try:
            yield
        finally:
            _write(handle, "")  # after an error too, but not after a kill: then the next owner says so
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def _lock(handle: int, folder: Path, echo: Callable[[str], None], doing: str) -> bool:
    """Whether the lock is ours now; False where the file system has none."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
        raise ConfigError(f"{folder} is being {doing} by {_owner(handle)}. Stop it first, or wait") from None
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    echo(f"Warning: {folder} is on a file system without locks: a second process in it would not be noticed")
    return False


def _owner(handle: int) -> str | None:
    """Who wrote the file, and how long ago; None when its last owner ended in order."""
    text = os.pread(handle, 1000, 0)
    if not text:
        return None
    try:
        owner = json.loads(text)
        age = duration(max(time.time() - owner["since"], 0.0))  # a clock may have been set back
        return f"process {owner['pid']} on {owner['host']}, for {age}"
    except (ValueError, KeyError, TypeError):
        return "a process that did not say which"


def _write(handle: int, text: str) -> None:
    """Set the whole content. A full disk does not matter: the lock is the kernel's."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
