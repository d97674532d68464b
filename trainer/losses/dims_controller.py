"""Finds the weight of a regularizer at which vectors have the number of active dims that the config asks for."""

import math

import torch
from torch import Tensor

from trainer.losses.regularizers import Step


class DimsController:
    """Finds the weight at which a route's vectors have `target` active dims: PI control of log weight by log dims.

    The error is log(measured / wanted). `measured` is the mean over the rows that the loss saw, the newest steps counting
    most: data sets take turns, and their texts differ in number and length. `wanted` glides from what the model starts with
    to the target, so the error stays small and the weight does not overshoot. The weight answers to the error and its sum:

        log weight = level + GAIN · error        level += GAIN · error / (INTEGRAL · steps) + FORWARD · change of wanted

    Everything is relative, to the run's steps and to the loss that the penalty works against. That loss grows with the
    in-batch negatives (on tests/benchmarks/target.yaml it is 0.8 at a batch of 8, 1.8 at 32), and with it the penalty that
    holds the same dims: with absolute bounds, the weight stood at the upper one from step 50 to 200 of 600 at a batch of
    32. The constants were found on that config, where twice the gain oscillates.
    """

    GAIN = 1.5  # dims change by 5 %: the weight by 7.5 %
    FORWARD = 1.0  # `wanted` changes by 5 %: the weight by 5 %, before any error shows
    SMOOTHING = 0.02  # share of the run that `measured` looks back on, at least ten steps
    # An error of 5 % changes the weight by another 7.5 % in this share of the run, at least 20 steps. At 0.03, dims of a
    # batch of 32 swung from 252 to 13 and 177 on the way to 100.
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

    def __init__(self, target: int) -> None:
        self.target, self.steps = target, 0
        self.log_weight = self.level = self.first = self.dims = self.rows = self.start = 0.0
        self.ranking_loss = 0.0

    @property
    def measured(self) -> float:
        """Mean active dims of the rows of the newest steps."""
        return max(self.dims / self.rows, 1.0)

    def update(self, step: Step, ranking_loss: float, at: int, of: int) -> float:
        """The weight for the next step, after step number `at` of `of`. ranking_loss: the step's, without regularizers."""
        penalty = max(step.penalty, 1e-9)
        if self.steps == 0:
            self.first = self.level = math.log(self.FIRST_PENALTY * max(ranking_loss, 1e-9) / penalty)
        self.steps += 1
        newest = max(1 / max(self.SMOOTHING * of, 10), 1 / self.steps)
        self.dims += newest * (step.active_dims * step.rows - self.dims)
        self.rows += newest * (step.rows - self.rows)
        self.ranking_loss += newest * (max(ranking_loss, 1e-9) - self.ranking_loss)
        before, wanted = self._wanted((at - 1) / of), self._wanted(at / of)
        error = min(math.log(self.measured / wanted), self.MOST_ERROR)
        lowest = self.first + math.log(self.LEAST_PENALTY / self.FIRST_PENALTY)
        highest = min(self.first + math.log(self.HIGHEST), math.log(self.MOST_PENALTY * self.ranking_loss / penalty))
        felt = math.log(self.FELT_PENALTY * self.ranking_loss / penalty)
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

    NUMBERS = ("log_weight", "level", "first", "dims", "rows", "start", "ranking_loss", "steps")

    def state(self) -> Tensor:
        """The state for a checkpoint: NUMBERS."""
        return torch.tensor([float(getattr(self, name)) for name in self.NUMBERS], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Continue from the state of a checkpoint."""
        for name, value in zip(self.NUMBERS, state.tolist(), strict=True):
            setattr(self, name, type(getattr(self, name))(value))
