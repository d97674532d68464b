"""How far a run has come: its place in the order of batches, and the rows drawn so far, however large its batches were."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.config import Config
from trainer.data.training_data import TrainingData

FILE = "progress.safetensors"


class Progress:
    """Kept in every checkpoint, and counted on from there by a resumed run.

    Another batch size, or another number of batches accumulated or of processes, makes other batches of the same rows. The
    run then goes on at the same share of the epoch, so each row is still seen about once in a pass, and epochs stay epochs.
    """

    def __init__(self, config: Config, data: TrainingData) -> None:
        self.config, self.data = config, data
        self.mixture = data.mixture(config)
        self.steps_per_epoch = max(math.ceil(len(self.mixture) / config.training.gradient_accumulation_steps), 1)
        self.step = self.place = 0
        self.drawn = dict.fromkeys(data.subsets, 0)
        self.seen = {subset: np.zeros(len(rows), dtype=bool) for subset, rows in data.train.items()}
        self.depends_on: dict[str, Any] | None = None  # what scores depended on so far, where that is known

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        training = self.config.training
        if training.max_steps > 0:
            return training.max_steps
        return self.step - self.place + math.ceil(training.num_train_epochs * self.steps_per_epoch)

    @property
    def epochs(self) -> float:
        """Epochs of the whole run."""
        return self.place_at(self.steps) / self.steps_per_epoch

    def place_at(self, step: int) -> int:
        """How many steps, as they are now, the order of batches has come to after this step of the run."""
        return self.place + step - self.step

    def batches_before(self, step: int) -> int:
        """Number of the first batch, in the order as it is now, that is drawn after this step of the run."""
        epochs, steps = divmod(self.place_at(step), self.steps_per_epoch)
        batches = len(self.mixture)
        return epochs * batches + min(steps * self.config.training.gradient_accumulation_steps, batches)

    def plan(self) -> None:
        """Set in the data's summaries how many rows the whole run will have drawn, and how many different ones."""
        drawn = self.data.rows_of(
            self.config, self.mixture, self.batches_before(self.step), self.batches_before(self.steps)
        )
        for name, subsets in self.data.subsets.items():
            summary, (rows, different) = self.data.summaries[name], drawn[name]
            summary.rows_drawn = self.drawn[name] + rows
            summary.rows_seen = min(sum(int(self.seen[subset].sum()) for subset in subsets) + different, summary.rows)

    def count(self, step: int) -> None:
        """Count the rows of the steps up to this one; set in the data's summaries how many there were so far."""
        names, groups = list(self.data.subsets), list(self.data.subsets.values())
        for group, number, pass_number, batch in self.mixture.between(
            self.batches_before(self.step), self.batches_before(step)
        ):
            subset = groups[group][number]
            rows = self.data.batches(subset, self.config).batches(pass_number)[batch]
            self.drawn[names[group]] += len(rows)
            self.seen[subset][rows] = True
        if step > self.step:
            self.step, self.place = step, self.place_at(step)
        for name, subsets in self.data.subsets.items():
            summary = self.data.summaries[name]
            summary.rows_drawn = self.drawn[name]
            summary.rows_seen = sum(int(self.seen[subset].sum()) for subset in subsets)

    def is_comparable(self, depends_on: dict[str, Any]) -> bool:
        """Whether scores of the checkpoints so far depend on the same things as those of the next ones."""
        return self.depends_on in (None, depends_on)

    def save(self, checkpoint: Path, depends_on: dict[str, Any]) -> None:
        """Write what a resumed run counts on from, and what the best checkpoint is chosen by."""
        tensors = {f"seen.{subset}": torch.from_numpy(np.packbits(seen)) for subset, seen in self.seen.items()}
        tensors |= {f"drawn.{name}": torch.tensor(rows) for name, rows in self.drawn.items()}
        tensors["place"] = torch.tensor([self.place, self.steps_per_epoch])
        save_file(tensors, checkpoint / FILE, {"chosen_by": json.dumps(depends_on)})

    def load(self, checkpoint: Path, step: int, echo: Callable[[str], None]) -> None:
        """Count on from a checkpoint at this step; from the first step, as if batches had always been these, where an
        earlier version wrote it."""
        if not (checkpoint / FILE).is_file():
            echo(f"rows      {checkpoint} does not say which were drawn: they are counted as of batches like those now")
            return
        with safe_open(checkpoint / FILE, "pt") as file:
            place, of = file.get_tensor("place").tolist()
            self.step, self.place = step, round(place * self.steps_per_epoch / of)
            self.drawn = {name: int(file.get_tensor(f"drawn.{name}")) for name in self.drawn}
            for subset, seen in self.seen.items():
                seen[:] = np.unpackbits(file.get_tensor(f"seen.{subset}").numpy(), count=len(seen))
            self.depends_on = json.loads(file.metadata()["chosen_by"])
