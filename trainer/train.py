"""Trains one run: data, model, loss, arguments, evaluation, steps, the final model and one verdict line."""

import errno
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import transformers
from sentence_transformers import SparseEncoder
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trainer.arguments import build_arguments
from trainer.callbacks import (
    CheckpointSeal,
    ProgressBar,
    ProgressLines,
    StopOnSignal,
    TensorBoardLog,
    Throughput,
    Watchdog,
)
from trainer.checkpoints import newest_complete
from trainer.config import LoadedConfig
from trainer.data import load_data
from trainer.device import choose_device, describe_device, peak_memory_gib
from trainer.evaluators import SCORE, SearchEvaluator, build_evaluator
from trainer.loop import SparseTrainer
from trainer.losses import build_loss
from trainer.models import build_model, load_model
from trainer.plan import data_lines, model_line, model_lines, schedule_of
from trainer.run import Run
from trainer.sparsity import BatchStatistics

Say = Callable[[str], None]


class Stopped(Exception):
    """Training was asked to stop, and did, with a checkpoint."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}")
        self.step, self.signal_number = step, signal_number


def train(loaded: LoadedConfig, run: Run, *, resume: bool = False, say: Say = print) -> dict[str, Any]:
    """Train the config's model in the run's folder. Returns the metrics after training.

    Raises ConfigError for what the user can mend, NonFiniteLoss, and Stopped after Ctrl-C or SIGTERM.
    """
    config = loaded.config
    checkpoint = newest_complete(run.checkpoints, run.id, say) if resume else None
    if resume:
        say(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint: starting from step 0")

    # 1. Data: one named set per source, so the sampler can balance them
    data = load_data(config)
    schedule = schedule_of(config, data)
    for line in data_lines(config, data, schedule):
        say(line)

    # 2. Device and model
    device, reason = choose_device(config)
    say(f"device    {device} ({reason})")
    transformers.set_seed(config.training.seed)
    if checkpoint:
        model = load_model(checkpoint, config, device)
    else:
        model = build_model(config, data.texts("anchor"), data.texts("positive", "negative"), device)
    say(model_line(config))

    # 3. Loss
    statistics = BatchStatistics(enabled=config.evaluation.track_sparsity)
    loss = build_loss(config, model, statistics)
    for line in model_lines(config, data, model, loss):
        say(line)

    # 4. Arguments
    evaluator = build_evaluator(config, data.search, say)
    best_metric = f"eval_{SCORE}" if evaluator else "eval_loss" if data.eval else None
    say(f"best      {_why_best(best_metric)}")
    arguments = build_arguments(config, run, model, loss, device, best_metric=best_metric)
    run.update(
        status="running",
        device=describe_device(device),
        device_reason=reason,
        seed=config.training.seed,
        datasets={name: summary.as_dict() for name, summary in data.summaries.items()},
        steps=schedule.steps,
    )

    # 5. Score before training
    before = _score(model, evaluator, run, "before", say) if not checkpoint else run.manifest.get("before", {})

    # 6. Train
    throughput, stop = Throughput(), StopOnSignal()
    watchdog = Watchdog(statistics, say)
    trainer = SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval or None,
        loss=loss,
        evaluator=evaluator,
        halves=data.halves,
        sampling=(config.datasets.sampling_strategy, config.datasets.epoch),
        throughput=throughput,
        callbacks=[
            watchdog,
            TensorBoardLog(run.logs, statistics, throughput, device, config.evaluation.log_decoded_samples),
            CheckpointSeal(run.id),
            stop,
        ],
    )
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    trainer.add_callback(ProgressBar() if sys.stderr.isatty() else ProgressLines(say))
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stop.restore()
        seconds = run.manifest.get("train_seconds", 0.0) + time.perf_counter() - started
        run.update(train_seconds=round(seconds, 2), warnings=watchdog.warnings, steps_done=trainer.state.global_step)
    if stop.received is not None and trainer.state.global_step < schedule.steps:
        run.update(status="stopped")
        raise Stopped(trainer.state.global_step, stop.received)

    # 7. Save, evaluate, report
    (run.checkpoints / "eval").is_dir() and (
        run.checkpoints / "eval"
    ).rmdir()  # the library makes it, and leaves it empty
    save_final(model, run)
    after = _score(model, evaluator, run, "after", say)
    data.count_rows(data.mixture(config, config.training.per_device_train_batch_size), schedule.batches)
    speed = _speed(trainer, seconds)
    run.update(
        status="finished",
        datasets={name: summary.as_dict() for name, summary in data.summaries.items()},
        peak_memory_gib=round(peak_memory_gib(device), 3),
        best_checkpoint=trainer.state.best_model_checkpoint,
        best_metric={"name": best_metric, "value": trainer.state.best_metric},
        **speed,
    )
    say(verdict(before, after, evaluator, seconds, speed, peak_memory_gib(device)))
    return after


def _why_best(metric: str | None) -> str:
    if metric is None:
        return "the last checkpoint: there is nothing to evaluate with"
    if metric == "eval_loss":
        return "the checkpoint with the lowest evaluation loss: there is no search set"
    return "the checkpoint with the highest mean nDCG@10 over the searches"


def _score(model: SparseEncoder, evaluator: SearchEvaluator | None, run: Run, when: str, say: Say) -> dict[str, float]:
    """Search scores, also into the manifest; empty without searches."""
    if evaluator is None:
        return {}
    found = {key: round(value, 5) for key, value in evaluator(model).items()}
    run.update(**{when: found})
    for name in evaluator.parts:
        say(f"{when:<10}{name}: nDCG@10 {found[f'{name}_ndcg@10']:.3f}, {_dims(found, name)}")
    return found


def _dims(scores: dict[str, float], name: str) -> str:
    return (
        f"active dims {scores[f'{name}_query_active_dims']:.0f} per query, "
        f"{scores[f'{name}_document_active_dims']:.0f} per document"
    )


def _speed(trainer: SparseTrainer, seconds: float) -> dict[str, float]:
    """Rows and tokens per second over the whole of training, evaluation included."""
    throughput = trainer.throughput
    throughput.settle()
    return {
        "samples_per_second": round(throughput.total_rows / seconds, 2),
        "tokens_per_second": round(throughput.total_tokens / seconds, 1),
    }


def save_final(model: SparseEncoder, run: Run) -> None:
    """Write final/ aside and put it in place in one move, so that it is there whole or not at all."""
    aside = run.folder / ".final"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(str(aside))
    shutil.rmtree(run.final, ignore_errors=True)
    aside.rename(run.final)


def verdict(before: dict, after: dict, evaluator, seconds: float, speed: dict, memory: float) -> str:
    """The one line a user waits for."""
    parts = []
    if evaluator is not None:
        names = list(evaluator.parts)
        parts.append(f"nDCG@10 {before.get(SCORE, float('nan')):.3f} → {after[SCORE]:.3f}")
        queries = sum(after[f"{name}_query_active_dims"] for name in names) / len(names)
        documents = sum(after[f"{name}_document_active_dims"] for name in names) / len(names)
        parts.append(f"active dims {queries:.0f} per query and {documents:.0f} per document")
    parts.append(f"{_duration(seconds)}, {speed['samples_per_second']:.1f} samples/s, peak memory {memory:.1f} GiB")
    return "verdict   " + " · ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one it came from, says that the disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
