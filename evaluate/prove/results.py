"""The section of docs/results.md that `make prove` writes, and mteb's own result files."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mteb.models.model_meta import ModelMeta

from evaluate.prove.estimate import seconds_of
from evaluate.prove.expected import POINTS, count_published, run_differences, score_differences
from evaluate.prove.journal import Journal
from evaluate.prove.plan import BM25, FOLDER, Plan, Step
from evaluate.prove.rows import Row, against_bm25, columns_of, mean_of, read_rows
from evaluate.tasks import select_tasks, task_names
from evaluate.trust import registry_entry
from trainer.config import ConfigError
from trainer.runs.run import git_commit
from trainer.system.files import write_atomically
from trainer.system.progress_bar import in_columns

PAGE = Path("docs/results.md")
START, END = "<!-- prove:start -->", "<!-- prove:end -->"


def write_results(plan: Plan, journal: Journal, echo: Callable[[str], None]) -> None:
    """Write models/prove/results.md, put it between the markers of docs/results.md, and copy mteb's files."""
    rows = read_rows(plan, journal)
    if not rows:
        echo(in_columns("results", "nothing was measured, so no table was written"))
        return
    text = "\n".join(section_lines(plan, rows, journal)) + "\n"
    write_atomically(FOLDER / "results.md", text)
    where = str(FOLDER / "results.md")
    try:
        write_atomically(PAGE, between_markers(PAGE.read_text(encoding="utf-8"), text))
        where += f" and {PAGE}"
    except ConfigError as error:
        echo(in_columns("results", f"{PAGE} stays as it is: {error.format_message()}"))
    except OSError as error:
        echo(in_columns("results", f"{PAGE} stays as it is: {error.strerror}"))
    count = sum(copy_for_mteb(row) for row in rows)
    echo(in_columns("results", f"{where}; {count} result files of mteb under {FOLDER / 'mteb'}"))


def between_markers(page: str, text: str) -> str:
    """The page with `text` in the place of what stood between the markers. Raises ConfigError without them."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConfigError(f"it has no line '{START}' with a line '{END}' below")
    return f"{before}{START}\n{text}{END}{after}"


# ------------------------------------------------------------------------------------------- the section
def section_lines(plan: Plan, rows: list[Row], journal: Journal) -> Iterator[str]:
    """All of the section."""
    tasks = [task.metadata.name for task in select_tasks(task_names(plan.tasks))]
    yield f"Command: `make prove`. Date: {time.strftime('%Y-%m-%d')}. Commit: {git_commit() or 'not known'}. nDCG@10 × 100."
    yield ""
    yield from score_lines(rows, tasks)
    if runs := [row for row in rows if row.manifest]:
        yield ""
        yield from cost_lines(runs, journal)
    hours = sum(known.get("seconds", 0) for known in journal.steps.values()) / 3600
    yield ""
    yield f"All steps together, those of the baselines too: {hours:.1f} hours."
    yield ""
    yield "Revisions: " + ", ".join(dict.fromkeys(_revisions(rows))) + "."
    yield ""
    yield "**What differed from expectation**"
    yield ""
    differed = [*difference_lines(plan, rows)]
    compared = sum(count_published(row.subject.system, row.scores) for row in rows)
    nothing = f"Nothing. {compared} scores were compared with published ones, and none is over {POINTS:g} point off."
    yield from (f"- {line}" for line in differed or [nothing])
    if missing := [*missing_lines(plan, rows, journal)]:
        yield ""
        yield "**Not done**"
        yield ""
        yield from (f"- {line}" for line in missing)


def score_lines(rows: list[Row], tasks: list[str]) -> Iterator[str]:
    """nDCG@10 of every system and task, with active dims and the difference to BM25."""
    columns = columns_of(rows, tasks)
    bm25 = next((row for row in rows if row.subject.system == BM25), None)
    names = [column.removesuffix("Retrieval").removesuffix("retrieval") for column in columns]
    yield from table(
        ["", *names, "mean without NanoBEIR", "mean − BM25's, 95 % interval", "active dims per document"],
        (
            [
                row.subject.name,
                *(_points(row.scores.get(column)) for column in columns),
                _points(mean_of(row, tasks)),
                _interval(against_bm25(row, bm25)),
                "-" if row.document_dims is None else f"{row.document_dims:.0f}",
            ]
            for row in rows
        ),
    )


def cost_lines(runs: list[Row], journal: Journal) -> Iterator[str]:
    """What each run took."""
    header = ["", "device", "steps", "training (h)", "evaluation (h)", "GPU peak (GiB)", "host peak (GiB)", "commit"]
    yield from table(header, (_cost(row, journal) for row in runs))


def _cost(row: Row, journal: Journal) -> list[str]:
    found, name = row.manifest, row.subject.name
    on_gpu = found.get("device", "cpu").partition(",")[0] != "cpu"
    host = journal.steps.get(f"train {name}", {}).get("peak_gib")
    return [
        name,
        found.get("device", "-"),
        f"{found.get('steps_done', 0):,}",
        f"{found.get('total_seconds', 0) / 3600:.2f}",
        f"{journal.steps.get(f'evaluate {name}', {}).get('seconds', 0) / 3600:.2f}",
        f"{found['peak_memory_gib']:.1f}" if on_gpu and "peak_memory_gib" in found else "-",
        f"{host:.1f}" if host else "-",
        (found.get("git_commit") or "-")[:12],
    ]


def table(header: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """A table of Markdown."""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _points(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def _interval(values: tuple[float, float, float] | None) -> str:
    if values is None:
        return "-"
    mean, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in values)
    return f"{mean} [{low}, {high}]"


def _revisions(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield row.base_model if row.base_model != "-" else row.subject.name
        for data in row.manifest.get("datasets", {}).values():
            for source, commit in data.get("revisions", {}).items():
                yield f"{source}@{commit[:12]}" if commit else source


def difference_lines(plan: Plan, rows: list[Row]) -> Iterator[str]:
    """Scores, sparsity and time that are not as expected, and training texts in the tasks."""
    for row in rows:
        yield from score_differences(row.subject.system, row.subject.name, row.scores)
    steps = {step.subject: step for step in plan.known if step.trains}
    for row in rows:
        if row.manifest:
            yield from run_differences(steps[row.subject], row.manifest)
    for row in rows:
        for task, values in (row.parts.get("leakage") or {"tasks": {}})["tasks"].items():
            if leaks := values["exact_queries"] + values["exact_passages"]:
                texts = values["queries"] + values["passages"]
                which = f"{leaks:,} of the {texts:,} texts of {task}"
                yield f"{row.subject.name} was trained on {which}: do not quote that score"


def missing_lines(plan: Plan, rows: list[Row], journal: Journal) -> Iterator[str]:
    """The steps without a result, each with the reason; those of configs that were not asked for, too."""
    done = {row.subject for row in rows}
    failures = journal.failures([step.key for step in plan.known])
    for step in plan.known:
        if why := failures.get(step.key):
            yield f"{step.key}: {why}"
        elif step.subject not in done and not step.needs:
            yield f"{step.key}: {_not_yet(step)}"


def _not_yet(step: Step) -> str:
    estimate = seconds_of(step)
    return f"not yet (about {estimate / 3600:.1f} h)" if estimate else "not yet"


# ------------------------------------------------------------------------------------------- mteb
def copy_for_mteb(row: Row) -> int:
    """Copy a system's result files into the layout of mteb's results repository; their number."""
    subject = row.subject
    entry = registry_entry(subject.source) if subject.source else None
    commit = row.manifest.get("git_commit") or git_commit() or "unknown"
    revision = (
        subject.revision
        if subject.source
        else f"{commit[:12]}-{row.manifest['id'][:8]}"
        if row.manifest
        else commit[:12]
    )
    revision = (revision or "unknown").replace("/", "_")
    name = subject.source or f"nordsparse/{subject.system}"
    kind = {} if subject.source else {"model_type": ["sparse"]}
    meta = entry or ModelMeta.create_empty(overwrites={"name": name, "revision": revision, **kind})
    folder = FOLDER / "mteb" / "results" / name.replace("/", "__") / revision
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_meta.json").write_text(json.dumps(meta.to_dict(), default=str, indent=4), encoding="utf-8")
    for task in row.system:
        shutil.copyfile(subject.results / "scores" / subject.system / f"{task}.json", folder / f"{task}.json")
    return len(row.system)
