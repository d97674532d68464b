"""How many rows fit into a memory budget: one training step each of ever more rows, all texts as long as is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder import SparseEncoderTrainer
from torch import nn

from tests.benchmarks.speed.process import answer, peak_mib
from tests.benchmarks.speed.step import config_of, stock_parts
from trainer.config import load_config
from trainer.data.batches import text_ids
from trainer.data.forward_passes import ForwardPasses, forward_passes_of
from trainer.data.roles import side_of
from trainer.data.tokens import TokenCollator, Tokeniser
from trainer.encoding.fuse import fuse, transformers_of
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.system.libraries import set_up_libraries

ROLES = ("anchor", "positive", "negative")
# Each a fifth to a half more than the one before.
SIZES = [2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024]


def measure(
    side: str, folder: str, budget_mib: float, device: str = "cpu", length: int = 256, checkpointing: bool = False
) -> dict[str, Any]:
    """The most rows whose step stays within the budget, and the peak of every size that was tried; side: ours or stock.

    Memory is the process's on a CPU, and that of the tensors on a GPU. Activations are kept, or with `checkpointing`
    computed again in the backward pass.
    """
    if side == "ours":
        set_up_libraries(verbose=False)  # as the command line does
    disable_progress_bars()
    file = config_of(
        Path(folder), f"largest-{side}", device, batch=2, steps=1, length=length, checkpointing=checkpointing
    )
    config, rows = load_config(file).config, Dataset.from_json(str(Path(folder, "triplets.jsonl")))
    model, loss = stock_parts(config, rows)
    if side == "ours":
        fuse(model)
        loss = build_loss(config, model, BatchStatistics(enabled=False))
    if checkpointing:
        for transformer in transformers_of(model):
            transformer.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6)
    longest = long_rows(rows, length)
    features = features_of(model, longest, forward_passes_of(config, device) if side == "ours" else None)
    peaks: dict[int, float] = {}
    for size in SIZES:
        try:
            step(model, loss, optimizer, features(size), config.training.bf16)
        except torch.cuda.OutOfMemoryError:
            break
        peaks[size] = peak_mib(device)
        if peaks[size] > budget_mib:
            break
    else:
        raise RuntimeError(f"{SIZES[-1]} rows still fit: give a smaller budget than {budget_mib} MiB")
    fitting = [size for size, peak in peaks.items() if peak <= budget_mib]
    return {"batch": max(fitting, default=0), "peaks": peaks}


def long_rows(rows: Dataset, length: int) -> Dataset:
    """As many rows as the largest size, each document said over and over: a word is a token at least."""
    return rows.select(range(SIZES[-1])).map(
        lambda row: row | {key: " ".join((row[key].split() * length)[:length]) for key in ("positive", "negative")}
    )


def features_of(
    model: SparseEncoder, rows: Dataset, passes: ForwardPasses | None
) -> Callable[[int], list[dict[str, Any]]]:
    """Makes the features of the first rows: in these passes as our trainer does, or in columns as the library's does."""
    if passes is None:
        return lambda size: [model.preprocess(rows[:size][role], task=side_of(role)) for role in ROLES]
    tokens = Tokeniser(model, {side: side for side in ("query", "document")}, print, keep=False).rows(
        "rows", rows, text_ids(rows), "content"
    )
    collate = TokenCollator([tokens], passes)
    return lambda size: SparseEncoderTrainer.collect_features(None, collate(range(size)))[0]


def step(
    model: SparseEncoder, loss: nn.Module, optimizer: torch.optim.Optimizer, features: list[dict[str, Any]], half: bool
) -> None:
    """Forward, backward and update, as the trainer does them."""
    features = [{k: v.to(model.device) if torch.is_tensor(v) else v for k, v in each.items()} for each in features]
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        found = loss(features, None)
    total = sum(found.values()) if isinstance(found, dict) else found
    total.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    answer(measure)
