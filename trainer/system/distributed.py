"""Several processes training one model, as torchrun starts them: how many there are, which is the first, what they share.

The first process alone writes. Every function is a no-op, or the identity, in an ordinary single process.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, one_line

# Longer than the first process ever works alone (a checkpoint, a download), shorter than a night.
TIMEOUT = timedelta(minutes=30)


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def end_with_launcher() -> None:
    """From now on, end this process at once when the launcher that started it has ended, by a kill perhaps.

    It would train on otherwise, seen by nobody, and hold the run's lock against whoever resumes. What it has not saved is
    trained again then, as after any kill.
    """
    if not has_launcher():
        return

    def watch() -> None:
        while not launcher_has_ended():
            time.sleep(0.5)
        if is_first():
            print("Error: the training ends here, for its launcher was ended", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def has_launcher() -> bool:
    """Whether trainer/system/launch.py started this process, as one of several."""
    return "NORDSPARSE_LAUNCHER" in os.environ


def launcher_has_ended() -> bool:
    """Whether this process had a launcher, and has lost it."""
    return os.environ.get("NORDSPARSE_LAUNCHER", str(os.getppid())) != str(os.getppid())


def connect(device: str) -> None:
    """Join the other processes: over gloo, and NCCL for what lies on GPUs, of which each process takes its own."""
    import torch
    from torch import distributed

    if processes() == 1 or distributed.is_initialized():
        return

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
        wait()
    except RuntimeError as error:
        raise ConfigError(
            f"the {processes()} processes cannot reach each other: {one_line(error)}. Say which network interface to use: "
            "GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs"
        ) from None


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Exit with the status the block asks for. One of several connected processes leaves out the interpreter's own end.

    A thread of gloo drops the tensors of a collective after the collective has returned, on a busy machine long after, and
    needs the interpreter for it. If that is ending by then, it ends the thread inside a C++ destructor, which aborts: at
    load 9 two of 40 finished trainings ended with 134. To destroy the group joins its threads only where nothing else
    refers to it, but DDP and the frames of an exception do; and after an error it waits for processes that are gone.
    """
    try:
        yield
    except BaseException as error:
        if processes() == 1:
            raise
        from torch import distributed

        if not distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            status = 1
            sys.excepthook(type(error), error, error.__traceback__)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(status)


def from_first(value: Any) -> Any:
    """The first process's value, in all of them."""
    if processes() == 1:
        return value
    from torch import distributed

    holder = [value]
    distributed.broadcast_object_list(holder)
    return holder[0]


def from_all(value: Any) -> list[Any]:
    """Every process's value, by rank; an empty list in all but the first process."""
    if processes() == 1:
        return [value]
    from torch import distributed

    values: list[Any] | None = [None] * processes() if is_first() else None
    distributed.gather_object(value, values)
    return values or []


def total(*values: float) -> list[float]:
    """The sums of these numbers over all processes."""
    return _reduced(values, "SUM")


def largest(value: int) -> int:
    """The largest of the processes' numbers."""
    return int(_reduced([value], "MAX")[0])


def _reduced(values: Sequence[float], operation: str) -> list[float]:
    if processes() == 1:
        return list(values)
    import torch
    from torch import distributed

    numbers = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(numbers, getattr(distributed.ReduceOp, operation))
    return numbers.tolist()


def share_files(folder: Path) -> None:
    """Write the files that the first process has in this folder into the folder of every other."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()} if processes() > 1 and is_first() else {}
    for name, content in from_first(files).items():
        if not is_first():
            (folder / name).write_bytes(content)


def take_weights_of_first(model: Any) -> None:
    """Set every parameter and buffer to the first process's."""
    if processes() > 1:
        from torch import distributed

        for tensor in model.state_dict().values():
            distributed.broadcast(tensor, 0)


def keep_smallest(tensor: Any) -> None:
    """Set each element to the smallest that any process has there."""
    if processes() > 1:
        from torch import distributed

        distributed.all_reduce(tensor, distributed.ReduceOp.MIN)


def wait() -> None:
    """Return when every process has come here."""
    largest(0)


@contextlib.contextmanager
def first_on_each_machine_first() -> Iterator[None]:
    """Let one process per machine go ahead (it downloads), then the others (they find it in the cache)."""
    ahead = os.environ.get("LOCAL_RANK", "0") == "0"
    if not ahead:
        wait()
    yield
    if ahead:
        wait()


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process of this training has gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return processes() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
