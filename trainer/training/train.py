"""Trains one run: data, model, loss, arguments, evaluation, steps, the final model and one verdict line."""

import contextlib
import errno
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from sentence_transformers import SparseEncoder
from sentence_transformers.util.distributed import distributed_evaluation

from trainer.config import Config, ConfigError, LoadedConfig
from trainer.data.choosing import choice_of
from trainer.data.forward_passes import forward_passes_of
from trainer.data.tokens import Tokeniser, static_routes
from trainer.data.training_data import TrainingData, load_data
from trainer.losses.build import build_loss
from trainer.losses.dims_controller import WeightSchedule
from trainer.losses.statistics import BatchStatistics
from trainer.losses.teachers import teach
from trainer.models.attention import choose_attention, in_any_precision
from trainer.models.build import build_model, document_idf, fetch_base_model, load_model, save_model
from trainer.models.compiled import compile_networks
from trainer.models.prompts import prompt_lines
from trainer.models.remote_code import BaseModel
from trainer.runs.checkpoints import put_in_place, step_of
from trainer.runs.choice import REPORTED, SCORE
from trainer.runs.run import Run, duration
from trainer.system.device import choose_device, describe_device, peak_memory_gib
from trainer.system.distributed import (
    first_on_each_machine_first,
    from_first,
    is_first,
    processes,
    take_weights_of_first,
)
from trainer.system.progress_bar import going_on, in_columns
from trainer.training.arguments import build_arguments, routes_of
from trainer.training.callbacks.autoencoder import AutoencoderCare
from trainer.training.callbacks.progress import EvaluationProgress, ProgressBar, ProgressLines
from trainer.training.callbacks.stop_on_signal import StopOnSignal
from trainer.training.callbacks.tensorboard_log import TensorBoardLog
from trainer.training.callbacks.throughput import Throughput
from trainer.training.callbacks.watchdog import Watchdog
from trainer.training.evaluators import SearchEvaluator, build_evaluator
from trainer.training.memory import memory_lines
from trainer.training.plan import (
    comparison_lines,
    data_lines,
    head_line,
    model_lines,
    padding_line,
    schedule_of,
    sitting_out_lines,
    token_line,
    tokenizer_lines,
    training_lines,
)
from trainer.training.progress import Progress
from trainer.training.resume import (
    check_same_batches,
    check_same_data,
    check_steps_left,
    what_best_is_chosen_by,
    what_differs,
    where_to_go_on,
)
from trainer.training.trainer import SparseTrainer

Say = Callable[[str], None]


class Stopped(Exception):
    """Training was asked to stop, and did, with a checkpoint."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}")
        self.step, self.signal_number = step, signal_number


def train(loaded: LoadedConfig, run: Run, *, resume: bool = False, say: Say = print) -> dict[str, Any]:
    """Train the config's model in the run's folder. Returns the search scores after training.

    Raises ConfigError for what the user can mend, NonFiniteLoss, and Stopped after Ctrl-C or SIGTERM.
    """
    config, start = loaded.config, time.perf_counter()
    if not is_first():
        say = silent
    with StopOnSignal() as stop:
        checkpoint = from_first(where_to_go_on(config, run, say) if resume and is_first() else None)
        if resume:
            say(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint: starting from step 0")

        check_same_batches(config, run, say)

        # 1. Data: one named set per source, so the sampler can balance them
        with first_on_each_machine_first():
            base = None if checkpoint else fetch_base_model(config)  # first: it may not be trusted, and data is larger
            data = load_data(config)
        check_same_data(data, run)
        progress, step = Progress(config, data), step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            progress.load(checkpoint, step, say)
        schedule = schedule_of(config, data, progress)
        check_steps_left(loaded, step, schedule.steps, say)
        for line in chain(data_lines(config, data, schedule), comparison_lines(config, data)):
            say(line)

        # 2. Device and model
        device, reason = choose_device(config)
        say(f"device    {device} ({reason})")
        teacher = config.loss.teacher
        taught = {"teacher": teach(data.train, teacher, device, say, config.model)} if teacher else {}
        packed = run.manifest.get("packed_texts", False) if checkpoint else None
        model, config = ready_model(config, base, checkpoint, data, device, say, packed)

        # 3. Loss
        statistics = BatchStatistics(enabled=config.evaluation.track_sparsity)
        idf = document_idf(config, model, data.texts("positive", "negative"))
        loss = build_loss(config, model, statistics, idf)
        for line in training_lines(config, model, loss):
            say(line)

        # 4. Evaluation and arguments
        evaluator = shared_evaluator(config, data, say)
        best_metric = f"eval_{SCORE}" if evaluator else "eval_loss" if data.eval else None
        choices = from_first(choices_of(config, data, evaluator))
        say(f"result    {_which_checkpoint(config, best_metric, choices)}")
        chosen_by = what_best_is_chosen_by(config, evaluator, best_metric, choices)
        is_comparable = progress.is_comparable(chosen_by)
        if not is_comparable and config.training.load_best_model_at_end:
            say(f"          checkpoints up to step {step} do not count: {what_differs(progress.chosen_by, chosen_by)}")
        arguments = build_arguments(config, run, model, loss, device, best_metric=best_metric)
        run.update(
            status="running",
            device=describe_device(device),
            device_reason=reason,
            seed=config.training.seed,
            base_model=base.manifest() if base else run.manifest.get("base_model", {"source": config.model.base_model}),
            prompts={side: text for side, text in model.prompts.items() if text},
            datasets=data.manifest(),
            processes=processes(),
            packed_texts=config.model.packs_texts,
            rows_per_batch=config.training.per_device_train_batch_size * processes(),
            steps=schedule.steps,
            changes=run.changes_from(step),
            checkpoint_chosen_by=choices,
            **taught,
        )

        if is_first():
            data.write_texts(run.training_texts)

        # 5. Score before training
        if checkpoint:  # the model before training is not here any more
            before = run.manifest.get("before", {}) if is_comparable else {}  # all processes hold the same manifest
            run.update(before=before)
        else:
            before = _score(model, evaluator, run, "before", say)

        # 6. Train
        throughput, watchdog = Throughput(static_routes(model)), Watchdog(statistics, say)
        weights = WeightSchedule(loss, config) if config.loss.type == "splade" else None
        if weights and checkpoint:
            weights.load(checkpoint)
        care = AutoencoderCare(model, config) if config.loss.type == "csr" else None
        if care:
            loss.reconstruction_loss.see = care.see
        trainer = SparseTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.eval or None,
            loss=loss,
            evaluator=evaluator,
            data=data,
            config=config,
            throughput=throughput,
            stop=stop,
            run_id=run.id,
            progress=progress,
            chosen_by=chosen_by,
            schedule=weights,
            callbacks=[
                *([care] if care else []),
                watchdog,
                TensorBoardLog(run.logs, statistics, throughput, device, config.evaluation.log_decoded_samples),
                EvaluationProgress(),
                ProgressBar() if sys.stderr.isatty() else ProgressLines(say),
                stop,
            ],
        )
        ledger = Ledger(run, throughput, watchdog, device, start)
        with ledger.counting(trainer):
            if checkpoint and step == schedule.steps:  # the library would train one step more
                trainer.finish_from(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.received is not None and trainer.state.global_step < schedule.steps:
            raise Stopped(trainer.state.global_step, stop.received)

        # 7. Save, evaluate, report: in the precision in which users will open the model, not under training's autocast
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        take_weights_of_first(model)  # another process may not have seen the best checkpoint when it was written
        if is_first():
            save_final(model, run)
        after = _score(model, evaluator, run, "after", say)
        run.update(
            status="finished",
            total_seconds=ledger.total_seconds(),
            best_checkpoint=trainer.state.best_model_checkpoint,
            best_metric={"name": best_metric, "value": trainer.state.best_metric},
            **({"sparsity": weights.summary()} if weights and weights.controllers else {}),
        )
        for line in weights.lines() if weights else ():
            say(line)
        if is_first():
            say(verdict(before, after, evaluator, run.manifest))
    return after


def ready_model(
    config: Config,
    base: BaseModel | None,
    checkpoint: Path | None,
    data: TrainingData,
    device: str,
    say: Say,
    packed: bool | None,
) -> tuple[SparseEncoder, Config]:
    """The model as it computes in training, and the data as its token ids: of every text once.

    packed: whether a run that goes on has packed its texts; None for a new one. Returns the config with the attention that
    was chosen, too.
    """
    transformers.set_seed(config.training.seed)
    if checkpoint:
        model = load_model(checkpoint, config, device)
    else:
        with going_on(in_columns("model", "building")):
            model = build_model(config, base, data.texts("anchor"), data.texts("positive", "negative"), device)
    prompts = prompt_lines(config.model, base.folder if base else None, model.prompts)
    for line in chain(model_lines(config, base), tokenizer_lines(model), prompts):
        say(line)
    if config.loss.type == "splade":
        say(head_line(config, model, device))
    # from here on its networks may compute in 16 bits only
    config, line = choose_attention(model, config, device, packed)
    if config.model.attention != from_first(config.model.attention):
        raise ConfigError("model.attention: this training's GPUs differ in what they can do. Train on GPUs of one kind")
    say(line)

    tokeniser = Tokeniser(model, routes_of(config), say)
    with first_on_each_machine_first():
        data.tokenise(tokeniser)
    batches = (token_line(tokeniser), *sitting_out_lines(config, data), padding_line(config, data, device))
    for line in (*batches, *memory_lines(config, data, model, device)):
        say(line)

    if config.training.torch_compile:
        say(f"compile   {compile_networks(model, forward_passes_of(config, device).lengths)}")
    return model, config


def silent(line: str) -> None:
    """Say nothing: the first of several processes speaks for all."""


def shared_evaluator(config: Config, data: TrainingData, say: Say) -> SearchEvaluator | None:
    """The evaluator. The first process runs it and the others encode for it, so theirs has no searches of its own."""
    evaluator = build_evaluator(config, data.search, say) if is_first() else None
    is_there = from_first(evaluator is not None)
    return evaluator if is_first() else SearchEvaluator({}) if is_there else None


class Ledger:
    """Adds what this process trained to what earlier ones did before a resume, in the manifest."""

    def __init__(self, run: Run, throughput: Throughput, watchdog: Watchdog, device: str, start: float):
        """start: when this process began with the run."""
        self.run, self.throughput, self.watchdog, self.device = run, throughput, watchdog, device
        self.start, self.seconds_before = start, run.manifest.get("total_seconds", 0.0)

    def total_seconds(self) -> float:
        """How long the run took until now: data, scoring, evaluation and saving included."""
        return round(self.seconds_before + time.perf_counter() - self.start, 2)

    @contextlib.contextmanager
    def counting(self, trainer: SparseTrainer) -> Iterator[None]:
        """Count the steps of the block, however it ends."""
        came_to_an_end = False
        try:
            yield
            came_to_an_end = True
        finally:
            if is_first():
                trainer.progress.count(trainer.state.global_step)
            self._close(came_to_an_end, steps_done=trainer.state.global_step, datasets=trainer.data.manifest())

    def _close(self, came_to_an_end: bool, **values: Any) -> None:
        """Write the totals: seconds of the steps and of all, rows, tokens, their rates, peak memory, warnings.

        After a failure the other processes are gone, so what was trained since the last log line is not counted.
        """
        if came_to_an_end or processes() == 1:
            self.throughput.settle()
        known = self.run.manifest
        seconds = known.get("train_seconds", 0.0) + self.throughput.total_seconds
        rows = known.get("rows_trained", 0) + self.throughput.total_rows
        tokens = known.get("tokens_trained", 0) + self.throughput.total_tokens
        encoded = known.get("tokens_encoded", 0) + self.throughput.total_encoded
        padding = known.get("padding_encoded", 0) + self.throughput.total_padding
        self.run.update(
            train_seconds=round(seconds, 2),
            total_seconds=self.total_seconds(),
            rows_trained=rows,
            tokens_trained=tokens,
            tokens_encoded=encoded,
            padding_encoded=padding,
            padding_share=round(padding / max(encoded + padding, 1), 4),
            samples_per_second=round(rows / seconds, 2) if seconds else 0.0,
            tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
            peak_memory_gib=round(max(known.get("peak_memory_gib", 0.0), peak_memory_gib(self.device)), 3),
            warnings=known.get("warnings", []) + self.watchdog.warnings,
            **values,
        )


def choices_of(config: Config, data: TrainingData, evaluator: SearchEvaluator | None) -> list[dict[str, Any]]:
    """Which queries choose the checkpoint, for the manifest; of NanoBEIR all do."""
    found = [choice_of(search) for search in data.search if search.chooser]
    if evaluator and config.training.load_best_model_at_end:
        others = evaluator.parts.keys() - {search.name for search in data.search}
        found += [{"search": name, "rule": "all", "also_reported": True} for name in sorted(others)]
    return found


def _which_checkpoint(config: Config, metric: str | None, choices: list[dict[str, Any]]) -> str:
    if metric is None:
        return "the last step: there is nothing to evaluate with"
    if not config.training.load_best_model_at_end:
        return "the last step: training.load_best_model_at_end is false"
    if metric == "eval_loss":
        return "the checkpoint with the lowest evaluation loss: there is no search set"
    words = "the checkpoint with the highest mean nDCG@10 over the queries that choose"
    if also := [choice["search"] for choice in choices if choice["also_reported"]]:
        words += f"; those of {', '.join(also)} are reported too, so their score is optimistic"
    return words


def _score(model: SparseEncoder, evaluator: SearchEvaluator | None, run: Run, when: str, say: Say) -> dict[str, float]:
    """Search scores, also into the manifest; empty without searches."""
    if evaluator is None:
        return {}
    with in_any_precision(model), distributed_evaluation(model) as runs_here:
        scores = evaluator(model) if runs_here else {}
    found = {key: round(value, 5) for key, value in from_first(scores).items()}
    run.update(**{when: found})
    for name in evaluator.parts:
        say(in_columns(when, f"{name}: nDCG@10 {found[f'{name}_ndcg@10']:.3f}, {_dims(found, name)}"))
    return found


def _dims(scores: dict[str, float], name: str) -> str:
    return (
        f"active dims {scores[f'{name}_query_active_dims']:.0f} per query, "
        f"{scores[f'{name}_document_active_dims']:.0f} per document"
    )


def save_final(model: SparseEncoder, run: Run) -> None:
    """Write final/ aside and put it in place in one move, so that it is there whole or not at all."""
    aside = run.folder / ".final"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, aside)
    put_in_place(aside, run.final)


def verdict(before: dict, after: dict, evaluator: SearchEvaluator | None, manifest: dict[str, Any]) -> str:
    """The one line a user waits for."""
    parts = []
    if evaluator is not None:
        start = f"{before[REPORTED]:.3f} → " if before else ""  # not where a resume changed the searches
        parts.append(f"nDCG@10 {start}{after[REPORTED]:.3f}")
        queries = fmean(after[f"{name}_query_active_dims"] for name in evaluator.parts)
        documents = fmean(after[f"{name}_document_active_dims"] for name in evaluator.parts)
        parts.append(f"active dims {queries:.0f} per query and {documents:.0f} per document")
    parts.append(
        f"{duration(manifest['train_seconds'])} of steps ({duration(manifest['total_seconds'])} in all), "
        f"{manifest['samples_per_second']:.1f} samples/s, "
        f"{manifest['padding_share']:.0%} padding, "
        f"peak memory {manifest['peak_memory_gib']:.1f} GiB"
    )
    return "verdict   " + " · ".join(parts)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error, or one it came from, says that the disk is full.

    torch.save and safetensors do not pass the system's error on; then a disk without a free megabyte is the evidence.
    """
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        if any(words in str(error) for words in ("inline_container", "iostream error", "I/O error")):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(folder).free < 2**20


def lost_loader_worker(error: BaseException) -> bool:
    """Whether an error says that a process which reads batches ahead was killed; torch has no type of its own for it."""
    return isinstance(error, RuntimeError) and re.match(r"DataLoader worker \(pid.*\)", str(error)) is not None
