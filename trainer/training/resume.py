"""What a resumed run goes on from, and what has to be as it was for that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import Config, ConfigError, LoadedConfig
from trainer.data.training_data import TrainingData
from trainer.runs.checkpoints import best_of, newest_complete, remove_leftovers, require_unchanged
from trainer.runs.run import Run
from trainer.system.distributed import from_first, processes
from trainer.training.evaluators import SearchEvaluator

Say = Callable[[str], None]
# Keys of the sections evaluation and loss that no score in training depends on.
UNSCORED = {"mteb_tasks", "track_sparsity", "log_decoded_samples", "teacher", "cached", "mini_batch_size"}


def where_to_go_on(config: Config, run: Run, say: Say) -> Path | None:
    """The checkpoint to resume from. Raises ConfigError now, not at the last step, when the best one is damaged."""
    remove_leftovers(run.folder, run.checkpoints)
    checkpoint = newest_complete(run.checkpoints, run.id, say)
    best = best_of(checkpoint) if checkpoint and config.training.load_best_model_at_end else None
    if best is not None:
        require_unchanged(best, run.id)
    return checkpoint


def check_same_data(data: TrainingData, run: Run) -> None:
    """Raise ConfigError when a resumed run would go on with other rows than it started with."""
    for name, known in run.manifest.get("datasets", {}).items():
        if name in data.summaries and data.summaries[name].fingerprint != known["fingerprint"]:
            raise ConfigError(
                f"the rows of data set '{name}' have changed since {run.folder} was started. "
                "Put them back, or train anew under a new name"
            )


def check_same_batches(config: Config, run: Run, say: Say) -> None:
    """Raise ConfigError when another number of processes would make a resumed run's batches larger or smaller."""
    known, size = run.manifest, config.training.per_device_train_batch_size
    earlier, rows = known.get("processes", processes()), known.get("rows_per_batch", size * processes())
    if earlier == processes():
        return
    if rows != size * processes():
        raise ConfigError(
            f"{run.folder} was started with batches of {rows} rows in {earlier} process{'es' * (earlier > 1)}, and would "
            f"go on with {processes()} × {size}. Start {earlier} again (PROCS, --processes), or set "
            f'SET="training.per_device_train_batch_size={rows // processes()}"'
        )
    say(f"changed   processes: {earlier} → {processes()}, with the same batches")
    run.manifest.setdefault("changes", []).append({"key": "processes", "from": earlier, "to": processes()})


def check_steps_left(loaded: LoadedConfig, step: int, steps: int, say: Say) -> None:
    """Say so when a resumed run has no step left. Raises ConfigError when it has more behind it than the config wants."""
    key = "max_steps" if loaded.config.training.max_steps > 0 else "num_train_epochs"
    if step > steps:
        raise ConfigError(
            f"{loaded.where('training', key)}: 'training.{key}' ends the run after step {steps}, and its checkpoint has "
            f"trained {step}. Raise it, or set training.max_steps to {step} to end with what there is"
        )
    if step == steps:
        say(f"steps     none left after step {step}: what decides how to train has no effect any more")


def what_best_is_chosen_by(
    config: Config, evaluator: SearchEvaluator | None, metric: str | None, choices: list[dict[str, Any]]
) -> dict[str, Any]:
    """All that a checkpoint's score depends on besides the weights: where it is the same, two scores can be compared."""
    found: dict[str, Any] = {"metric": metric, "max_seq_length": config.training.max_seq_length}
    if evaluator:
        found |= {f"evaluation.{key}": value for key, value in config.evaluation.model_dump(exclude=UNSCORED).items()}
        found["searches"] = sorted(evaluator.parts)
        found["queries that choose"] = choices
    elif metric:
        found |= {f"loss.{key}": value for key, value in config.loss.model_dump(exclude=UNSCORED).items()}
        found["rows per batch in evaluation"] = config.training.per_device_eval_batch_size * processes()
    return from_first(found)


def what_differs(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Why the scores of two checkpoints cannot be compared."""
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return f"they were measured otherwise ({', '.join(names)})"
