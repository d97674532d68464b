"""Where a run begins, and what must be unchanged when it is resumed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config import Config, ConfigError, LoadedConfig
from trainer.data.training_data import TrainingData
from trainer.runs.checkpoints import best_of, newest_complete, remove_leftovers, require_unchanged, step_of
from trainer.runs.run import Run
from trainer.system.distributed import from_first, is_first, processes
from trainer.training.start_weights import require_start_weights


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or after a checkpoint."""

    checkpoint: Path | None = None
    packed_texts: bool | None = None
    """Whether the resumed run packs its texts; None for a new one, which decides."""

    @property
    def step(self) -> int:
        """Steps that are already trained."""
        return step_of(self.checkpoint) if self.checkpoint else 0


START = Start()


def find_start(config: Config, run: Run, resume: bool, echo: Callable[[str], None]) -> Start:
    """Where training begins, the same in all processes. Raises ConfigError where the run cannot go on from there."""
    checkpoint = from_first(_newest_checkpoint(config, run, echo) if resume and is_first() else None)
    if resume:
        echo(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint: starting from step 0")
    check_same_batches(config, run, echo)
    return Start(checkpoint, run.manifest.get("packed_texts", False)) if checkpoint else Start()


def _newest_checkpoint(config: Config, run: Run, echo: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from. Raises ConfigError now where the last step would lack something."""
    remove_leftovers(run.folder, run.checkpoints)
    checkpoint = newest_complete(run.checkpoints, run.id, echo)
    best = best_of(checkpoint) if checkpoint and config.training.load_best_model_at_end else None
    if best is not None:
        require_unchanged(best, run.id)
    if checkpoint and config.training.start_share:
        require_start_weights(run)
    return checkpoint


def check_same_data(data: TrainingData, run: Run) -> None:
    """Raise ConfigError when a resumed run would go on with other rows than it started with."""
    for name, known in run.manifest.get("datasets", {}).items():
        if name in data.summaries and data.summaries[name].fingerprint != known["fingerprint"]:
            raise ConfigError(
                f"the rows of data set '{name}' have changed since {run.folder} was started. "
                "Put them back, or train anew under a new name"
            )


def check_same_batches(config: Config, run: Run, echo: Callable[[str], None]) -> None:
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
    echo(f"changed   processes: {earlier} → {processes()}, with the same batches")
    run.manifest.setdefault("changes", []).append({"key": "processes", "from": earlier, "to": processes()})


def check_steps_left(loaded: LoadedConfig, step: int, steps: int, echo: Callable[[str], None]) -> None:
    """Say so when a resumed run has no step left. Raises ConfigError when it has more behind it than the config wants."""
    key = "max_steps" if loaded.config.training.max_steps > 0 else "num_train_epochs"
    if step > steps:
        raise ConfigError(
            f"{loaded.where('training', key)}: 'training.{key}' ends the run after step {steps}, and its checkpoint has "
            f"trained {step}. Raise it, or set training.max_steps to {step} to end with what there is"
        )
    if step == steps:
        echo(f"steps     none left after step {step}: what decides how to train has no effect any more")
