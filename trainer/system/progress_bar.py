"""What a command says while it works: lines in columns, and how far something long has come.

A bar on a terminal, lines elsewhere, nothing in the first seconds. Of several processes that train, the first speaks.
"""

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

from trainer.system.distributed import is_first
from trainer.system.durations import rough_duration

# What takes fewer seconds is done in silence.
SILENT = 5.0
# Seconds between two lines, and between two looks at the clock where nothing is counted.
LINES_EVERY, LOOK_EVERY = 10.0, 1.0
MEGABYTE = 10**6


def in_columns(label: str, text: str, width: int = 10) -> str:
    """A line whose text stands in column `width`, or two blanks behind a longer label."""
    return f"{label:<{width - 2}}  {text}"


class ProgressReport(tqdm):
    """tqdm's bar on a terminal, and a line now and then where nobody sees a bar move: log files, containers, CI."""

    monitor_interval = 0  # no thread of tqdm's own: loader workers are forked
    next_line = 0.0

    def __init__(self, *args: Any, disable: bool = False, **options: Any) -> None:
        self.is_bar = sys.stderr.isatty()
        options |= {"delay": SILENT, "leave": False, "miniters": 0, "mininterval": 0.1 if self.is_bar else LOOK_EVERY}
        options |= {"file": sys.stderr if self.is_bar else io.StringIO(), "dynamic_ncols": self.is_bar}
        super().__init__(*args, disable=disable or not is_first(), **options)

    def reach(self, count: int) -> None:
        """Move on to so many, where fewer were counted."""
        self.update(max(count - self.n, 0))

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """tqdm's call, which does not always heed the delay."""
        now = self._time()
        if now - self.start_t < SILENT:
            return False
        if self.is_bar:
            return super().display(msg, pos)
        if msg is None and now >= self.next_line:
            self.next_line = now + LINES_EVERY
            click.echo(self.line())
        return True

    def line(self) -> str:
        """How far it has come, in words."""
        seconds, made = self._time() - self.start_t, self.n - self.initial
        if not made:
            return f"{self.desc}: {rough_duration(seconds)} so far"
        scale, unit = (MEGABYTE, "MB") if self.unit == "B" else (1, self.unit)
        if self.total:
            left = rough_duration(seconds / made * max(self.total - self.n, 0))
            return f"{self.desc}: {self.n / scale:,.0f} of {self.total / scale:,.0f} {unit}, {left} left"
        return f"{self.desc}: {self.n / scale:,.0f} {unit}, {made / scale / seconds:,.1f} per second"


@contextmanager
def going_on(what: str, total: int | None = None, unit: str = "it") -> Iterator[ProgressReport]:
    """ProgressReport that is shown though nothing, or nothing for long, is counted."""
    with ProgressReport(
        desc=what, total=total, unit=unit, bar_format=None if total else "{desc}: {elapsed}"
    ) as progress:
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(LOOK_EVERY):
                progress.update(0)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            ended.set()
            thread.join()


@contextmanager
def encoding(module: Any, what: str, total: int, unit: str = "texts", share: float = 1) -> Iterator[ProgressReport]:
    """ProgressReport that moves on by `share` with each text that goes through a network's first module."""
    with ProgressReport(desc=what, total=total, unit=unit) as progress:

        def count(_: Any, inputs: tuple[dict[str, Any], ...]) -> None:
            packed = inputs[0].get("cu_seq_lens_q")
            texts = len(inputs[0]["input_ids"]) if packed is None else len(packed) - 1
            progress.update(texts * share)

        handle = module.register_forward_pre_hook(count)
        try:
            yield progress
        finally:
            handle.remove()
