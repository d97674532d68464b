"""What `make prove DRY_RUN=1` prints: steps, downloads, hours, disk, and what is done already."""

import shlex
from collections.abc import Iterator

from evaluate.prove.estimate import HOW, disk_of, seconds_of
from evaluate.prove.journal import Journal
from evaluate.prove.plan import FOLDER, Plan
from evaluate.prove.prove import made_of
from evaluate.prove.sources import is_here, size_of, sources_of
from trainer.system.durations import duration, rough_duration
from trainer.system.progress_bar import in_columns

UNKNOWN = "size not known: the hub does not answer"


def plan_lines(plan: Plan) -> Iterator[str]:
    """The lines, each printed as soon as it is known."""
    yield from _download_lines(plan)
    journal, seconds, unknown = Journal(FOLDER / "steps.json"), 0.0, 0
    for step in plan.steps:
        if journal.is_done(step.key, made_of(step)):
            note = f"done ({duration(journal.steps[step.key]['seconds'])})"
        else:
            estimate = seconds_of(step)
            seconds, unknown = seconds + (estimate or 0), unknown + (estimate is None)
            note = "hours not known" if estimate is None else f"about {rough_duration(estimate)}"
        yield in_columns("step", f"{step.key}: {note}")
        yield in_columns("", f"python -m {shlex.join(step.command)}")
    more = f", and {unknown} steps of unknown length" if unknown else ""
    yield in_columns("hours", f"about {seconds / 3600:.1f} on one H100{more}")
    yield in_columns("", HOW)
    disk = [disk_of(loaded.config) for loaded in plan.configs]
    unsized = f", and {disk.count(None)} of unknown size" if None in disk else ""
    yield in_columns(
        "disk", f"about {sum(size or 0 for size in disk) / 1e9:.0f} GB for the run folders{unsized}, and the downloads"
    )
    yield in_columns("memory", "`make check CONFIG=…` prints the most that a step of each config may take")


def _download_lines(plan: Plan) -> Iterator[str]:
    total, unknown, answers = 0, 0, True
    for source in sources_of(plan):
        if is_here(source):
            note = "in the cache"
        else:
            size = size_of(source) if answers else None
            answers = answers and (size is not None or unknown < 2)  # after three silences nobody is asked again
            total, unknown = total + (size or 0), unknown + (size is None)
            note = UNKNOWN if size is None else f"{size / 1e6:,.0f} MB"
        yield in_columns("download", f"{source} ({source.why}): {note}", 10)
    more = f", and {unknown} repositories of unknown size" if unknown else ""
    yield in_columns("", f"{total / 1e9:.1f} GB in all{more}")
