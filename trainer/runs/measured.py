"""What `python -m evaluate` left in a run's folder, for the model card: scores in mteb's format, and one file per part."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.config import ConfigError
from trainer.runs.choice import means_of_parts, reported
from trainer.runs.run import Run, hash_of_model

METRIC = "ndcg_at_10"
# Scores that differ by less are the same measurement.
ROUNDING = 5e-4


@dataclass(frozen=True)
class Score:
    """nDCG@10 of one system on one task: the mean, and one row per split and subset."""

    task: str
    rows: list[tuple[str, str, float]]
    mteb_version: str | None
    note: str = ""

    @property
    def mean(self) -> float:
        """The mean over splits and subsets."""
        return fmean(value for _, _, value in self.rows)


@dataclass(frozen=True)
class Measured:
    """Scores by system and task, the run's own first, and the parts measured. `missing` says why there is none."""

    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    missing: str = ""


def read_measured(run: Run) -> Measured:
    """Everything measured of the model that the run holds now; nothing of another, such as the one before a resume."""
    folder, measure = run.folder / "eval", f"`make eval CONFIG={run.name}` measures it."
    own = sorted((folder / "scores" / run.name).glob("*.json"))
    if not own:
        return Measured(missing=f"Not measured yet. {measure}")
    model = hash_of_model(run.final)
    if any(_twin(file).get("made_with", {}).get("system") != model for file in own):
        return Measured(
            missing=f"The scores in the run folder are those of another model, so they are left out. {measure}"
        )
    others = sorted(path.name for path in (folder / "scores").glob("*/") if path.name != run.name)
    scores = {name: _read_system(folder / "scores" / name, run) for name in (run.name, *others)}
    parts = {name: _read(folder / f"{name}.json") for name in ("compare", "sparsity", "leakage")}
    if not _is_of(parts["compare"], run.name, scores[run.name]):
        parts["compare"] = {}
    return Measured(scores, {name: values for name, values in parts.items() if values})


def _is_of(compared: dict[str, Any], name: str, own: dict[str, Score]) -> bool:
    """Whether a comparison was made with these scores, not with earlier ones."""
    rows = {task: row.get(name) for task, row in compared.get("tasks", {}).items()}
    return all(
        value is None or (task in own and abs(value - own[task].mean) <= ROUNDING) for task, value in rows.items()
    )


def _read_system(folder: Path, run: Run) -> dict[str, Score]:
    """The scores of a system on the queries that did not choose the run's checkpoint."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        values = _read(file)
        try:
            rows = [
                (split, row.get("hf_subset", "default"), float(row[METRIC]))
                for split, rows in values["scores"].items()
                for row in rows
            ]
            task, version = str(values["task_name"]), values.get("mteb_version")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"{file} holds no scores: {type(error).__name__} {error}. Remove it") from None
        twin = _twin(file)
        digests = twin.get("queries") or _twin(folder.with_name(run.name) / file.name).get("queries", {})
        kept, note = reported(run.manifest, task, digests, twin.get(METRIC, {}))
        if len(kept) < len(twin.get(METRIC, {})):
            means = means_of_parts(kept)
            rows = [(split, subset, means[f"{split}/{subset}"]) for split, subset, _ in rows]
        found[task] = Score(task, rows, version, "; ".join(part for part in (twin.get("note", ""), note) if part))
    return found


def _twin(file: Path) -> dict[str, Any]:
    """The scores per query beside a score file, with what they were measured with."""
    return _read(file.parents[2] / "per_query" / file.parent.name / file.name)


def _read(file: Path) -> dict[str, Any]:
    """A JSON file's values; empty when there is none. Raises ConfigError when it cannot be read."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
