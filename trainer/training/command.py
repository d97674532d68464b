"""The command `train`: opens the run's folder, alone or together with other processes, and trains in it.

Heavy imports are inside the functions: a run that is refused is refused at once.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from trainer.config import ConfigError, LoadedConfig, load_config
from trainer.runs.lock import only_one_in
from trainer.runs.run import MODELS, Run
from trainer.system.distributed import (
    connect,
    end_with_launcher,
    from_first,
    is_first,
    launcher_has_ended,
    lost_another,
    processes,
    processes_here,
)
from trainer.system.libraries import set_up_libraries
from trainer.training.failures import expect_lost_workers, one_line_per_failure

# How long a process waits to be ended, by the launcher or for want of one, before it says what may have been said already.
SAME_ERROR_SECONDS = 2.0


def run_training(
    config: str, loaded: LoadedConfig, overrides: Sequence[str], name: str | None, resume: bool, verbose: bool
) -> None:
    """Train or resume the run called `name`, or else as the config is. config: what the user called it.

    Raises ConfigError for what the user can mend; exits after a signal, or when another process has gone.
    """
    end_with_launcher()
    resume_command = command_that_resumes(config, name)
    with _together_with_others(resume_command), _alone_in(name or loaded.name, resume):
        loaded, run = open_run(loaded, name, overrides, resume)
        training = loaded.config.training
        if training.dataloader_num_workers:
            # a worker forked from a process whose tokenizer used threads would wait for them for ever
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            expect_lost_workers()
        set_up_libraries(verbose)
        from trainer.training.train import train

        with one_line_per_failure(run, resume_command, training.learning_rate):
            train(loaded, run, resume=resume, echo=click.echo)


def command_that_resumes(config: str, name: str | None) -> str:
    """The command that resumes this run, with the processes and machines that it was started with."""
    options = {"processes": processes_here(), "nodes": processes() // processes_here()}
    given = {option: str(number) for option, number in options.items() if number > 1}
    containers_here = os.environ.get("NORDSPARSE_NODES_HERE")  # docker/run knows where those meet
    if "nodes" in given and not containers_here:
        given["rendezvous"] = os.environ.get("NORDSPARSE_RENDEZVOUS", "HOST:PORT")
    if name is None:
        variables = {"processes": "PROCS", "nodes": "NODES", "rendezvous": "RENDEZVOUS"}
        return " ".join(
            [f"make resume CONFIG={config}", *(f"{variables[key]}={value}" for key, value in given.items())]
        )
    arguments = [f"--{option} {value}" for option, value in given.items()]
    return " ".join([f"python -m trainer train {config} --name {name} --resume", *arguments])


def open_run(
    loaded: LoadedConfig, name: str | None, overrides: Sequence[str], resume: bool
) -> tuple[LoadedConfig, Run]:
    """The run folder, and the config with the overrides that the run was started with.

    Of several processes the first makes or opens it, and the others follow.
    """
    if processes() > 1:
        from trainer.system.device import choose_device

        connect(choose_device(loaded.config)[0])
    run = None
    if is_first() and resume:
        run = Run.open(loaded, name)
        if earlier := run.manifest.get("overrides"):
            click.echo(f"overrides {' '.join(earlier)} (given before; they go before the file)")
            overrides = (*earlier, *overrides)
        loaded = load_config(loaded.file, overrides)
        run.go_on_with(loaded, overrides, click.echo)
    elif is_first():
        run = Run.create(loaded, name, overrides)
    manifest, overrides = from_first((run.manifest if run else None, overrides))
    if run is None:
        loaded = load_config(loaded.file, overrides)
        run = Run.follow(loaded, name, manifest)
    return loaded, run


def _alone_in(name: str, resume: bool) -> contextlib.AbstractContextManager[None]:
    """The lock of the run folder; several processes of one training are one owner, and the first holds it."""
    folder: Path = MODELS / name
    there_is_nothing_to_resume = resume and not folder.is_dir()
    if there_is_nothing_to_resume or not is_first():
        return contextlib.nullcontext()
    return only_one_in(folder, click.echo)


@contextlib.contextmanager
def _together_with_others(resume_command: str) -> Iterator[None]:
    """End quietly when another process of the training has gone: it has said why, unless it was killed."""
    try:
        yield
    except ConfigError:
        if not is_first():  # the first may have found the same, and then ends all
            time.sleep(SAME_ERROR_SECONDS)
        raise
    except RuntimeError as error:
        if not lost_another(error):
            raise
        if launcher_has_ended():  # the other one saw that first
            time.sleep(SAME_ERROR_SECONDS)
        if is_first():
            click.echo(
                f"Error: another process of this training ended. Nothing saved is lost. To go on: {resume_command}",
                err=True,
            )
        sys.exit(1)
