"""Totals of a run over all its resumes: seconds, rows, tokens, peak memory, warnings."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.runs.run import Run
from trainer.system.device import peak_memory_gib
from trainer.system.distributed import is_first, processes
from trainer.training.callbacks.throughput import Throughput, Totals
from trainer.training.callbacks.watchdog import Watchdog
from trainer.training.trainer import SparseTrainer


class RunTotals(TrainerCallback):
    """Adds the training of this process to the totals of earlier ones, in the manifest."""

    def __init__(self, run: Run, throughput: Throughput, watchdog: Watchdog, device: str, start: float) -> None:
        """start: when this process began with the run, in time.perf_counter()."""
        self.run, self.throughput, self.watchdog, self.device = run, throughput, watchdog, device
        self.start, self.known = start, dict(run.manifest)

    def seconds(self) -> float:
        """Seconds of the run until now: data, scoring, evaluation and saving included."""
        return round(self.known.get("total_seconds", 0.0) + time.perf_counter() - self.start, 2)

    @contextlib.contextmanager
    def counting(self, trainer: SparseTrainer) -> Iterator[None]:
        """Count the steps of the block, at every checkpoint and however it ends."""
        completed, self.trainer = False, trainer
        trainer.add_callback(self)
        try:
            yield
            completed = True
        finally:
            # after a failure the other processes are gone, so steps since the last log line are not counted
            self._write(self.throughput.totals(everywhere=completed or processes() == 1))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the totals: a run that is killed goes on from this checkpoint."""
        with self.throughput.paused():
            self._write(self.throughput.totals())

    def _write(self, totals: Totals) -> None:
        known, step = self.known, self.trainer.state.global_step
        if is_first():
            self.trainer.progress.count(step)
        seconds = known.get("train_seconds", 0.0) + totals.seconds
        rows = known.get("rows_trained", 0) + totals.rows
        tokens = known.get("tokens_trained", 0) + totals.tokens
        encoded = known.get("tokens_encoded", 0) + totals.encoded
        padding = known.get("padding_encoded", 0) + totals.padding
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
            steps_done=step,
            datasets=self.trainer.data.manifest(),
        )
