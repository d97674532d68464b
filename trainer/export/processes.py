"""Encodes the shards of a corpus side by side on this machine, one process per shard."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from trainer.config import ConfigError
from trainer.export.export import export
from trainer.export.request import Request
from trainer.system.device import find_device


def count_processes(text: str, echo: Callable[[str], None]) -> int:
    """How many processes `--processes text` stands for on this machine; for `all`, which is said with its reason."""
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    if text != "all":
        raise ConfigError(f"--processes {text}: a number of processes, or `all` for one per CUDA device")
    count = len(cuda_devices())
    echo(f"processes {max(count, 1)} ({f'all: {count} CUDA devices' if count else 'all: no CUDA device here'})")
    return max(count, 1)


def cuda_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    numbers = [str(number) for number in range(torch.cuda.device_count())]
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: len(numbers)] or numbers


def environment_of(number: int, count: int, devices: list[str]) -> dict[str, str]:
    """Process `number`'s: its CUDA device, shared only when there are fewer, and its part of the CPU's threads."""
    threads = str(max((os.cpu_count() or 1) // count, 1))
    device = {"CUDA_VISIBLE_DEVICES": devices[(number - 1) % len(devices)]} if devices else {}
    return {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads} | os.environ | device


def export_in_processes(to: str, request: Request, count: int) -> None:
    """Export a corpus in as many shards, each in a process of its own; in this process where there is one."""
    if count == 1:
        return export(to, request)
    if request.corpus is None or request.shard.of > 1:
        raise ConfigError("--processes takes the corpus apart itself: it needs --corpus, and goes without --shard")
    options = {"to": to, "name": request.run.name}
    options |= {name: getattr(request, name) for name in ("corpus", "queries", "output", "scale", "long_documents")}
    given = (f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None)
    run_shards(["export", str(request.run.folder / "config.yaml"), *given], count, request.echo)


def run_shards(arguments: list[str], count: int, echo: Callable[[str], None]) -> None:
    """Run `python -m trainer <arguments> --shard i/count` for every i at once, each line after its shard's number.

    Raises ConfigError with the line of the first that fails. The others are stopped, and go on from there when run again.
    """
    if find_device("auto")[0] == "mps":
        raise ConfigError("several processes cannot share the GPU of a Mac. Leave out --processes")
    devices, started = cuda_devices(), []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` is reached
    with ThreadPoolExecutor(count) as threads:
        try:
            waiting = []
            for number in range(1, count + 1):
                process = subprocess.Popen(
                    [sys.executable, "-m", "trainer", *arguments, "--shard", f"{number}/{count}"],
                    env=environment_of(number, count, devices),
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                )  # fmt: skip
                started.append(process)
                waiting.append(threads.submit(follow, process, f"{number}/{count}", echo))
            for done in as_completed(waiting):
                done.result()
        finally:  # within the pool, which waits for the threads, and they for the processes
            for process in started:
                process.terminate()


def follow(process: subprocess.Popen, shard: str, echo: Callable[[str], None]) -> None:
    """Echo what a process prints until it ends. Raises ConfigError, with its last line, when it has failed."""
    line = ""
    with process:
        for line in process.stdout or ():
            echo(f"{shard}  {line.rstrip()}")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        memory = ", perhaps because memory ran out: use fewer processes" if name == "SIGKILL" else ""
        raise ConfigError(f"shard {shard} was ended by {name}{memory}")
    if process.returncode:
        raise ConfigError(f"shard {shard}: {line.strip().removeprefix('Error: ')}")
