"""SparseEncoderTrainer with our batches, a stop on a non-finite loss, and a best checkpoint that is really loaded."""

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.sparse_encoder import SparseEncoderTrainer
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from trainer.data.batches import MixedBatches, NoDuplicateBatches
from trainer.data.forward_passes import forward_passes_of
from trainer.data.tokens import TokenCollator
from trainer.models.remote_code import keep_code
from trainer.runs.checkpoints import (
    ASIDE,
    checkpoint_at,
    put_in_place,
    remove_oldest,
    require_unchanged,
    seal,
    step_of,
    written_aside,
)
from trainer.system.device import give_back_unused_memory
from trainer.system.distributed import from_all, from_first, is_first, keep_smallest, processes
from trainer.training.callbacks.non_finite_loss import NonFiniteLoss
from trainer.training.callbacks.regularizer_weights import RegularizerWeights
from trainer.training.callbacks.stop_on_signal import EvaluationCut, StopOnSignal
from trainer.training.callbacks.throughput import Throughput
from trainer.training.prepare import Prepared


def between_steps(method: Callable) -> Callable:
    """A method of SparseTrainer whose time is none of the steps'."""

    @functools.wraps(method)
    def untimed(self: "SparseTrainer", *args: Any, **kwargs: Any) -> Any:
        with self.throughput.paused():
            return method(self, *args, **kwargs)

    return untimed


class SparseTrainer(SparseEncoderTrainer):
    """The library's trainer; what differs is below."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        run_id: str,
        throughput: Throughput,
        stop: StopOnSignal,
        regularizer_weights: RegularizerWeights | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        """run_id: goes into the seal of every checkpoint. regularizer_weights: None for a loss without regularizers."""
        self.data, self.config, self.progress = prepared.data, prepared.config, prepared.progress
        self.depends_on = prepared.best.depends_on
        self.run_id, self.throughput, self.stop = run_id, throughput, stop
        self.regularizer_weights = regularizer_weights
        super().__init__(
            model=prepared.model,
            args=prepared.arguments,
            train_dataset=self.data.train,
            eval_dataset=self.data.eval or None,
            loss=prepared.loss,
            evaluator=prepared.evaluator,
            callbacks=[*([regularizer_weights] if regularizer_weights else []), *callbacks],
        )
        self.forward_passes = forward_passes_of(self.config, self.args.device.type)
        self.loss_is_finite = FiniteFlag()
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)  # ours stand in the callbacks argument

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *args: Any, seed: int = 0, **kwargs: Any
    ) -> NoDuplicateBatches:
        """Batches of one data set in which no text occurs twice; the last is dealt out in equal parts too, not dropped.

        Those of held-out rows are drawn whatever the lengths, so that evaluation losses mean the same in all runs.
        """
        name = next((name for name, rows in self.data.train.items() if rows is dataset), None)
        if name:
            return self.data.batches(name, self.config)
        return NoDuplicateBatches(dataset, batch_size, seed=seed, processes=processes())

    def get_multi_dataset_batch_sampler(
        self, dataset: Any, batch_samplers: list[NoDuplicateBatches], *args: Any, **kwargs: Any
    ) -> MixedBatches:
        """Batches of all data sets, triplets and pairs of one set sharing its turns."""
        self.order = MixedBatches(dataset, batch_samplers, self.data.mixture(self.config))
        return self.order

    def _build_dataloader(self, dataset: Dataset | DatasetDict, batch_size: int, dataset_kind: str) -> DataLoader:
        """The library's batches, as row numbers whose token ids are looked up, not as texts to tokenise at every step."""
        loader = super()._build_dataloader(dataset, batch_size, dataset_kind)
        if isinstance(dataset, DatasetDict):
            sets = [self.data.tokens[name] for name in dataset]
        else:
            sets = [next(self.data.eval_tokens[name] for name, rows in self.data.eval.items() if rows is dataset)]
        return DataLoader(
            range(len(loader.dataset)),
            batch_sampler=loader.batch_sampler,
            collate_fn=TokenCollator(sets, self.forward_passes),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
        )

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[int, ...]:
        """The library's, but for epochs and steps, of which it knows only those of a run that never changed its batches."""
        _, *others, _ = super().set_initial_training_values(args, dataloader)
        steps = self.progress.steps
        return (math.ceil(self.progress.place_at(steps) / self.progress.steps_per_epoch), *others, steps)

    def _init_training_state(
        self, max_steps: int, per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """The library takes eval_steps, save_steps and logging_steps from the checkpoint, and its step for its place."""
        place = super()._init_training_state(max_steps, per_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return place
        self.state.compute_steps(self.args, max_steps)
        self._forget_best_that_cannot_be_compared()
        epoch, steps = divmod(self.progress.place_at(self.state.global_step), per_epoch)
        return epoch, steps * self.args.gradient_accumulation_steps

    def _forget_best_that_cannot_be_compared(self) -> None:
        """Choose anew from here on where the best so far was chosen by something else, or has no checkpoint.

        The best of a run whose folder was copied or renamed is the one in this folder.
        """
        state, best = self.state, self.state.best_model_checkpoint
        if best is not None:
            state.best_model_checkpoint = best = str(Path(self.args.output_dir) / Path(best).name)
        has_checkpoint = best is not None and step_of(Path(best)) == state.best_global_step
        if not has_checkpoint or not self.progress.is_comparable(self.depends_on):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and the step come from the checkpoint; rates, weight decay and the rest of the settings do not."""
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        scheduler = self.lr_scheduler
        for group, own, share in zip(self.optimizer.param_groups, settings, scheduler.lr_lambdas, strict=True):
            group.update(own, lr=own["initial_lr"] * share(scheduler.last_epoch))
        scheduler.base_lrs = [own["initial_lr"] for own in settings]
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The library loads it even where the run goes on without fp16."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """With several processes and a resumed epoch, the library's wrappers do not pass the epoch on to our order."""
        self.order.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The batch's columns, counted."""
        features, labels = super().collect_features(inputs)
        if self.model.training:
            self.throughput.add(features)
        return features, labels

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """The library's. Of a training step's loss, it starts to ask whether it is finite."""
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training:
            self.loss_is_finite.ask(loss)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises NonFiniteLoss before the optimizer can spoil the weights."""
        loss = super().training_step(*args, **kwargs)
        if not self.loss_is_finite.read():
            raise NonFiniteLoss(self.state.global_step + 1, loss.item())
        for module in self.model.modules():
            if isinstance(module, SparseAutoEncoder):
                keep_smallest(module.stats_last_nonzero)  # passes since a dim was active, in any process
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The library's metrics, and eval_loss: the mean over all sets by their rows, which it only has for one set."""
        kept = self.accelerator._dataloaders
        before = len(kept)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # the library keeps the loaders of every evaluation, with their rows' order, to the end of the run
        del kept[before:]
        if eval_dataset is None and isinstance(self.eval_dataset, dict):
            rows = {name: len(dataset) for name, dataset in self.eval_dataset.items()}
            losses = [metrics[f"eval_{name}_loss"] * count for name, count in rows.items()]
            metrics["eval_loss"] = sum(losses) / sum(rows.values())
        return metrics

    @between_steps
    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation that a signal ends gives no scores, and a checkpoint is saved at once.

        Its loaders draw random numbers; dropout gets the same as without an evaluation, however often there is one.
        """
        try:
            with self.stop.cuts(), torch.random.fork_rng(devices=[]):
                return super()._evaluate(*args, **kwargs)
        except EvaluationCut:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        finally:  # where the library's evaluators write; ours does not
            if is_first() and (empty := Path(self.args.output_dir) / "eval").is_dir():
                empty.rmdir()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best is the best of those that are saved; the library remembers scores of steps without a checkpoint."""
        return super()._determine_best_metric(metrics, trial) if metrics and self.control.should_save else False

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the last step. After a checkpoint at the last step there is nothing to train; the library would."""
        if checkpoint is None or step_of(checkpoint) < self.progress.steps:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.state.max_steps = self.progress.steps
        self._forget_best_that_cannot_be_compared()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def _get_output_dir(self, trial: Any = None) -> str:
        """Where the library writes its checkpoint-N: aside, under the checkpoints, never under the name they have."""
        return str(Path(self.args.output_dir) / ASIDE)

    @between_steps
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint appears whole: written aside, sealed, flushed, renamed. Then the oldest go. One process writes."""
        place = checkpoint_at(Path(self.args.output_dir), self.state.global_step)
        if is_first():
            with written_aside(place.parent) as aside:
                super()._save_checkpoint(model, trial)
                self._put_in_place(aside / place.name, place)
        else:
            super()._save_checkpoint(model, trial)
        # also what the others wait for: the checkpoint is there when any process goes on
        self.state.best_model_checkpoint = from_first(self.state.best_model_checkpoint)
        give_back_unused_memory()

    def _put_in_place(self, written: Path, place: Path) -> None:
        if self.state.best_model_checkpoint == str(written):  # the best so far: under the name it will have
            self.state.best_model_checkpoint = str(place)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        seal(written, self.run_id, self.state.global_step)
        put_in_place(written, place)
        remove_oldest(place.parent, self.args.save_total_limit, place, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """One process writes: the first, every process's state."""
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            for files in from_all({file.name: file.read_bytes() for file in Path(own).iterdir()}):
                for name, content in files.items():
                    (Path(output_dir) / name).write_bytes(content)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """One process writes: transformers 5 calls this in every one, and the library takes each for the first."""
        if not is_first():
            return
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        keep_code(folder)
        self.progress.count(self.state.global_step)
        self.progress.save(folder, self.depends_on)
        if self.regularizer_weights is not None:
            self.regularizer_weights.save(folder)

    @between_steps
    def _load_best_model(self) -> None:
        if self.state.global_step < self.state.max_steps:
            return  # asked to stop: what matters is the checkpoint just written
        if not is_first():
            return  # it gets the first one's weights; on a network file system it may know of another best checkpoint
        require_unchanged(Path(self.state.best_model_checkpoint), self.run_id)
        # The library logs a failure here and goes on with the last weights as if they were the best.
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class FiniteFlag:
    """Whether the newest loss is finite, read without waiting for more than that loss.

    Asked of the loss itself after the backward pass was sent to a GPU, the answer would come after that pass, and the GPU
    would have nothing to do until the CPU has sent the next step.
    """

    def ask(self, loss: torch.Tensor) -> None:
        """Start to copy the answer to the CPU."""
        self.answer = torch.isfinite(loss.detach()).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def read(self) -> bool:
        """The answer."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.answer)
