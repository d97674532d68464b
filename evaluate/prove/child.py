"""A command in a process of its own: output is shown and kept, signals are handed on, time and memory are measured."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a line that names a failure has in it: a task that failed is not the last line of an evaluation.
SIGNS = ("Error: ", "FAILED (", "not done: ")
ROOT = Path(__file__).resolve().parents[2]
LOOK_SECONDS = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `received`: the signal that stopped it on its way through this process."""

    status: int
    seconds: float
    peak_gib: float
    """Most memory of the machine that the process has used, without those that it started."""
    reason: str
    received: int | None = None


def run_child(arguments: Sequence[str], log: Path, echo: Callable[[str], None]) -> Outcome:
    """Run `python -m arguments`. A session of its own: Ctrl-C reaches it once, through here, as SIGTERM does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began, lines = time.perf_counter(), []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("a", encoding="utf-8") as file, _passing_signals() as passed:
        passed.child = child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
        )
        assert child.stdout is not None
        if passed.received:  # while it was being started
            passed.hand_on(passed.received)
        with _watching_memory(child.pid) as memory:
            for line in child.stdout:
                file.write(line)
                file.flush()
                lines.append(line.rstrip("\n"))
                echo(lines[-1])
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
    peak = memory.peak_kib / 2**20 or usage.ru_maxrss / 2**30  # the second: bytes, on macOS
    return Outcome(child.returncode, time.perf_counter() - began, peak, reason_of(lines), passed.received)


def reason_of(lines: Sequence[str]) -> str:
    """The last line that names a failure, or else the last line."""
    said = [line.strip() for line in lines if line.strip()]
    named = [line for line in said if any(sign in line for sign in SIGNS)]
    return (named or said or ["it said nothing"])[-1]


class _Memory:
    """The most memory of a process so far, as Linux tells it.

    Not ru_maxrss: there, Linux counts the memory that this process had when it started the other.
    """

    peak_kib = 0

    def look(self, process: int) -> None:
        """Read it, while the process is there."""
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
            self.peak_kib = max(self.peak_kib, int(found[1]) if found else 0)


@contextlib.contextmanager
def _watching_memory(process: int) -> Iterator[_Memory]:
    """Look every LOOK_SECONDS: the peak is known but for what is used in the last of them."""
    memory, ended = _Memory(), threading.Event()

    def watch() -> None:
        memory.look(process)
        while not ended.wait(LOOK_SECONDS):
            memory.look(process)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


class _Passed:
    """The child, and the last signal that was handed on to it."""

    child: subprocess.Popen | None = None
    received: int | None = None

    def hand_on(self, number: int, frame: Any = None) -> None:
        self.received = number
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    self.child.pid, number
                )  # not send_signal(), which may take the exit status that wait4 waits for


@contextlib.contextmanager
def _passing_signals() -> Iterator[_Passed]:
    """Hand the signals that stop a program on to the child, which ends in order."""
    passed = _Passed()
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's stay ignored
    before = {number: signal.signal(number, passed.hand_on) for number in heeded}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
