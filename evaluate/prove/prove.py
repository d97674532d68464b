"""Runs the steps in their order, goes on after a failure, and writes what came out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evaluate.prove.child import Outcome, run_child
from evaluate.prove.journal import Journal
from evaluate.prove.plan import FOLDER, Plan, Step
from evaluate.prove.results import write_results
from evaluate.prove.sources import fetch_all
from trainer.config import ConfigError
from trainer.runs.lock import only_one_in
from trainer.runs.run import MODELS, Run, differences
from trainer.system.durations import duration
from trainer.system.files import read_json
from trainer.system.progress_bar import in_columns

JOURNAL = FOLDER / "steps.json"
FETCH = "fetch"


def prove(plan: Plan, echo: Callable[[str], None]) -> int:
    """Do what is not done yet. The exit status: 1 when a step failed, 128 and the signal when one stopped it.

    Raises ConfigError, before anything is trained, when code of a base model is not trusted.
    """
    use_one_gpu(echo)
    with only_one_in(FOLDER, echo):
        journal = Journal(JOURNAL)
        fetch(plan, journal, echo)
        for number, step in enumerate(plan.steps, start=1):
            place = f"{number} of {len(plan.steps)}: {step.key}"
            if step.needs and not journal.is_done(step.needs, made_of(_step(plan, step.needs))):
                echo(in_columns("step", f"{place}: left out, for want of '{step.needs}'"))
            elif journal.is_done(step.key, made_of(step)):
                echo(in_columns("step", f"{place}: done before ({duration(journal.steps[step.key]['seconds'])})"))
            else:
                echo(in_columns("step", place))
                if received := run_step(step, journal, echo):
                    write_results(plan, journal, echo)
                    echo(f"Stopped in the step '{step.key}'. To go on: the same command again")
                    return 128 + received
        write_results(plan, journal, echo)
    return report_failures(plan, journal, echo)


def use_one_gpu(echo: Callable[[str], None]) -> None:
    """Let the steps see one GPU: hours and memory are those of one, and a training in one process takes no more."""
    if torch.cuda.device_count() > 1:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = first
        echo(in_columns("device", f"GPU {first} of {torch.cuda.device_count()}: every step runs on one"))


def fetch(plan: Plan, journal: Journal, echo: Callable[[str], None]) -> None:
    """Download everything, once for the same steps."""
    wanted = [plan.tasks, *(list(step.command) for step in plan.steps)]
    if journal.is_done(FETCH, wanted):
        echo(in_columns("fetch", "done before"))
        return
    missing = fetch_all(plan, echo)
    status, why = (
        ("failed", "; ".join(f"{name}: {reason}" for name, reason in missing.items())) if missing else ("done", "")
    )
    journal.write(FETCH, status=status, why=why, made_of=wanted)


def run_step(step: Step, journal: Journal, echo: Callable[[str], None]) -> int | None:
    """Run one step and record how it ended. Returns the signal that stopped it, if one did."""
    log = log_of(step)
    try:
        options = resume_option(step)
        if options is None:
            outcome = Outcome(0, 0.0, 0.0, "")
            echo(in_columns("", f"{MODELS / step.subject.name} holds a finished run already"))
        else:
            outcome = run_child((*step.command, *options), log, echo)
        why = f"{outcome.reason} ({log})" if outcome.status else other_config(step)
    except ConfigError as error:
        outcome, why = Outcome(2, 0.0, 0.0, ""), error.format_message()
    if outcome.status < 0:
        why = f"ended by signal {-outcome.status}; last line: {why}"
    status = "stopped" if outcome.received and outcome.status else "failed" if why else "done"
    journal.record(step, made_of(step), outcome, status, why)
    if status == "failed":
        echo(in_columns("step", f"{step.key}: FAILED ({why})"))
    return outcome.received


def resume_option(step: Step) -> tuple[str, ...] | None:
    """What a training needs to go on where it stopped; None when it is finished."""
    config = step.subject.config
    if not step.trains or config is None or not (MODELS / step.subject.name / "run.json").exists():
        return ()
    run = Run.open(config)
    if run.manifest.get("status") == "finished" and run.final.is_dir():
        return None
    return () if run.is_empty() else ("--resume",)


def other_config(step: Step) -> str:
    """Why a finished run is not that of the config: it was started by hand with other values. Empty if it is."""
    config = step.subject.config
    if not step.trains or config is None:
        return ""
    trained = Run(MODELS / step.subject.name).config().model_dump()
    found = [
        f"{'.'.join(path)} is {old} there, {new} here"
        for path, old, new in differences(trained, config.config.model_dump())
        if path != ("hardware", "device")  # it may have been trained on another machine
    ]
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    where = MODELS / step.subject.name
    return f"{where} was trained with another config: {'; '.join(found[:3])}{more}. Move the folder away to train anew"


def made_of(step: Step) -> Any:
    """What a step's result depends on: its command, and the run that it makes or measures."""
    file = MODELS / step.subject.name / "run.json"
    run = read_json(file)["id"] if step.subject.config and file.is_file() else None
    return [*step.command, run]


def log_of(step: Step) -> Path:
    """Where the output of a step is kept, all attempts one after the other."""
    return FOLDER / "logs" / f"{step.key.replace(' ', '-').replace('/', '_')}.log"


def report_failures(plan: Plan, journal: Journal, echo: Callable[[str], None]) -> int:
    """Name what failed and why; the exit status."""
    failures = journal.failures([FETCH, *(step.key for step in plan.steps)])
    for key, why in failures.items():
        echo(in_columns("failed", f"{key}: {why}"))
    if failures:
        echo(in_columns("", "The same command again tries what failed, and nothing else"))
    return int(bool(failures))


def _step(plan: Plan, key: str) -> Step:
    return next(step for step in plan.steps if step.key == key)
