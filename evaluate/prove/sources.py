"""The repositories that the steps need: their size on the hub, and their download before the first step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from huggingface_hub import HfApi, errors, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from evaluate.prove.plan import Plan
from evaluate.tasks import LocalTask, load, select_tasks, task_names
from trainer.config import Config, ConfigError, LoadedConfig, is_commit, is_local
from trainer.config.pins import hub_references
from trainer.hub.download import MODEL_FILES, HubUnreachable, fetch
from trainer.models.build import fetch_base_model
from trainer.system.progress_bar import in_columns

Kind = Literal["model", "dataset"]
# What the searches during training download.
NANOBEIR = "lightonai/NanoBEIR-{}"


@dataclass(frozen=True)
class Source:
    """A repository on the hub. revision: None for the newest."""

    repository: str
    revision: str | None
    kind: Kind
    why: str

    @property
    def patterns(self) -> list[str] | None:
        """The files that are downloaded; None for all."""
        return MODEL_FILES if self.kind == "model" else None

    def __str__(self) -> str:
        revision = (self.revision or "")[: 12 if is_commit(self.revision) else None]
        return f"{self.kind} {self.repository}" + (f" at {revision}" if revision else "")


def sources_of(plan: Plan) -> list[Source]:
    """Every repository once: base models, baselines, data sets, the tasks' data."""
    found: dict[tuple[str, str | None, Kind], Source] = {}
    for source in _all_sources(plan):
        found.setdefault((source.repository, source.revision, source.kind), source)
    return sorted(found.values(), key=lambda source: (get_args(Kind).index(source.kind), source.repository))


def _all_sources(plan: Plan) -> Iterator[Source]:
    for loaded in plan.configs:
        yield from _sources_of_config(loaded.config)
    for subject in dict.fromkeys(step.subject for step in plan.steps):
        if subject.source and not is_local(subject.source):
            yield Source(subject.source, subject.revision, "model", "a baseline")
    for task in select_tasks(task_names(plan.tasks)):
        if not isinstance(task, LocalTask):
            data = task.metadata.dataset
            yield Source(data["path"], data["revision"], "dataset", f"the task {task.metadata.name}")


def _sources_of_config(config: Config) -> Iterator[Source]:
    for reference in hub_references(config):
        why = "a teacher or a model that mines negatives" if reference.kind == "model" else "training data"
        why = "the base model" if reference.is_base_model else why
        yield Source(reference.repository, reference.revision, reference.kind, why)
    if config.evaluation.nanobeir_datasets != []:
        for language in config.evaluation.nanobeir_languages:
            yield Source(NANOBEIR.format(language), None, "dataset", "searches during training")


# ------------------------------------------------------------------------------------------- sizes
def is_here(source: Source) -> bool:
    """Whether the Hugging Face cache holds it."""
    try:
        snapshot_download(
            source.repository,
            repo_type=source.kind,
            revision=source.revision,
            allow_patterns=source.patterns,
            local_files_only=True,
        )
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return False
    return True


def size_of(source: Source) -> int | None:
    """Bytes to download, or None where the hub does not say."""
    ask: Callable[..., Any] = HfApi().model_info if source.kind == "model" else HfApi().dataset_info
    try:
        info = ask(source.repository, revision=source.revision, files_metadata=True, timeout=10)
    except Exception:  # whatever the hub and its transport raise
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return sum(sizes[name] for name in filter_repo_objects(sizes, allow_patterns=source.patterns))


# ------------------------------------------------------------------------------------------- download
def fetch_all(plan: Plan, echo: Callable[[str], None]) -> dict[str, str]:
    """Download everything. Returns what could not be had, and why; the steps that need it fail, and the others go on.

    Raises ConfigError before anything is trained when a base model cannot be used as the config says: its code is not
    trusted, or not known.
    """
    missing: dict[str, str] = {}
    refused: dict[str, ConfigError] = {}
    bases = {loaded.name: loaded for loaded in plan.configs}
    for name, loaded in bases.items():
        try:
            fetch_base_model(loaded.config, loaded.pin_command)
        except HubUnreachable as error:
            missing[f"model {loaded.config.model.base_model}"] = error.format_message()
        except ConfigError as error:
            refused[name] = error
    if refused:
        raise _refusal(refused, bases, echo)
    for source in sources_of(plan):
        echo(in_columns("fetch", str(source)))
        if source.kind == "dataset" and source.why.startswith("the task "):
            continue  # each by its own reader, below
        try:
            fetch(source.repository, source.revision, kind=source.kind, why=source.why, key=source.why)
        except ConfigError as error:
            missing[str(source)] = error.format_message()
    for task in select_tasks(task_names(plan.tasks)):
        try:
            load(task)
            task.unload_data()
        except ConfigError as error:
            missing[f"task {task.metadata.name}"] = error.format_message()
    for name, why in missing.items():
        echo(in_columns("fetch", f"not done: {name}: {why}"))
    return missing


def _refusal(
    refused: dict[str, ConfigError], bases: dict[str, LoadedConfig], echo: Callable[[str], None]
) -> ConfigError:
    """The message of `make train`, or how to go on without the configs that were refused, whose messages are printed."""
    if len(bases) == 1:
        return next(iter(refused.values()))
    for name, error in refused.items():
        echo(f"{name}: {error.format_message()}")
    others = " ".join(name for name in bases if name not in refused)
    without = f', or leave them out: ONLY="{others}"' if others else ""
    return ConfigError(
        f"{', '.join(refused)} cannot be trained as configured (see above). Nothing was started. Mend them{without}"
    )
