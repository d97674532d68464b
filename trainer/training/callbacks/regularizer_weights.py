"""The weights of the regularizers over a run: warmed up, and driven to the active dims that the config asks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from transformers import TrainerControl, TrainerState

from trainer.config import Config, ConfigError
from trainer.losses.dims_controller import DimsController
from trainer.losses.regularizers import Regularizer
from trainer.system.distributed import total

STATE = "regularizer.safetensors"
ROUTES = ("document", "query")


class RegularizerWeights(SpladeRegularizerWeightSchedulerCallback):
    """The library's warm-up of both weights; a controller says the value of one whose target is named.

    After every optimizer step all processes hold the same sums over the step's rows, hence the same weights. A controller
    is also told the ranking loss, which the regularizers work against.
    """

    def __init__(self, loss: SpladeLoss, config: Config) -> None:
        targets = {"document": config.loss.target_document_dims, "query": config.loss.target_query_dims}
        self.controllers = {route: DimsController(target) for route, target in targets.items() if target}
        self.before_mixing = ", before its weights were mixed" if config.training.start_share else ""
        super().__init__(loss, warmup_ratio=DimsController.WARM_UP if self.controllers else 1 / 3)
        if self.controllers:
            self.loss.loss.recorded_losses = []  # of each batch of this step

    def _mean_ranking_loss(self) -> float:
        """Mean over the step's batches and all processes."""
        recorded, self.loss.loss.recorded_losses = self.loss.loss.recorded_losses, []
        loss, batches = total(float(sum(recorded)), len(recorded))
        return loss / batches

    def regularizer(self, route: str) -> Regularizer:
        """The regularizer of queries or documents."""
        return getattr(self.loss, f"{route}_regularizer")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in the step; choose the next weights."""
        ranking_loss = self._mean_ranking_loss() if self.controllers else 0.0
        for route in ROUTES:
            step = self.regularizer(route).finish_step(read=route in self.controllers)
            if step:
                weight = self.controllers[route].update(step, ranking_loss, state.global_step, state.max_steps)
                self._set_weight(route, weight)

    def _set_weight(self, route: str, weight: float) -> None:
        setattr(self, f"max_{route}_regularizer_weight", weight)  # where the library's warm-up reads it

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each route with a target: the target, the dims at the end, and the weight that gave them."""
        return {
            route: {
                "target_dims": controller.target,
                "active_dims": round(controller.measured, 1),
                "weight": float(f"{controller.weight:.4g}"),
            }
            for route, controller in self.controllers.items()
        }

    def lines(self) -> Iterator[str]:
        """The active dims asked for and those reached, where the config has a target."""
        for route, values in self.summary().items():
            yield (
                f"sparsity  {values['active_dims']:g} active dims per training {route} at the end, of the "
                f"{values['target_dims']} asked for, with weight {values['weight']:g}{self.before_mixing}"
            )

    def save(self, checkpoint: Path) -> None:
        """Write the state of regularizers and controllers, for a resume."""
        state = {
            f"{route}.{name}": value for route in ROUTES for name, value in self.regularizer(route).state().items()
        }
        state |= {f"{route}.controller": controller.state() for route, controller in self.controllers.items()}
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, checkpoint / STATE)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. Raises ConfigError when it was written under another choice of targets."""
        if not (checkpoint / STATE).is_file():
            raise ConfigError(f"{checkpoint} lacks {STATE}: an earlier version wrote it. Train anew under a new name")
        state = load_file(checkpoint / STATE)
        for route in ROUTES:
            self.regularizer(route).load(
                {name.removeprefix(f"{route}."): value for name, value in state.items() if name.startswith(f"{route}.")}
            )
            if (f"{route}.controller" in state) != (route in self.controllers):
                was = "with" if f"{route}.controller" in state else "without"
                raise ConfigError(
                    f"loss.target_{route}_dims: {checkpoint} was written {was} one. Put it back as it was, or train anew "
                    "under a new name"
                )
            if route in self.controllers and len(state[f"{route}.controller"]) != len(DimsController.NUMBERS):
                raise ConfigError(f"{checkpoint / STATE}: an earlier version wrote it. Train anew under a new name")
        for route, controller in self.controllers.items():
            controller.load(state[f"{route}.controller"])
            self._set_weight(route, controller.weight)
