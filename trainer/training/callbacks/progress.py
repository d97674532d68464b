"""How far training and its evaluations have come."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback

from trainer.system.progress_bar import ProgressReport, in_columns


class EvaluationProgress(TrainerCallback):
    """How far the evaluation loss of a set has come."""

    progress: ProgressReport | None = None

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """One batch more."""
        if self.progress is None:
            self.progress = ProgressReport(
                desc=in_columns("evaluating", "loss"), total=len(eval_dataloader), unit="batches"
            )
        self.progress.update()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called once for every set."""
        if self.progress is not None:
            self.progress.close()
        self.progress = None


class ProgressBar(ProgressCallback):
    """The progress bar with the loss behind it; no printed dictionary per log line, no bar per evaluation."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """An evaluation has a bar of ours, if it takes long."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {short(logs['loss'])}")


class ProgressLines(TrainerCallback):
    """A line now and then, where nobody sees a bar move: log files, containers, CI."""

    SECONDS = 10.0

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.echo = echo

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = self.last = time.perf_counter()
        self.first_step = state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """A line if the last one is long ago, or training is at its end."""
        now = time.perf_counter()
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if now - self.last < self.SECONDS and state.global_step < state.max_steps:
            return
        self.last = now
        left = (now - self.start) / max(state.global_step - self.first_step, 1) * (state.max_steps - state.global_step)
        self.echo(f"step {state.global_step:,} of {state.max_steps:,}, loss {short(logs['loss'])}, {left:.0f} s left")


def short(loss: float) -> str:
    """Three decimals, or two digits where these would be zeros."""
    loss = float(loss)
    return f"{loss:.3f}" if loss == 0 or abs(loss) >= 0.01 else f"{loss:.2g}"
