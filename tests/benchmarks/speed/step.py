"""Whole training steps on real questions and passages: this project's trainer, and stock SparseEncoderTrainer."""

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.training_args import BatchSamplers
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import trainer.training.train
from tests.benchmarks.speed.process import ROOT, answer, peak_mib
from trainer.config import Config, load_config
from trainer.config.schema import FromScratchConfig
from trainer.data.beir import read_search_set
from trainer.encoding.fuse import transformers_of
from trainer.models.build import build_model, fetch_base_model
from trainer.models.scratch import build_from_scratch
from trainer.runs.run import Run
from trainer.system.libraries import set_up_libraries
from trainer.training.trainer import SparseTrainer

DATA = ROOT.parent / "shared" / "data"
SETS = ("norquad", "swequad", "squadsv_mt")
# Steps before the clock starts: the first ones also read code and make room in memory; on a GPU, kernels are compiled and
# tuned for each bucket of lengths, and one window of 32 batches has them all.
WARM_UP = {"cpu": 1, "cuda": 32}

CONFIG = """
model: {{base_model: {folder}/base, architecture: inference-free-splade, query_init: ones}}
training:
  max_steps: {steps}
  per_device_train_batch_size: {batch}
  learning_rate: 2e-5
  query_learning_rate: 1e-3
  max_seq_length: {length}
  eval_steps: 100000
  save_steps: 100000
  load_best_model_at_end: false
  logging_steps: {logging_steps}
  bf16: {half}
  dataloader_num_workers: {workers}
  dataloader_pin_memory: {half}
loss: {{type: splade, query_regularizer_weight: 0, document_regularizer_weight: 3e-3, scale: 0.05}}
datasets: {{real: {{source: {folder}/triplets.jsonl, eval_rows: 0}}}}
evaluation: {{nanobeir_datasets: []}}
hardware: {{device: {device}, tf32: {half}, gradient_checkpointing: {checkpointing}}}
"""


def config_of(
    folder: Path, name: str, device: str, *, batch: int, steps: int, length: int, checkpointing: bool = False
) -> Path:
    """The config of one measurement; on a GPU, with the flags of the shipped H100 configs except torch.compile."""
    gpu = device == "cuda"
    values = (
        {"logging_steps": 8, "half": "true", "workers": 8}
        if gpu
        else {"logging_steps": 1, "half": "false", "workers": 0}
    )
    values |= {"device": device, "batch": batch, "length": length, "checkpointing": str(checkpointing).lower()}
    file = folder / f"{name}.yaml"
    file.write_text(CONFIG.format(folder=folder, steps=steps, **values))
    return file


def prepare(folder: Path, width: int, layers: int = 12, words: int = 50_000) -> Path:
    """A base model that starts as a word matcher, and triplets of a question, its passage and another passage."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, rows = random.Random(0), []
    for name in SETS:
        found = read_search_set(DATA / name, "train", name)
        passages = list(found.corpus.values())
        for query, answers in found.relevant.items():
            positive = found.corpus[min(answers)]
            negative = chance.choice([text for text in chance.sample(passages, 2) if text != positive])
            rows.append({"anchor": found.queries[query], "positive": positive, "negative": negative})
    chance.shuffle(rows)
    (folder / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = FromScratchConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        dropout=0.0,  # as in ModernBERT; and without it, two runs differ by rounding alone
    )
    set_seed(0)
    build_from_scratch(shape, [text for row in rows for text in row.values()], folder / "base")
    return folder


class StepClock(TrainerCallback):
    """Seconds, tokens of documents and losses of every step, reading and padding of its batch included.

    On a CPU its own seconds, since other work on the machine should not count; on a GPU those of the clock on the wall.
    """

    def __init__(self, device: str, warm_up: int, steps: int):
        """steps: those that count, after warm_up others."""
        self.device, self.warm_up, self.steps = device, warm_up, steps
        self.ends, self.counts, self.losses = [], [], []

    def on_train_begin(self, *args, model: SparseEncoder, **kwargs):
        for transformer in transformers_of(model):
            transformer.register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, inputs: tuple) -> None:
        """Real tokens and positions; the sum stays on the device, for reading it would wait."""
        if module.training and self.warm_up <= len(self.ends) < self.warm_up + self.steps:
            positions = inputs[0]["input_ids"].numel()
            mask = inputs[0].get("attention_mask")  # packed texts have none
            self.counts.append((positions if mask is None else mask.sum(), positions))

    def on_step_end(self, *args, **kwargs):
        if self.device == "cuda" and len(self.ends) + 1 in (self.warm_up, self.warm_up + self.steps):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if self.device == "cuda" else time.process_time())

    def found(self) -> dict[str, Any]:
        """Per step that counts: seconds, tokens, and the share of positions that is padding."""
        assert len(self.ends) == self.warm_up + self.steps
        tokens, positions = (int(sum(column)) for column in zip(*self.counts, strict=True))
        return {
            "seconds": (self.ends[-1] - self.ends[self.warm_up - 1]) / self.steps,
            "tokens": tokens / self.steps,
            "padding": 1 - tokens / positions,
        }

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def measure(
    side: str,
    folder: str,
    batch: int,
    steps: int,
    length: int = 256,
    device: str = "cpu",
    checkpointing: bool = False,
    overrides: tuple = (),
) -> dict[str, Any]:
    """Seconds, tokens and padding per step, peak memory in MiB (on a GPU, that of its tensors), and logged losses.

    side: ours; stock-head, which is ours with the library's head; or stock, which is SparseEncoderTrainer with the
    library's losses and its sampler without duplicates.
    """
    if side != "stock":
        set_up_libraries(verbose=False)  # as the command line does
    disable_progress_bars()
    here, warm_up = Path(folder), WARM_UP[device]
    total = steps + warm_up
    file = config_of(
        here, f"{side}-{batch}", device, batch=batch, steps=total, length=length, checkpointing=checkpointing
    )
    if side == "stock-head":
        overrides = (*overrides, "hardware.fused_head=false")
    loaded, clock = load_config(file, overrides), StepClock(device, warm_up, steps)
    if side == "stock":
        train_stock(loaded.config, here, clock)
    else:
        train_ours(loaded, here, clock)
    return {**clock.found(), "mib": peak_mib(device), "losses": clock.losses}


def train_ours(loaded, folder: Path, clock: StepClock) -> None:
    """As `make train` does."""

    class Timed(SparseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(clock)

    trainer.training.train.SparseTrainer = Timed
    trainer.training.train.train(
        loaded, Run.create(loaded, str(folder / f"run-{time.time_ns()}")), echo=lambda line: None
    )


def stock_parts(config: Config, rows: Dataset) -> tuple[SparseEncoder, SpladeLoss]:
    """The model with the library's head, and the library's losses."""
    set_seed(config.training.seed)
    device = config.hardware.device
    model = build_model(config, fetch_base_model(config), rows["anchor"][:], rows["positive"][:], device)
    ranking = SparseMultipleNegativesRankingLoss(model, scale=config.loss.scale)
    loss = SpladeLoss(
        model,
        ranking,
        document_regularizer_weight=config.loss.document_regularizer_weight,
        query_regularizer_weight=0.0,
    )
    return model, loss


def train_stock(config: Config, folder: Path, clock: StepClock) -> None:
    """As the library's documentation does."""
    rows = Dataset.from_json(str(folder / "triplets.jsonl"))
    model, loss = stock_parts(config, rows)
    training, gpu, checkpointing = config.training, clock.device == "cuda", config.hardware.gradient_checkpointing
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(folder / "stock"),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        learning_rate=training.learning_rate,
        learning_rate_mapping={r"sub_modules\.query\.0\.weight": training.query_learning_rate},
        warmup_steps=training.warmup_steps,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        router_mapping={"anchor": "query", "positive": "document", "negative": "document"},
        logging_steps=training.logging_steps,
        bf16=training.bf16,
        tf32=True if gpu else None,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        dataloader_num_workers=training.dataloader_num_workers,
        dataloader_pin_memory=training.dataloader_pin_memory,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not gpu,
    )
    stock = SparseEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[clock])
    for default in (PrinterCallback, ProgressCallback):
        stock.remove_callback(default)
    stock.train()


if __name__ == "__main__":
    answer(measure)
