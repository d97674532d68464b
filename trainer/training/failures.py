"""What can go wrong in a training that is not our bug, as one line that says how to continue."""

import contextlib
import errno
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import click

from trainer.config import ConfigError
from trainer.runs.run import Run
from trainer.system.distributed import is_first, wait
from trainer.training.callbacks.non_finite_loss import NonFiniteLoss


class Stopped(Exception):
    """Training was asked to stop, and did, with a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.signal_number = step, signal_number


@contextlib.contextmanager
def one_line_per_failure(run: Run, resume_command: str, rate: float) -> Iterator[None]:
    """Record in the manifest how the training in the block ended, and turn what can go wrong into one line each.

    resume_command: continues the run. rate: the learning rate. Raises ConfigError; exits after a signal.
    """

    def record(status: str, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # a full disk: the error itself matters more than its record
            run.update(status=status, error=str(error)[:500])

    def interrupt(interrupted: BaseException) -> NoReturn:
        record("interrupted", interrupted)
        if is_first():
            click.echo(f"Interrupted; nothing saved is lost. To go on: {resume_command}", err=True)
        sys.exit(128 + getattr(interrupted, "number", signal.SIGINT))

    try:
        yield
    except Stopped as stopped:
        record("stopped", stopped)
        if is_first():
            saved = "everything up to it is saved"
            click.echo(f"Stopped at step {stopped.step}; {saved}. To go on: {resume_command}", err=True)
        wait()  # a launcher stops all processes when one ends
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt as interrupted:
        interrupt(interrupted)
    except NonFiniteLoss as error:
        record("failed", error)
        option = "SET=" if resume_command.startswith("make") else "--set "
        raise ConfigError(
            f"{error}. The last checkpoint is as good as it was. Go on from it with a rate lower than {rate:g}: "
            f"{resume_command} {option}training.learning_rate={rate / 10:g}"
        ) from None
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what broke while the interrupt was on its way out
            interrupt(error.__context__)
        if not (isinstance(error, ConfigError) and run.take_back()):
            record("failed", error)
        if lost_loader_worker(error):
            raise ConfigError(
                "a loader worker was ended by the system: by hand, or because memory ran out (then lower "
                f"training.dataloader_num_workers). Nothing saved is lost. To go on: {resume_command}"
            ) from None
        if isinstance(error, ConfigError) or not is_disk_full(error, run.folder):
            raise
        raise ConfigError(
            f"the disk is full under {run.folder}. Free some space, then go on: {resume_command}"
        ) from None


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error, or one it came from, says that the disk is full.

    torch.save and safetensors do not pass the system's error on; then a disk without a free megabyte is the evidence.
    """
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        if any(words in str(error) for words in ("inline_container", "iostream error", "I/O error")):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(folder).free < 2**20


def lost_loader_worker(error: BaseException | None) -> bool:
    """Whether an error says that a process which reads batches ahead was killed; torch has no type of its own for it."""
    return isinstance(error, RuntimeError) and re.match(r"DataLoader worker \(pid.*\)", str(error)) is not None


def expect_lost_workers() -> None:
    """No stack for a killed loader worker where Python cannot raise it.

    torch raises it in a signal handler, wherever the program happens to be; in the middle of a fork Python can only print
    it. The loader raises it again at its next batch, and then it is one line.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not lost_loader_worker(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
