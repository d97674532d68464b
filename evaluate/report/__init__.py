"""The report of what was measured: one page that opens offline, and a summary in Markdown."""

import math
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluate.report.plots import Plot, Points, bars, histogram, intervals, line_chart, pareto
from evaluate.subject import Subject
from trainer.runs.choice import choosers_of
from trainer.runs.score_table import ROUNDING, ScoreTable, build_table, is_current
from trainer.system.durations import duration

PARTS = ("sparsity", "latency", "leakage", "hybrid", "terms", "failed")
# Points per training curve that a plot of 300 pixels can show.
CURVE_POINTS = 300
LANGUAGES = {
    "nob": "Norwegian Bokmål",
    "nno": "Norwegian Nynorsk",
    "nor": "Norwegian",
    "dan": "Danish",
    "swe": "Swedish",
}
# Title of each plot of the training, and the scalars that it shows.
CURVES = {
    "Training loss": r"loss/(total|base_loss)",
    "Evaluation loss": r"eval/.+_loss",
    "Evaluation nDCG@10": r"eval/.+_ndcg@10",
    "Active dims per query": r"sparsity/query/active_dims_(mean|p95)|eval/.+_query_active_dims",
    "Active dims per document": r"sparsity/document/active_dims_(mean|p95)|eval/.+_document_active_dims",
}


def write_report(subject: Subject) -> Path:
    """Write report/index.html and report/summary.md from what the run's folder holds. Returns the page.

    A part that was not measured becomes a line with the command that adds it. A comparison is shown while it fits.
    """
    results = subject.results
    parts = {part: results.read_part(part) for part in PARTS}
    systems = results.systems()
    compare = results.read_part("compare")
    if compare and not is_current(compare, systems):
        compare = None
    failed = parts["failed"] or {}
    table = build_table(subject.name, systems, compare)
    tried = {task for tasks in failed.values() for task in tasks}  # also without any score
    table = replace(table, scores={task: table.scores.get(task, {}) for task in sorted(table.scores.keys() | tried)})
    values = parts | {
        "subject": subject,
        "manifest": subject.manifest,
        "choosers": choosers_of(subject.manifest or {}),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "table": table,
        "has_failed": lambda system, task: any(task in failed.get(name, ()) for name in (system, "data")),
        "compare": compare,
        "compared": {task for result in (compare["against"].values() if compare else ()) for task in result["tasks"]},
        "difference_plots": difference_plots(compare),
        "pareto_plots": pareto_plots(table, parts["sparsity"]),
        "language_plots": language_plots(table),
        "training_plots": training_plots(read_curves(subject.folder / "logs")),
        "best": best,
        "histograms": histograms(parts["sparsity"]),
        "add": lambda command: f"python -m evaluate {command} {model_options(subject)}",
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # of the summary too: Markdown passes HTML on
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    subject.report.mkdir(parents=True, exist_ok=True)
    for name in ("summary.md", "index.html"):
        (subject.report / name).write_text(environment.get_template(name).render(values), encoding="utf-8")
    return subject.report / "index.html"


# ------------------------------------------------------------------------------------------------- plots
def difference_plots(compare: dict[str, Any] | None) -> list[Plot]:
    """For each other system, the difference per task."""
    if not compare:
        return []
    return [
        intervals(
            f"{compare['main']} minus {other}",
            [(task, row["delta"], row.get("low"), row.get("high")) for task, row in result["tasks"].items()],
        )
        for other, result in compare["against"].items()
        if result["tasks"]
    ]


def pareto_plots(table: ScoreTable, sparsity: dict[str, Any] | None) -> list[Plot]:
    """nDCG@10 over active dims: of the pruned model, and of the full one beside systems that have no active dims.

    Pruning is measured on a sample of passages, in which search is easier than in all of them. Only where the full model
    has the same nDCG@10 on both do pruned model and baselines share one plot.
    """
    if sparsity is None:
        return []
    baselines = {name: table.mean(name) for name in table.systems if name != table.main}
    own = table.mean(table.main) if table.main in table.systems else math.nan
    full = sparsity["routes"]["document"]["active_dims"]["mean"], own, "full"
    pruned = [
        (
            row["document_active_dims"],
            row["ndcg_at_10"],
            "full" if row["max_active_dims"] is None else f"{row['max_active_dims']:,}",
        )
        for row in sparsity["pruned"]
        if row.get("ndcg_at_10") is not None
    ]
    on_sample = next((ndcg for _, ndcg, label in pruned if label == "full"), math.inf)
    if abs(on_sample - own) < ROUNDING:
        plots = [pareto("Pruned to max_active_dims, beside the other systems", pruned, baselines)]
    else:
        plots = [
            pareto("Full model, mean over the common tasks", [full], baselines),
            pareto("Pruned to max_active_dims, on a sample of queries and passages", pruned, {}),
        ]
    return [plot for plot in plots if plot.svg]


def language_plots(table: ScoreTable) -> list[Plot]:
    """For each language, the systems' means over those of its tasks that they all have; without systems that have none."""
    by_language: dict[str, list[str]] = {}
    for task, codes in table.languages.items():
        names = dict.fromkeys(LANGUAGES.get(code.partition("-")[0], "Other") for code in codes)
        by_language.setdefault(" and ".join(names) or "Other", []).append(task)
    plots = []
    for language, tasks in sorted(by_language.items()):
        systems = [name for name in table.systems if any(name in table.scores[task] for task in tasks)]
        common = [task for task in tasks if table.scores[task].keys() >= set(systems)]
        if common:
            means = {name: fmean(table.scores[task][name] for task in common) for name in systems}
            of = f" of {len(tasks)}" if len(common) < len(tasks) else ""
            plots.append(bars(f"{language}, {len(common)}{of} task{'s' if len(tasks) > 1 else ''}", means, table.main))
    return plots


def histograms(sparsity: dict[str, Any] | None) -> list[Plot]:
    """Texts by active dims, for queries and documents."""
    return [
        histogram(title, bins["edges"], bins["counts"])
        for route, title in (("query", "Queries"), ("document", "Documents"))
        if sparsity and (bins := sparsity["routes"][route]["histogram"])["counts"]
    ]


def read_curves(folder: Path) -> dict[str, Points]:
    """(step, value) of every finite scalar in TensorBoard's event files, thinned to CURVE_POINTS; empty without a log."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    log = EventAccumulator(str(folder), size_guidance={"scalars": CURVE_POINTS}).Reload()
    curves = {
        tag: [(event.step, event.value) for event in log.Scalars(tag) if math.isfinite(event.value)]
        for tag in log.Tags()["scalars"]
    }
    return {tag: points for tag, points in curves.items() if points}


def training_plots(curves: dict[str, Points]) -> list[Plot]:
    """The plots of CURVES for which there are scalars, totals and means first; of equal curves only the first."""
    plots = []
    for title, pattern in CURVES.items():
        tags = [tag for tag in curves if re.fullmatch(pattern, tag)]
        tags.sort(key=lambda tag: (not tag.startswith(("loss/total", "eval/search_", "sparsity/")), tag))
        shown: dict[str, Points] = {}
        for tag in tags:
            if curves[tag] not in shown.values():
                shown[tag] = curves[tag]
        if shown:
            plots.append(line_chart(title, shown, least=0.05 if "nDCG" in title else 0.0))
    return plots


# ------------------------------------------------------------------------------------------------- words and numbers
def model_options(subject: Subject) -> str:
    """What names the subject on the command line."""
    by_default = subject.config.model.long_documents if subject.config else "cut"
    documents = f" --long-documents {subject.long_documents}" if subject.long_documents != by_default else ""
    if subject.manifest is not None:
        return f"--model {shlex.quote(str(subject.folder))}{documents}"
    revision = f" --revision {subject.revision}" if subject.revision else ""
    trust = " --trust-remote-code" if subject.trust_remote_code else ""
    return f"--model {shlex.quote(subject.model)}{revision}{trust}{documents}"


def best(row: dict[str, float]) -> str | None:
    """The best score of several as it is printed, so that equal prints are equally good; None for a single one."""
    scores = [score for score in row.values() if math.isfinite(score)]
    return FILTERS["score"](max(scores)) if len(scores) > 1 else None


def signed(value: float) -> str:
    """A difference, to three decimals."""
    text = f"{value:+.3f}"
    return text.replace("-", "−") if float(text) else "0.000"


def size(count: float) -> str:
    """A number of bytes."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:,.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def known(write: Callable[[float], str]) -> Callable[[Any], str]:
    """A filter for what may not have been measured: – then."""
    return lambda value: write(value) if isinstance(value, (int, float)) and math.isfinite(value) else "–"


FILTERS: dict[str, Callable[..., Any]] = {
    "score": known(lambda value: f"{value:.3f}"),
    "signed": known(signed),
    "dims": known(lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}"),
    "count": known(lambda value: f"{value:,.0f}"),
    "number": known(lambda value: f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"),
    "share": known(lambda value: f"{value:.1%}"),
    "size": known(size),
    "duration": known(duration),
    # a cell of a Markdown table, which ends at a line break or a bar
    "cell": lambda text: escape(" ".join(str(text).split())).replace("|", Markup("&#124;")),
}
