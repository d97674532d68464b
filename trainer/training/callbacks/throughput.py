"""Rows and tokens per second, and the seconds that steps took."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.data.further_queries import ROWS
from trainer.data.tokens import VECTOR
from trainer.system.distributed import total


@dataclass(frozen=True)
class Totals:
    """Rows and tokens of all processes, those of the tokens that went through a network, padding, and seconds."""

    rows: int
    tokens: int
    encoded: int
    padding: int
    seconds: float


class Throughput:
    """Rows and tokens that went through the model in all processes, padding with them, and the seconds it took: in the
    current interval, and in all.

    `restart` and `read` are called by every process at the same steps.
    """

    def __init__(self, static_routes: Collection[str] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        """static_routes: tasks whose texts do not go through the network, where padding costs nothing."""
        self.static_routes, self.clock = static_routes, clock
        self.before = Totals(0, 0, 0, 0, 0.0)  # of the intervals before this one
        self.seconds = 0.0
        self.since: float | None = None  # the clock stands still until `restart`
        self.rows = self.positions = 0
        self.tokens: list[int | Tensor] = []
        self.encoded: list[int | Tensor] = []

    def restart(self) -> None:
        """Count what was seen towards the totals, and start a new interval."""
        self.before = self.totals()
        self.rows, self.positions, self.tokens, self.encoded = 0, 0, [], []
        self.seconds, self.since = 0.0, self.clock()

    def totals(self, everywhere: bool = True) -> Totals:
        """What was seen so far. everywhere: with the current interval, for which every process has to ask."""
        before = self.before
        if not everywhere:
            return before
        rows, tokens, encoded, positions = self._seen()
        return Totals(
            before.rows + rows,
            before.tokens + tokens,
            before.encoded + encoded,
            before.padding + positions - encoded,
            before.seconds + self.elapsed(),
        )

    def elapsed(self) -> float:
        """Seconds of the current interval."""
        return self.seconds + (0.0 if self.since is None else self.clock() - self.since)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here, evaluating or saving, takes no time of the steps."""
        was_running = self.since is not None
        self.seconds, self.since = self.elapsed(), None
        try:
            yield
        finally:
            self.since = self.clock() if was_running else None

    def _seen(self) -> tuple[int, int, int, int]:
        tokens, encoded = (int(sum(counts)) for counts in (self.tokens, self.encoded))
        rows, tokens, encoded, positions = map(int, total(self.rows, tokens, encoded, self.positions))
        return rows, tokens, encoded, positions

    def add(self, features: list[dict[str, Any]]) -> None:
        """The columns of one batch, with their attention masks [rows, length], or packed: with where each text begins.

        Columns of vectors [rows, width] have no tokens.
        """
        first = features[0]
        if "input_ids" not in first:
            self.rows += len(first[VECTOR])
            return
        texts = len(first["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in first else len(first["input_ids"])
        self.rows += first.get(ROWS, texts)
        for column in features:
            # the sums stay on the device: reading them here would wait for the GPU at every step
            positions = column["input_ids"].numel()
            count = column["attention_mask"].sum() if "attention_mask" in column else positions
            self.tokens.append(count)
            if column.get("task") not in self.static_routes:
                self.encoded.append(count)
                self.positions += positions

    def read(self) -> dict[str, float]:
        """Rows (samples) and tokens per second of the current interval, and which share of the positions was padding."""
        seconds = self.elapsed()
        rows, tokens, encoded, positions = self._seen()
        return {
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - encoded / positions if positions else 0.0,
        }
