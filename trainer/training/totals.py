"""Totals of a run over all its resumes: seconds, rows, tokens, peak memory, warnings."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from trainer.runs.run import Run
from trainer.system.device import peak_memory_gib
from trainer.system.distributed import is_first, processes
from trainer.training.callbacks.throughput import Throughput
from trainer.training.callbacks.watchdog import Watchdog
from trainer.training.trainer import SparseTrainer


class RunTotals:
    """Adds the training of this process to the totals of earlier ones, in the manifest."""

    def __init__(self, run: Run, throughput: Throughput, watchdog: Watchdog, device: str, start: float) -> None:
        """start: when this process began with the run, in time.perf_counter()."""
        self.run, self.throughput, self.watchdog, self.device = run, throughput, watchdog, device
        self.start, self.seconds_before = start, run.manifest.get("total_seconds", 0.0)

    def seconds(self) -> float:
        """Seconds of the run until now: data, scoring, evaluation and saving included."""
        return round(self.seconds_before + time.perf_counter() - self.start, 2)

    @contextlib.contextmanager
    def counting(self, trainer: SparseTrainer) -> Iterator[None]:
        """Count the steps of the block, however it ends."""
        completed = False
        try:
            yield
            completed = True
        finally:
            if is_first():
                trainer.progress.count(trainer.state.global_step)
            self._write(completed, steps_done=trainer.state.global_step, datasets=trainer.data.manifest())

    def _write(self, completed: bool, **values: Any) -> None:
        """After a failure the other processes are gone, so steps since the last log line are not counted."""
        throughput, known = self.throughput, self.run.manifest
        if completed or processes() == 1:
            throughput.add_to_totals()
        seconds = known.get("train_seconds", 0.0) + throughput.total_seconds
        rows = known.get("rows_trained", 0) + throughput.total_rows
        tokens = known.get("tokens_trained", 0) + throughput.total_tokens
        encoded = known.get("tokens_encoded", 0) + throughput.total_encoded
        padding = known.get("padding_encoded", 0) + throughput.total_padding
        self.run.update(
            train_seconds=round(seconds, 2),
            total_seconds=self.seconds(),
            rows_trained=rows,
            tokens_trained=tokens,
            tokens_encoded=encoded,
            padding_encoded=padding,
            padding_share=round(padding / max(encoded + padding, 1), 4),
            samples_per_second=round(rows / seconds, 2) if seconds else 0.0,
            tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
            peak_memory_gib=round(max(known.get("peak_memory_gib", 0.0), peak_memory_gib(self.device)), 3),
            warnings=known.get("warnings", []) + self.watchdog.warnings,
            **values,
        )
