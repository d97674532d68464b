"""Scalars for TensorBoard, and the top terms of fixed sentences."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerState

from trainer.encoding.vocabulary import dims_are_words
from trainer.losses.statistics import BatchStatistics
from trainer.system.device import peak_memory_gib
from trainer.training.callbacks.throughput import Throughput

PROBES = (
    "Hvor høyt er Galdhøpiggen, Norges høyeste fjell?",
    "Søknad om barnehageplass sendes til kommunen.",
    "Hvornår blev Storebæltsbroen åbnet for trafik?",
    "Et nyt pas bestilles hos borgerservice i kommunen.",
    "Vilken är Sveriges största sjö?",
    "Älgjakten börjar i september i norra Sverige.",
)


class TensorBoardLog(TrainerCallback):
    """Writes every scalar to TensorBoard, and the top terms of fixed probe sentences as text."""

    def __init__(
        self, folder: Path, statistics: BatchStatistics, throughput: Throughput, device: str, probes: int
    ) -> None:
        self.folder, self.statistics, self.throughput, self.device = folder, statistics, throughput, device
        self.probes = PROBES[:probes]
        self.writer: SummaryWriter | None = None
        self.last_panel: int | None = None

    def _open(self, state: TrainerState) -> SummaryWriter | None:
        if self.writer is None and state.is_world_process_zero:
            # a resumed run writes steps again that an earlier one wrote after its last checkpoint: drop those
            self.writer = SummaryWriter(
                str(self.folder), purge_step=state.global_step + 1 if state.global_step else None
            )
        return self.writer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._open(state)
        self.throughput.restart()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """One line of scalars: losses, learning rates, sparsity, speed, memory."""
        if not logs:
            return
        if "loss" not in logs:
            scores = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            # how fast each set was evaluated would bury the scores
            self._scalars("eval", {k: v for k, v in scores.items() if not k.endswith(("_second", "_runtime"))}, state)
            return
        speed = self.throughput.read()
        if writer := self._open(state):
            self._training_scalars(writer, logs, speed, state, kwargs["optimizer"], kwargs["model"])
        self.statistics.reset()
        self.throughput.restart()

    def _training_scalars(
        self,
        writer: SummaryWriter,
        logs: dict[str, Any],
        speed: dict[str, float],
        state: TrainerState,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
    ) -> None:
        names = {"loss": "loss/total", "grad_norm": "optimizer/gradient_norm", "epoch": "progress/epoch"}
        for key, value in logs.items():
            if key.endswith("_weight"):
                name = f"regularizer/{key}"
            elif key.startswith("csr_"):
                name = f"csr/{key.removeprefix('csr_')}"
            else:
                name = names.get(key, f"loss/{key}" if "loss" in key else "")
            if name:
                writer.add_scalar(name, value, state.global_step)
        for name, rate in learning_rates(optimizer, model).items():
            writer.add_scalar(f"optimizer/learning_rate_{name}", rate, state.global_step)
        for route, values in self.statistics.summary().items():
            scalars = {k: v for k, v in values.items() if k not in ("busiest_dim", "active_share")}
            self._scalars("sparsity" if route == "both" else f"sparsity/{route}", scalars, state)
        self._scalars("speed", speed, state)
        self._scalars("memory", {"peak (GiB)": peak_memory_gib(self.device)}, state)

    def _scalars(self, group: str, values: dict[str, float], state: TrainerState) -> None:
        writer = self._open(state)
        for key, value in values.items():
            if writer and isinstance(value, (int, float)):
                writer.add_scalar(f"{group}/{key}", value, state.global_step)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, model: SparseEncoder | None = None, **kwargs: Any
    ) -> None:
        """Top terms of the probe sentences."""
        writer = self._open(state)
        if writer and self.probes and self.last_panel != state.global_step:  # called once for every set
            self.last_panel = state.global_step
            if (text := top_terms(model, self.probes)) is not None:
                writer.add_text("top terms", text, state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()


def learning_rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, float]:
    """The current rate of the query weights ('query') and of everything else ('model')."""
    query = {id(p) for name, p in model.named_parameters() if name.endswith("query.0.weight")}
    optimizer = getattr(optimizer, "optimizer", optimizer)
    rates = {}
    for group in optimizer.param_groups:
        if group["params"]:
            rates["query" if all(id(p) in query for p in group["params"]) else "model"] = group["lr"]
    return rates


def top_terms(model: SparseEncoder, texts: tuple[str, ...], count: int = 12) -> str | None:
    """A Markdown table of the heaviest terms of each text as a document; None when dimensions are not words (CSR)."""
    if not dims_are_words(model):
        return None
    vectors = model.encode_document(list(texts), show_progress_bar=False)
    lines = ["| text | active dims | top terms |", "|---|---|---|"]
    for text, terms, row in zip(texts, model.decode(vectors, top_k=count), vectors, strict=True):
        words = ", ".join(f"{term} {weight:.2f}" for term, weight in terms)
        lines.append(f"| {text} | {int((row.to_dense() > 0).sum())} | {words.replace('|', '&#124;')} |")
    return "\n".join(lines)
