"""Ctrl-C and SIGTERM: finish the step, save, stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.system.distributed import largest, processes


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM outside the training steps, where there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class EvaluationCut(BaseException):
    """An evaluation was ended by a signal, so that the checkpoint can be saved in time."""


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. Outside the steps, and on a later Ctrl-C, at once.

    A signal often comes twice within milliseconds, from a shell's group and from a program that passes it on: that is
    one wish to stop, not two.
    """

    SAME_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._in_steps = self._evaluating = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _is_in_a_destructor(frame):  # Python would print what is raised there, and go on
            again = threading.Timer(0.05, signal.raise_signal, (number,))
            again.daemon = True
            again.start()
            return
        later = time.monotonic() - self._received_at > self.SAME_SECONDS
        if not self._in_steps or (self.received is not None and later and number == signal.SIGINT):
            raise Interrupted(number)
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            if self._evaluating and processes() == 1:  # several processes evaluate together: they finish together
                raise EvaluationCut

    @contextlib.contextmanager
    def cuts(self) -> Iterator[None]:
        """Let a signal end what is done in here: an evaluation can take longer than a process has before it is killed."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """From here on there is something to save."""
        self._in_steps = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop after the step in which the signal came."""
        # one process may be told alone, or a step later than another: all stop after the same step
        if number := largest(self.received or 0):
            self.received = signal.Signals(number)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """From here on everything is saved."""
        self._in_steps = False


def _is_in_a_destructor(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
