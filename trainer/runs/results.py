"""Scores on disk: one file per system and task, in mteb's own format, with the score of every query beside it."""

import gzip
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.config import ConfigError
from trainer.runs.choice import means_of_parts, part_of, reported
from trainer.runs.run import Run, hash_of_model
from trainer.system.files import read_json, write_json

MAIN_METRIC = "ndcg_at_10"


@dataclass(frozen=True)
class TaskScore:
    """How well one system does on one task.

    `parts` holds nDCG@10, from 0 to 1, and the languages by `split/subset`. `per_query` holds nDCG@10 under
    `split/subset/query id`; it is empty for results that do not carry it, such as mteb's own. `hashes` are those of the
    queries' texts, `note` says how the system searched. `left_out` queries chose the checkpoint, and are not in the other
    values.
    """

    task: str
    parts: dict[str, tuple[float, tuple[str, ...]]]
    per_query: dict[str, float] = field(default_factory=dict)
    revision: str | None = None
    mteb_version: str | None = None
    note: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    @property
    def main(self) -> float:
        """The mean nDCG@10 over the task's splits and subsets."""
        return fmean(value for value, _ in self.parts.values())

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of all parts."""
        return tuple(dict.fromkeys(language for _, languages in self.parts.values() for language in languages))

    def on_parts_of(self, other: "TaskScore") -> "TaskScore":
        """The score on the splits and subsets of another score alone, where this one is of these and more."""
        if not other.parts.keys() < self.parts.keys():
            return self
        per_query = {query: value for query, value in self.per_query.items() if part_of(query) in other.parts}
        return replace(self, per_query=per_query, parts={part: self.parts[part] for part in other.parts})

    def without_choosers(self, manifest: dict[str, Any], hashes: dict[str, str]) -> "TaskScore":
        """The score on the queries that did not choose a run's checkpoint; `note` names their number."""
        others, note = reported(manifest, self.task, self.hashes or hashes, self.per_query)
        note = "; ".join(part for part in dict.fromkeys((self.note, note)) if part)
        if len(others) == len(self.per_query):
            return replace(self, note=note)
        means = means_of_parts(others)
        return replace(
            self,
            per_query=others,
            parts={part: (means[part], languages) for part, (_, languages) in self.parts.items()},
            note=note,
            left_out=self.left_out + len(self.per_query) - len(others),
        )


System = dict[str, TaskScore]


@dataclass(frozen=True)
class Ranking:
    """What a system found on one split and subset of a task: scores of its best passages, and the relevant ones."""

    found: dict[str, dict[str, float]]
    relevant: dict[str, dict[str, int]]


class EvalFolder:
    """The folder `eval` of a run: scores, per_query and rankings by system and task, and one file per part.

    The run's manifest says which queries chose its checkpoint. The files hold all queries; what is read has the others.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None) -> None:
        self.folder, self.manifest = folder, manifest or {}

    def score_file(self, system: str, task: str) -> Path:
        """A task's scores in mteb's format."""
        return self.folder / "scores" / system / f"{task}.json"

    def query_file(self, system: str, task: str) -> Path:
        """nDCG@10 of every query, and what it was measured with."""
        return self.folder / "per_query" / system / f"{task}.json"

    def ranking_file(self, system: str, task: str) -> Path:
        """The best passages of every query."""
        return self.folder / "rankings" / system / f"{task}.json.gz"

    def rankings(self, system: str, task: str) -> dict[str, Ranking]:
        """What a system found, by `split/subset`. Raises ConfigError when it has not run on the task."""
        file = self.ranking_file(system, task)
        if not file.is_file():
            raise ConfigError(f"{system} has not been run on {task}: there is no {file}")
        try:
            with gzip.open(file, "rt", encoding="utf-8") as data:
                return {part: Ranking(**values) for part, values in json.load(data).items()}
        except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}. Remove it to have the task run again") from None

    def write_rankings(self, system: str, task: str, rankings: dict[str, Ranking]) -> None:
        """Store what a system found."""
        file = self.ranking_file(system, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "wt", encoding="utf-8") as data:
            json.dump({part: asdict(ranking) for part, ranking in rankings.items()}, data)

    def files(self, system: str, task: str) -> tuple[Path, Path, Path]:
        """All files of a system's score on a task."""
        return self.score_file(system, task), self.query_file(system, task), self.ranking_file(system, task)

    def remove(self, system: str, task: str) -> None:
        """Forget what a system scored on a task."""
        for file in self.files(system, task):
            file.unlink(missing_ok=True)

    def tasks_of(self, system: str) -> list[str]:
        """The tasks that a system has scores on."""
        return sorted(file.stem for file in self.score_file(system, "any").parent.glob("*.json"))

    def made_with(self, system: str, task: str) -> dict[str, str]:
        """What a task's score was measured with; empty when that is not known."""
        file = self.query_file(system, task)
        values = read_json(file) if file.is_file() else {}
        return values.get("made_with", {}) if isinstance(values, dict) else {}

    def write_part(self, part: str, values: dict[str, Any]) -> Path:
        """Store the values of one part: sparsity, latency, leakage, hybrid, compare."""
        file = self.folder / f"{part}.json"
        write_json(file, values)
        return file

    def read_part(self, part: str) -> dict[str, Any] | None:
        """The values of a part; None when it has not run."""
        file = self.folder / f"{part}.json"
        return read_json(file) if file.is_file() else None

    def systems(self) -> dict[str, System]:
        """Every system's scores by task."""
        folders = [folder for folder in sorted((self.folder / "scores").glob("*/")) if any(folder.glob("*.json"))]
        systems = {folder.name: read_system(folder) for folder in folders}
        return {name: self.reported(system, systems) for name, system in systems.items()}

    def reported(self, system: System, beside: dict[str, System]) -> System:
        """A system's scores on the queries that did not choose the run's checkpoint.

        Results from elsewhere have no hashes of their queries; those beside them on the same task do.
        """
        known = {task: score.hashes for other in beside.values() for task, score in other.items() if score.hashes}
        return {task: score.without_choosers(self.manifest, known.get(task, {})) for task, score in system.items()}


def read_system(path: Path) -> System:
    """A system's scores from a results file, a run's folder, or all files below a folder: ours, or a results tree of mteb.

    Raises ConfigError for a file that holds no mteb results, and for two different results of one task.
    """
    if not path.exists():
        raise ConfigError(f"there are no results at {path}")
    manifest = None
    if (path / "run.json").is_file():
        manifest = read_json(path / "run.json")
        path = path / "eval/scores" / path.resolve().name
        if not path.is_dir():
            raise ConfigError(f"the run has not been evaluated: there is no {path}")
    files = (
        [path] if path.is_file() else sorted(file for file in path.rglob("*.json") if file.name != "model_meta.json")
    )
    system: System = {}
    for file in files:
        score = read_score(file)
        if score.task in system and system[score.task].parts != score.parts:
            raise ConfigError(
                f"{path} holds two different results of {score.task}. Name one file, or one model's folder"
            )
        system[score.task] = score
    if not system:
        raise ConfigError(f"{path} holds no results")
    if manifest:
        system = {task: score.without_choosers(manifest, {}) for task, score in system.items()}
    return system


def read_score(file: Path) -> TaskScore:
    """One task's scores. Raises ConfigError when the file is in no format that is known here."""
    values = read_json(file)
    try:
        parts = {
            f"{split}/{row.get('hf_subset', 'default')}": (
                float(row[MAIN_METRIC] if MAIN_METRIC in row else row["main_score"]),
                tuple(row["languages"]),
            )
            for split, rows in values["scores"].items()
            for row in rows
        }
        score = TaskScore(
            str(values["task_name"]),
            parts,
            revision=values.get("dataset_revision"),
            mteb_version=values.get("mteb_version"),
        )
        if not math.isfinite(score.main):
            raise ValueError("a score is not a number")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        version = values.get("mteb_version") if isinstance(values, dict) else None
        by = f" (written by mteb {version})" if version else ""
        raise ConfigError(
            f"{file}{by} is not a result of mteb 2 or of this project: {type(error).__name__} {error}"
        ) from None
    return replace(score, **_per_query(file))


def _per_query(file: Path) -> dict[str, Any]:
    """The scores per query, the hashes of the queries and the note beside a score file of ours: its twin in per_query/."""
    twin = file.parents[2] / "per_query" / file.parent.name / file.name if len(file.parents) > 2 else file
    if twin == file or not twin.is_file():
        return {}
    values = read_json(twin)
    if not isinstance(values, dict) or not isinstance(values.get(MAIN_METRIC), dict):
        raise ConfigError(f"{twin} holds no scores per query. Remove it to have the task run again")
    return {
        "per_query": values[MAIN_METRIC],
        "note": values.get("note", ""),
        "hashes": values.get("queries", {}),
    }


def system_of(model: str, long_documents: str) -> str:
    """What stored scores are known by: a model's hash, and how its long documents were read if they were not cut."""
    return model if long_documents == "cut" else f"{model}, long documents in {long_documents}"


@dataclass(frozen=True)
class Measured:
    """What was measured of the model that a run holds now. `missing` says why there are no scores."""

    systems: dict[str, System] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    missing: str = ""


def read_measured(run: Run) -> Measured:
    """Scores by system and task, and the parts; nothing of another model, such as the one before a resume.

    Sparsity and leakage say which model they were measured of. Those that do not, of an earlier version, are taken for
    measurements of the model that was scored.
    """
    folder, measure = EvalFolder(run.folder / "eval", run.manifest), f"`make eval CONFIG={run.name}` measures it."
    weights, tasks = hash_of_model(run.final), folder.tasks_of(run.name)
    model = system_of(weights, run.config().model.long_documents)
    systems = {folder.made_with(run.name, task).get("system", "") for task in tasks}
    scored = systems == {model}
    parts = {name: folder.read_part(name) or {} for name in ("sparsity", "leakage")}
    parts = {
        name: values
        for name, values in parts.items()
        if values and (values["made_with"]["system"] == model if "made_with" in values else scored)
    }
    if scored:
        return Measured(folder.systems(), parts)
    same_weights = all(system.startswith(weights) for system in systems)
    another = "another model.long_documents" if same_weights else "another model"
    reason = f"The scores in the run folder are those of {another}, so they are left out." if tasks else ""
    return Measured({}, parts, f"{reason or 'Not measured yet.'} {measure}")
