"""The weights of the penalties over a run: warmed up, and driven to a number of active dims where the config names one."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from torch import Tensor
from transformers import TrainerControl, TrainerState

from trainer.config import Config, ConfigError
from trainer.losses.regularizers import Penalty, Step
from trainer.system.distributed import total

STATE = "regularizer.safetensors"
ROUTES = ("document", "query")


class DimsController:
    """Finds the weight at which a route's vectors have `target` active dims: PI control of log weight by log dims.

    The error is log(measured / wanted). `measured` is the mean over the rows that the loss saw, the newest steps counting
    most: data sets take turns, and their texts differ in number and length. `wanted` glides from what the model
    starts with to the target, so the error stays small and the weight does not overshoot. The weight answers to the error
    and to its sum:

        log weight = level + GAIN · error        level += GAIN · error / (INTEGRAL · steps) + FORWARD · change of wanted

    Everything is relative, to the run's steps and to the loss that the penalty works against: no unit of the penalty, the
    vocabulary or the batch is in here. That loss grows with the in-batch negatives (on tests/benchmarks/target.yaml it is
    0.8 at a batch of 8, 1.8 at 32), and the penalty that holds the same dims with it: with bounds in absolute numbers the
    weight stood at the upper one from step 50 to 200 at a batch of 32, and 100 dims were reached after step 250 of 600.
    The constants were found on that config, where twice the gain oscillates.
    """

    GAIN = 1.5  # dims change by 5 %: the weight by 7.5 %
    FORWARD = 1.0  # `wanted` changes by 5 %: the weight by 5 %, before any error shows
    SMOOTHING = 0.02  # share of the run that `measured` looks back on, at least ten steps
    # An error of 5 % changes the weight by another 7.5 % in this share of the run, at least 20 steps. At 0.03, dims of a
    # batch of 32 swung from 252 to 13 and 177 on the way to 100, and by a quarter still at a third of the run.
    INTEGRAL = 0.045
    WARM_UP = 0.1  # share of the run; the quadratic warm-up that fixed weights have over a third
    GLIDE = (0.02, 0.15)  # shares of the run between which `wanted` goes from the start to the target
    # Of weight × penalty, as shares of the loss it works against:
    FIRST_PENALTY = 0.1  # at the start; less does nothing
    # Never more: activations fall first, dims some steps later, all at once. At 2, a small model at a learning rate of
    # 1e-3 fell from 248 dims to 0 within 30 steps, from where no gradient leads back.
    MOST_PENALTY = 0.6
    MOST_ERROR = 0.5  # of an error upwards, and in the sum: a weight that is far too high is lowered at once
    # With less, dims hardly answer: on target.yaml 5.7 of log weight took 290 dims to 200 dims, up to a share of 0.3, and
    # another 1.2 to 100. There the sum grows faster.
    FELT_PENALTY, FASTER = 0.3, 3.5
    FASTEST = 0.05  # change of the sum per step
    LEAST_PENALTY = 0.01  # at the start's activations; less has no effect, and the way back would be long
    HIGHEST = 1e4  # times the first weight

    def __init__(self, target: int):
        self.target, self.steps = target, 0
        self.log_weight = self.level = self.first = self.dims = self.rows = self.start = 0.0
        self.against = 0.0

    @property
    def measured(self) -> float:
        """Mean active dims of the rows of the newest steps."""
        return max(self.dims / self.rows, 1.0)

    def update(self, step: Step, against: float, at: int, of: int) -> float:
        """The weight for the next step, after step number `at` of `of`. against: the step's loss without penalties."""
        penalty = max(step.penalty, 1e-9)
        if self.steps == 0:
            self.first = self.level = math.log(self.FIRST_PENALTY * max(against, 1e-9) / penalty)
        self.steps += 1
        newest = max(1 / max(self.SMOOTHING * of, 10), 1 / self.steps)
        self.dims += newest * (step.active_dims * step.rows - self.dims)
        self.rows += newest * (step.rows - self.rows)
        self.against += newest * (max(against, 1e-9) - self.against)
        before, wanted = self._wanted((at - 1) / of), self._wanted(at / of)
        error = math.log(self.measured / wanted)
        error = min(error, self.MOST_ERROR)
        lowest = self.first + math.log(self.LEAST_PENALTY / self.FIRST_PENALTY)
        highest = min(self.first + math.log(self.HIGHEST), math.log(self.MOST_PENALTY * self.against / penalty))
        felt = math.log(self.FELT_PENALTY * self.against / penalty)
        faster = 1 + self.FASTER * max(felt - self.level, 0.0)
        change = faster * self.GAIN * max(error, -self.MOST_ERROR) / max(self.INTEGRAL * of, 20)
        self.level += self.FORWARD * math.log(before / wanted) + min(max(change, -self.FASTEST), self.FASTEST)
        self.level = min(max(self.level, lowest), highest)
        self.log_weight = min(max(self.level + self.GAIN * error, lowest), highest)
        return self.weight

    @property
    def weight(self) -> float:
        """The weight for the next step."""
        return math.exp(self.log_weight)

    def _wanted(self, share: float) -> float:
        first, last = self.GLIDE
        if share <= first:
            self.start = self.measured
        way = min(max((share - first) / (last - first), 0.0), 1.0)
        return self.start * (self.target / self.start) ** way

    NUMBERS = ("log_weight", "level", "first", "dims", "rows", "start", "against", "steps")

    def state(self) -> Tensor:
        """What a checkpoint keeps: NUMBERS."""
        return torch.tensor([float(getattr(self, name)) for name in self.NUMBERS], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what a checkpoint kept."""
        for name, value in zip(self.NUMBERS, state.tolist(), strict=True):
            setattr(self, name, type(getattr(self, name))(value))


class WeightSchedule(SpladeRegularizerWeightSchedulerCallback):
    """The library's warm-up of both weights; a controller says the value of one whose target is named.

    After every optimizer step all processes hold the same sums over the step's rows, hence the same weights. A controller
    is also told the loss that the penalties work against: what the library's loss asks its inner one for.
    """

    def __init__(self, loss: SpladeLoss, config: Config):
        targets = {"document": config.loss.target_document_dims, "query": config.loss.target_query_dims}
        self.controllers = {route: DimsController(target) for route, target in targets.items() if target}
        super().__init__(loss, warmup_ratio=DimsController.WARM_UP if self.controllers else 1 / 3)
        if self.controllers:
            self.loss.loss.noted = []  # of each batch of this step

    def _settle_against(self) -> float:
        """Mean over the step's batches and all processes."""
        noted, self.loss.loss.noted = self.loss.loss.noted, []
        seen, batches = total(float(sum(noted)), len(noted))
        return seen / batches

    def penalty(self, route: str) -> Penalty:
        """The penalty on queries or documents."""
        return getattr(self.loss, f"{route}_regularizer")

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take in the step; choose the next weights."""
        against = self._settle_against() if self.controllers else 0.0
        for route in ROUTES:
            step = self.penalty(route).settle(read=route in self.controllers)
            if step:
                weight = self.controllers[route].update(step, against, state.global_step, state.max_steps)
                self._set_weight(route, weight)

    def _set_weight(self, route: str, weight: float) -> None:
        setattr(self, f"max_{route}_regularizer_weight", weight)  # where the library's warm-up reads it

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each route with a target: the target, the dims at the end, and the weight that gave them."""
        return {
            route: {
                "target_dims": found.target,
                "active_dims": round(found.measured, 1),
                "weight": float(f"{found.weight:.4g}"),
            }
            for route, found in self.controllers.items()
        }

    def lines(self) -> Iterator[str]:
        """What was asked for and what came of it, where a target was named."""
        for route, found in self.summary().items():
            yield (
                f"sparsity  {found['active_dims']:g} active dims per training {route} at the end, of the "
                f"{found['target_dims']} asked for, with weight {found['weight']:g}"
            )

    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run goes on from."""
        found = {f"{route}.{name}": value for route in ROUTES for name, value in self.penalty(route).state().items()}
        found |= {f"{route}.controller": controller.state() for route, controller in self.controllers.items()}
        save_file({name: value.cpu().contiguous() for name, value in found.items()}, checkpoint / STATE)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint. Raises ConfigError when it was written under another choice of targets."""
        if not (checkpoint / STATE).is_file():
            raise ConfigError(f"{checkpoint} lacks {STATE}: an earlier version wrote it. Train anew under a new name")
        found = load_file(checkpoint / STATE)
        for route in ROUTES:
            self.penalty(route).load({name: found[f"{route}.{name}"] for name in ("running", "steps")})
            if (f"{route}.controller" in found) != (route in self.controllers):
                was = "with" if f"{route}.controller" in found else "without"
                raise ConfigError(
                    f"loss.target_{route}_dims: {checkpoint} was written {was} one. Put it back as it was, or train anew "
                    "under a new name"
                )
            if route in self.controllers and len(found[f"{route}.controller"]) != len(DimsController.NUMBERS):
                raise ConfigError(f"{checkpoint / STATE}: an earlier version wrote it. Train anew under a new name")
        for route, controller in self.controllers.items():
            controller.load(found[f"{route}.controller"])
            self._set_weight(route, controller.weight)
