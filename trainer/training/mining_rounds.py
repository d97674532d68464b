"""Rounds of mining with the model that is being trained: the steps end at a round's checkpoint, and go on from there.

It goes on as a resumed run does, so one that is killed and resumed has the same negatives at every step, and the same bits.
"""

from collections.abc import Callable
from functools import partial

import pyarrow as pa
from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.config import Config, ConfigError
from trainer.data.self_mining import ToMine
from trainer.data.training_data import TrainingData
from trainer.encoding.fuse import fuse
from trainer.encoding.windows import read_in_windows
from trainer.hub.cache import cached_table
from trainer.models.build import load_model
from trainer.runs.run import Run
from trainer.system.distributed import from_first, is_first
from trainer.system.progress_bar import going_on, in_columns
from trainer.training.resume import Start


def steps_of_rounds(data: TrainingData, last: int) -> list[int]:
    """The steps of a run of `last` steps after which a set is mined again."""
    return sorted({step for mine in data.to_mine.values() for step in mine.settings.steps_of_rounds(last)})


def mine_again(
    config: Config, data: TrainingData, run: Run, start: Start, last: int, device: str, echo: Callable[[str], None]
) -> None:
    """Give each set the negatives of its newest round, mined with that round's checkpoint where this was not done yet.

    last: the run's last step.
    Raises ConfigError when a round's negatives are gone, and so is the checkpoint that would find them again.
    """
    for name, to_mine in data.to_mine.items():
        rounds = to_mine.settings.steps_of_rounds(last)
        files = {step: run.folder / "mined" / f"{name}-step-{step}.parquet" for step in rounds}
        for step, file in files.items():
            if step > start.step and is_first():  # of a model that is trained anew from here
                file.unlink(missing_ok=True)
        number = sum(step <= start.step for step in rounds)
        if not number:
            continue
        step = rounds[number - 1]
        file = files[step]
        is_new = from_first(not file.is_file() if is_first() else None)
        if is_new and start.step != step:
            raise ConfigError(
                f"{file} is gone, which holds the negatives of this run. Put it back, or train anew under a new name"
            )
        mined = cached_table(file, partial(_mine, to_mine, config, start, device)) if is_first() else None
        table, changed = to_mine.with_mined(from_first(mined))
        data.replace_mined(name, table, config)
        if is_new:
            own = int(to_mine.is_mined.sum())
            when = f"round {number} of {to_mine.settings.rounds}, after step {step}"
            echo(in_columns("mining", f"{name}: {when}: {changed:,} negatives are others than BM25's, in {own:,} rows"))


def _mine(to_mine: ToMine, config: Config, start: Start, device: str) -> pa.Table:
    assert start.checkpoint is not None
    model = load_model(start.checkpoint, config, device).eval()
    fuse(model, device)
    if config.model.long_documents == "windows":
        read_in_windows(model)
    with going_on(in_columns("mining", "encoding"), len(to_mine.search.passages), "passages") as progress:
        return to_mine.mine(model, config.training.per_device_eval_batch_size, progress)


class StopForRound(TrainerCallback):
    """Ends the steps where a round begins. Its checkpoint is due at that step."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Stop after the steps of rounds."""
        if state.global_step in self.steps:
            control.should_training_stop = True
