"""What `make prove` does, as steps: each trains or measures one system with an ordinary command."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evaluate.dense import dense_name
from evaluate.tasks import select_tasks, task_names
from evaluate.trust import registry_entry
from trainer.config import ConfigError, LoadedConfig, find_config, load_config
from trainer.runs.run import MODELS
from trainer.system.progress_bar import in_columns

FOLDER = MODELS / "prove"
# What systems without a run folder score goes there: BM25 and the dense models.
BASELINES = FOLDER / "eval"
CONFIGS = (
    "splade",
    "splade_regular",
    "splade_large",
    "csr",
    "splade_h100",
    "splade_regular_h100",
    "splade_large_h100",
    "csr_h100",
)
TASKS = "scandinavian nano"
BM25 = "bm25"
DENSE = ("intfloat/multilingual-e5-small", "intfloat/multilingual-e5-base", "intfloat/multilingual-e5-large")
# Inference-free, as most of our configs. It was never scored on these tasks.
SPARSE = "opensearch-project/opensearch-neural-sparse-encoding-multilingual-v1"


@dataclass(frozen=True)
class Subject:
    """A system that gets a row in the table, the folder of its scores, and its name among the systems there."""

    name: str
    results: Path
    system: str
    config: LoadedConfig | None = field(default=None, compare=False)
    """Of a run; None for a baseline."""
    source: str | None = None
    """The hub repository of a baseline."""
    revision: str | None = None


@dataclass(frozen=True)
class Step:
    """One command: what follows `python -m`. `key` is its name in steps.json."""

    key: str
    subject: Subject
    command: tuple[str, ...]
    needs: str | None = None
    """The step that must have succeeded before."""

    @property
    def trains(self) -> bool:
        """Whether it makes a run."""
        return self.command[:2] == ("trainer", "train")


@dataclass(frozen=True)
class Plan:
    """All that is to be done, in order. `others`: steps of the eight configs that were not asked for this time."""

    tasks: str
    configs: tuple[LoadedConfig, ...]
    steps: tuple[Step, ...]
    others: tuple[Step, ...]

    @property
    def known(self) -> tuple[Step, ...]:
        """The steps, and the others: all that the table may have a row of."""
        return (*self.steps, *self.others)


def make_plan(only: Sequence[str], tasks: str, overrides: Sequence[str], echo: Callable[[str], None]) -> Plan:
    """The steps of these configs (all eight where none is named). Raises ConfigError for what is no config or task."""
    tasks = tasks or TASKS
    select_tasks(task_names(tasks))
    configs: dict[str, LoadedConfig] = {}
    sets: dict[str, tuple[str, ...]] = {}
    for name in only or CONFIGS:
        loaded = load_config(find_config(name), overrides)
        device = device_here(loaded)
        if device:
            echo(in_columns("device", f"{loaded.name}: {device} in place of the GPU of a Mac, which is not here"))
        sets[loaded.name] = (*([f"hardware.device={device}"] if device else []), *overrides)
        configs[loaded.name] = load_config(loaded.file, sets[loaded.name])
    steps = [*_baselines(tasks), *_steps_of(tasks, configs, sets)]
    others = {name: load_config(find_config(name)) for name in CONFIGS if name not in configs}
    keys = {step.key for step in steps}
    rest = [step for step in _steps_of(tasks, others, dict.fromkeys(others, ())) if step.key not in keys]
    return Plan(tasks, tuple(configs.values()), tuple(steps), tuple(rest))


def _steps_of(tasks: str, configs: dict[str, LoadedConfig], sets: dict[str, tuple[str, ...]]) -> Iterator[Step]:
    """The dense parents of the configs that have one, each once; then each config's training and measurement."""
    parents = {parent: loaded for loaded in configs.values() if (parent := parent_of(loaded))}
    for loaded in parents.values():
        yield _dense_parent(tasks, loaded, sets[loaded.name])
    for name, loaded in configs.items():
        subject = Subject(name, MODELS / name / "eval", name, loaded)
        options = _set_options(sets[name])
        train = Step(f"train {name}", subject, ("trainer", "train", config_argument(loaded), *options))
        yield train
        measure = ("evaluate", "run", "--model", str(MODELS / name), "--tasks", tasks)
        yield Step(f"evaluate {name}", subject, measure, train.key)


def device_here(loaded: LoadedConfig) -> str | None:
    """The device for a config that is written for a Mac, on a machine with an NVIDIA GPU; None where the config's stays."""
    is_elsewhere = loaded.config.hardware.device == "mps" and not torch.backends.mps.is_available()
    return "cuda" if is_elsewhere and torch.cuda.is_available() else None


def config_argument(loaded: LoadedConfig) -> str:
    """What the command line calls the config: its name where that is enough."""
    try:
        return loaded.name if find_config(loaded.name).resolve() == loaded.file.resolve() else str(loaded.file)
    except ConfigError:
        return str(loaded.file)


def _baselines(tasks: str) -> list[Step]:
    """BM25, the dense models and the sparse one."""
    output = ("--tasks", tasks, "--output", str(BASELINES))
    steps = [Step("baseline bm25", Subject("BM25", BASELINES, BM25), ("evaluate", "bm25", *output))]
    for source in DENSE:
        revision = registry_entry(source).revision
        subject = Subject(source, BASELINES, dense_name(source), source=source, revision=revision)
        steps.append(Step(f"baseline {source}", subject, ("evaluate", "dense", f"{source}@{revision}", *output)))
    revision, folder = registry_entry(SPARSE).revision, MODELS / SPARSE.replace("/", "__")
    subject = Subject(SPARSE, folder / "eval", SPARSE.partition("/")[2], source=SPARSE, revision=revision)
    measure = ("evaluate", "run", "--model", SPARSE, "--revision", revision, "--tasks", tasks)
    return [*steps, Step(f"baseline {SPARSE}", subject, measure)]


def _dense_parent(tasks: str, loaded: LoadedConfig, overrides: tuple[str, ...]) -> Step:
    model = loaded.config.model
    subject = Subject(
        f"{model.base_model} (dense parent)",
        BASELINES,
        dense_name(model.base_model),
        source=model.base_model,
        revision=model.revision,
    )
    options = ("--parent-of", config_argument(loaded), *_set_options(overrides))
    command = ("evaluate", "dense", *options, "--tasks", tasks, "--output", str(BASELINES))
    return Step(f"baseline {model.base_model}", subject, command)


def _set_options(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for text in overrides for part in ("--set", text))


def parent_of(loaded: LoadedConfig) -> tuple[str, str | None] | None:
    """Name and revision of the dense model that a CSR config starts from."""
    model = loaded.config.model
    return None if loaded.config.loss.has_regularizers else (model.base_model, model.revision)
