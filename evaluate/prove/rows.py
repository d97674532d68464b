"""What was measured of each system, read from the run folders and the baselines' folder."""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from evaluate.prove.journal import Journal
from evaluate.prove.plan import BASELINES, BM25, CONFIGS, Plan, Subject
from evaluate.tasks import NANO
from trainer.config import FROM_SCRATCH
from trainer.runs.intervals import paired_interval
from trainer.runs.results import EvalFolder, System
from trainer.runs.run import MODELS
from trainer.system.files import read_json

RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One system: its scores by column of the table, and by task."""

    subject: Subject
    system: System
    scores: dict[str, float]
    manifest: dict[str, Any] = field(default_factory=dict)
    """run.json; empty for a baseline."""
    parts: dict[str, Any] = field(default_factory=dict)
    """What else was measured: sparsity, leakage."""

    @property
    def document_dims(self) -> float | None:
        """Mean active dims of the tasks' passages."""
        sparsity = self.parts.get("sparsity")
        return sparsity["routes"]["document"]["active_dims"]["mean"] if sparsity else None

    @property
    def base_model(self) -> str:
        """Name and commit of the base model, or of a baseline."""
        base = self.manifest.get("base_model", {"source": self.subject.source, "commit": self.subject.revision})
        if base["source"] in (None, FROM_SCRATCH):
            return base["source"] or "-"
        return f"{base['source']}@{base['commit'][:12]}" if base.get("commit") else base["source"]


def subjects_of(plan: Plan, journal: Journal) -> list[Subject]:
    """The systems of the plan, and others that an earlier `make prove` measured on the same tasks; runs first."""
    measured = (step for step in plan.others if journal.was_done_with(step.key, plan.tasks))
    found = dict.fromkeys(step.subject for step in (*plan.steps, *measured))
    order = {name: number for number, name in enumerate(CONFIGS)}
    runs = sorted((one for one in found if one.config), key=lambda one: order.get(one.name, len(order)))
    return [*runs, *(one for one in found if not one.config)]


def read_rows(plan: Plan, journal: Journal) -> list[Row]:
    """The systems that have a score."""
    rows = []
    for subject in subjects_of(plan, journal):
        file = MODELS / subject.name / "run.json"
        manifest = read_json(file) if subject.config and file.is_file() else {}
        folder = EvalFolder(subject.results, manifest)
        if system := folder.systems().get(subject.system):
            is_alone = subject.results != BASELINES  # dense models have no parts
            parts = {name: folder.read_part(name) for name in ("sparsity", "leakage")} if is_alone else {}
            rows.append(Row(subject, system, scores_of(system), manifest, parts))
    return rows


def scores_of(system: System) -> dict[str, float]:
    """nDCG@10 by column: each task, and the mean over NanoBEIR's topics in each language."""
    scores = {name: score.main for name, score in system.items() if name not in NANO}
    nano: dict[str, list[float]] = {}
    for name, score in system.items():
        if name in NANO:
            for part, (value, _) in score.parts.items():
                nano.setdefault(f"NanoBEIR {part.partition('/')[2]}", []).append(value)
    # a mean over some of the topics would stand beside means over all of them
    return scores | {column: fmean(values) for column, values in sorted(nano.items()) if len(values) == len(NANO)}


def columns_of(rows: list[Row], tasks: list[str]) -> list[str]:
    """The columns: the tasks in their order, then NanoBEIR."""
    found = {column for row in rows for column in row.scores}
    return [*(task for task in tasks if task in found), *sorted(column for column in found if column not in tasks)]


def mean_of(row: Row, tasks: list[str]) -> float | None:
    """The mean over the tasks, NanoBEIR apart; None where one is missing."""
    own = [task for task in tasks if task not in NANO]
    return fmean(row.scores[task] for task in own) if own and all(task in row.scores for task in own) else None


def against_bm25(row: Row, bm25: Row | None) -> tuple[float, float, float] | None:
    """The mean difference over the tasks but NanoBEIR, and its 95 % interval (paired bootstrap); None without one."""
    if bm25 is None or row.subject.system == BM25:
        return None
    parts: dict[tuple[str, str], list[float]] = {}
    for task in row.system.keys() & bm25.system.keys() - set(NANO):
        own, other = row.system[task].per_query, bm25.system[task].per_query
        for query in sorted(own.keys() & other.keys()):
            split, subset, _ = query.split("/", 2)
            parts.setdefault((task, f"{split}/{subset}"), []).append(own[query] - other[query])
    differences = [parts[key] for key in sorted(parts)]
    if not differences or min(map(len, differences)) < 2:
        return None
    low, high = paired_interval(differences, 0, RESAMPLES)
    return fmean(map(fmean, differences)), low, high
