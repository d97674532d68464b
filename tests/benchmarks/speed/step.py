"""Whole training steps on real questions and passages: this project's trainer, and stock SparseEncoderTrainer."""

import json
import random
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from sentence_transformers.sparse_encoder import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.training_args import BatchSamplers
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import trainer.train
from tests.benchmarks.speed.process import ROOT, answer, peak_mib
from trainer.arguments import ROUTES
from trainer.beir import read_search_set
from trainer.config import load_config
from trainer.config.schema import FromScratchConfig
from trainer.loop import SparseTrainer
from trainer.models import build_model, fetch_base_model
from trainer.models.scratch import build_from_scratch
from trainer.run import Run

DATA = ROOT.parent / "shared" / "data"
SETS = ("norquad", "swequad", "squadsv_mt")
# Steps before the clock starts: the first ones also read code and make room in memory.
WARM_UP = 1

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
  logging_steps: 1
loss: {{type: splade, query_regularizer_weight: 0, document_regularizer_weight: 3e-3, scale: 0.05}}
datasets: {{real: {{source: {folder}/triplets.jsonl, eval_rows: 0}}}}
evaluation: {{nanobeir_datasets: []}}
hardware: {{device: cpu}}
"""


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
    """CPU seconds and losses of every step, reading and padding of its batch included."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.process_time())

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def measure(side: str, folder: str, batch: int, steps: int, length: int = 256, overrides: tuple = ()) -> dict[str, Any]:
    """CPU seconds per step, peak memory of the process in MiB, and the loss of every step.

    side: ours; stock-head, which is ours with the library's head; or stock, which is SparseEncoderTrainer with the
    library's losses and its sampler without duplicates.
    """
    disable_progress_bars()
    here = Path(folder)
    file = here / f"{side}-{batch}.yaml"
    file.write_text(CONFIG.format(folder=folder, batch=batch, steps=steps + WARM_UP, length=length))
    if side == "stock-head":
        overrides = (*overrides, "hardware.fused_head=false")
    loaded, clock = load_config(file, overrides), StepClock()
    if side == "stock":
        train_stock(loaded.config, here, clock)
    else:
        train_ours(loaded, here, clock)
    assert len(clock.ends) == steps + WARM_UP
    seconds = (clock.ends[-1] - clock.ends[WARM_UP - 1]) / steps
    return {"seconds": seconds, "mib": peak_mib(), "losses": clock.losses}


def train_ours(loaded, folder: Path, clock: StepClock) -> None:
    """As `make train` does."""

    class Timed(SparseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(clock)

    trainer.train.SparseTrainer = Timed
    trainer.train.train(loaded, Run.create(loaded, str(folder / f"run-{time.time_ns()}")), say=lambda line: None)


def train_stock(config, folder: Path, clock: StepClock) -> None:
    """As the library's documentation does."""
    rows = Dataset.from_json(str(folder / "triplets.jsonl"))
    set_seed(config.training.seed)
    model = build_model(config, fetch_base_model(config), rows["anchor"][:], rows["positive"][:], "cpu")
    ranking = SparseMultipleNegativesRankingLoss(model, scale=config.loss.scale)
    loss = SpladeLoss(
        model,
        ranking,
        document_regularizer_weight=config.loss.document_regularizer_weight,
        query_regularizer_weight=0.0,
    )
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(folder / "stock"),
        max_steps=config.training.max_steps,
        per_device_train_batch_size=config.training.per_device_train_batch_size,
        learning_rate=config.training.learning_rate,
        learning_rate_mapping={r"sub_modules\.query\.0\.weight": config.training.query_learning_rate},
        warmup_steps=config.training.warmup_steps,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        router_mapping=ROUTES,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    stock = SparseEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[clock])
    for default in (PrinterCallback, ProgressCallback):
        stock.remove_callback(default)
    stock.train()


if __name__ == "__main__":
    answer(measure)
