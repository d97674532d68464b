"""Trains one run: prepares it, scores the model, trains, saves, scores again, and prints one verdict line."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from sentence_transformers import SparseEncoder
from sentence_transformers.util.distributed import distributed_evaluation

from trainer.config import LoadedConfig
from trainer.data.tokens import static_routes
from trainer.models.attention import with_padded_attention
from trainer.models.build import autoencoder_of, save_model
from trainer.models.cut_vocabulary import vocabulary_cut
from trainer.models.fitted_head import head_fit
from trainer.runs.checkpoints import checkpoint_at, put_in_place
from trainer.runs.choice import REPORTED
from trainer.runs.run import Run
from trainer.system.device import describe_device
from trainer.system.distributed import from_first, is_first, processes, take_weights_of_first
from trainer.system.durations import duration
from trainer.system.progress_bar import in_columns
from trainer.training.callbacks.active_dims_annealing import ActiveDimsAnnealing
from trainer.training.callbacks.dead_dim_reviver import DeadDimReviver
from trainer.training.callbacks.progress import EvaluationProgress, ProgressBar, ProgressLines
from trainer.training.callbacks.regularizer_weights import RegularizerWeights
from trainer.training.callbacks.stop_on_signal import StopOnSignal
from trainer.training.callbacks.tensorboard_log import TensorBoardLog
from trainer.training.callbacks.throughput import Throughput
from trainer.training.callbacks.watchdog import Watchdog
from trainer.training.evaluators import SearchEvaluator
from trainer.training.failures import Stopped
from trainer.training.forgetting import keep_query_scores, warn_of_forgetting
from trainer.training.learned_words import learned_lines
from trainer.training.mining_rounds import StopForRound, steps_of_rounds
from trainer.training.prepare import Decisions, Prepared, prepare
from trainer.training.resume import Start, find_start
from trainer.training.start_weights import keep_start_weights, mix_in_start_weights
from trainer.training.totals import RunTotals
from trainer.training.trainer import SparseTrainer


def train(
    loaded: LoadedConfig, run: Run, *, resume: bool = False, echo: Callable[[str], None] = print
) -> dict[str, float]:
    """Train the config's model in the run's folder. Returns the search scores after training.

    Raises ConfigError for a mistake that the user can fix, NonFiniteLoss, and Stopped after Ctrl-C or SIGTERM.
    """
    began, decisions = time.perf_counter(), Decisions(echo)
    with StopOnSignal() as stop:
        # 1. Prepare: data, model, loss, evaluator, arguments
        start = find_start(loaded.config, run, resume, decisions.add)
        prepared = prepare(loaded, run, start, decisions)
        record_start(prepared, run, start)

        # 2. Score before training
        before = scores_before(prepared, run, start, decisions.echo)

        # 3. Train
        while True:
            trainer, totals = train_steps(prepared, run, start, stop, began, decisions.echo)
            if trainer.state.global_step == prepared.progress.steps:
                break
            # a round of mining: the run goes on from its checkpoint, as a resumed one would
            checkpoint = checkpoint_at(run.checkpoints, trainer.state.global_step)
            start, began = Start(checkpoint, prepared.config.model.packs_texts), time.perf_counter()
            del trainer, prepared, totals
            prepared = prepare(loaded, run, start, Decisions(decisions.echo, quiet=True))
            record_start(prepared, run, start)

        # 4. Save and score, in the precision in which users will open the model, without training's autocast
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if (share := prepared.config.training.start_share) and is_first():
            mix_in_start_weights(model, run, share)
        take_weights_of_first(model)  # only the first process loads the best checkpoint
        if is_first():
            save_final(model, run)
        after = measure_scores(model, prepared.evaluator, run, "after", decisions.echo)

        # 5. Report
        record_end(trainer, prepared, run, totals)
        for line in trainer.regularizer_weights.lines() if trainer.regularizer_weights else ():
            decisions.echo(line)
        for line in learned_lines(model, prepared.data.search) if is_first() else ():
            decisions.echo(line)
        worse = warn_of_forgetting(run, before, decisions.echo) if is_first() else []
        decisions.echo(verdict(before, after, prepared.evaluator, run.manifest, worse))
    return after


def train_steps(
    prepared: Prepared, run: Run, start: Start, stop: StopOnSignal, began: float, echo: Callable[[str], None]
) -> tuple[SparseTrainer, RunTotals]:
    """Train to the last step, or to the next round of mining. began: the moment from which the run's seconds count.

    Raises Stopped after a signal.
    """
    throughput, watchdog = Throughput(static_routes(prepared.model)), Watchdog(prepared.statistics, echo)
    trainer = build_trainer(prepared, run, start, stop, throughput, watchdog, echo)
    totals = RunTotals(run, throughput, watchdog, prepared.device, began)
    with totals.counting(trainer):
        trainer.train_from(start.checkpoint)
    step, last = trainer.state.global_step, prepared.progress.steps
    if stop.received is not None and step < last:
        raise Stopped(step, stop.received)
    return trainer, totals


def build_trainer(
    prepared: Prepared,
    run: Run,
    start: Start,
    stop: StopOnSignal,
    throughput: Throughput,
    watchdog: Watchdog,
    echo: Callable[[str], None],
) -> SparseTrainer:
    """The library's trainer with our batches, checkpoints and callbacks."""
    config, model, loss = prepared.config, prepared.model, prepared.loss
    weights = RegularizerWeights(loss, config) if config.loss.has_regularizers else None
    if weights and start.checkpoint:
        weights.load(start.checkpoint)
    autoencoder = autoencoder_of(model)
    for_autoencoder = [] if autoencoder is None else [
        ActiveDimsAnnealing(autoencoder, config),
        DeadDimReviver(autoencoder, loss.reconstruction_loss, config),
    ]  # fmt: skip
    probes = config.evaluation.log_decoded_samples
    return SparseTrainer(
        prepared,
        run_id=run.id,
        throughput=throughput,
        stop=stop,
        regularizer_weights=weights,
        callbacks=[
            *for_autoencoder,
            watchdog,
            TensorBoardLog(run.logs, prepared.statistics, throughput, prepared.device, probes),
            EvaluationProgress(),
            ProgressBar() if sys.stderr.isatty() else ProgressLines(echo),
            stop,
            StopForRound(steps_of_rounds(prepared.data, prepared.progress.steps)),
        ],
    )


def scores_before(prepared: Prepared, run: Run, start: Start, echo: Callable[[str], None]) -> dict[str, float]:
    """Search scores before training. A resumed run takes them from run.json; empty if they are not comparable."""
    if not start.checkpoint:
        return measure_scores(prepared.model, prepared.evaluator, run, "before", echo)
    before = run.manifest.get("before", {}) if prepared.continues_scores else {}  # all processes hold the same manifest
    run.update(before=before)
    return before


def measure_scores(
    model: SparseEncoder, evaluator: SearchEvaluator | None, run: Run, when: str, echo: Callable[[str], None]
) -> dict[str, float]:
    """Measure the search scores, print them, and write them into run.json under `when`. Empty without searches."""
    if evaluator is None:
        return {}
    with with_padded_attention(model), distributed_evaluation(model) as is_evaluating:
        scores = evaluator(model) if is_evaluating else {}
    scores = {key: round(value, 5) for key, value in from_first(scores).items()}
    run.update(**{when: scores})
    if is_first():
        keep_query_scores(run, when, evaluator.per_query())
    for name in evaluator.parts:
        dims = (
            f"active dims {scores[f'{name}_query_active_dims']:.0f} per query, "
            f"{scores[f'{name}_document_active_dims']:.0f} per document"
        )
        echo(in_columns(when, f"{name}: nDCG@10 {scores[f'{name}_ndcg@10']:.3f}, {dims}"))
    return scores


def save_final(model: SparseEncoder, run: Run) -> None:
    """Write final/ under a temporary name and rename it when complete, so that no half-written model has that name."""
    aside = run.folder / ".final"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, aside)
    put_in_place(aside, run.final)


def record_start(prepared: Prepared, run: Run, start: Start) -> None:
    """Write into the run folder how the run was prepared, its texts, and the weights that it starts with."""
    config, base = prepared.config, prepared.base
    if config.training.start_share and not start.checkpoint and is_first():
        keep_start_weights(prepared.model, run)
    run.update(
        status="running",
        device=describe_device(prepared.device),
        device_reason=prepared.device_reason,
        seed=config.training.seed,
        base_model=base.manifest() if base else run.manifest.get("base_model", {"source": config.model.base_model}),
        **({"vocabulary": asdict(cut)} if (cut := vocabulary_cut(prepared.model)) else {}),
        **({"head": asdict(fit)} if (fit := head_fit(prepared.model)) else {}),
        prompts={side: text for side, text in prepared.model.prompts.items() if text},
        datasets=prepared.data.manifest(),
        processes=processes(),
        packed_texts=config.model.packs_texts,
        rows_per_batch=config.training.per_device_train_batch_size * processes(),
        steps=prepared.progress.steps,
        changes=run.changes_from(start.step),
        checkpoint_chosen_by=prepared.best.choices,
        **({"teacher": prepared.teacher} if prepared.teacher else {}),
    )
    if is_first():
        prepared.data.write_texts(run.training_texts)


def record_end(trainer: SparseTrainer, prepared: Prepared, run: Run, totals: RunTotals) -> None:
    """Write into run.json how the run ended."""
    weights = trainer.regularizer_weights
    run.update(
        status="finished",
        total_seconds=totals.seconds(),
        best_checkpoint=trainer.state.best_model_checkpoint,
        best_metric={"name": prepared.best.metric, "value": trainer.state.best_metric},
        **({"sparsity": weights.summary()} if weights and weights.controllers else {}),
    )


def verdict(
    before: dict, after: dict, evaluator: SearchEvaluator | None, manifest: dict[str, Any], worse: Sequence[str] = ()
) -> str:
    """The line that sums up the run. Of several processes, only the first has an evaluator with searches.

    worse: the searches that find less than before training.
    """
    parts = []
    if evaluator is not None and evaluator.parts:
        start = f"{before[REPORTED]:.3f} → " if before else ""  # empty when a resume changed the searches
        parts.append(f"nDCG@10 {start}{after[REPORTED]:.3f}")
        queries = fmean(after[f"{name}_query_active_dims"] for name in evaluator.parts)
        documents = fmean(after[f"{name}_document_active_dims"] for name in evaluator.parts)
        parts.append(f"active dims {queries:.0f} per query and {documents:.0f} per document")
    if worse:
        parts.append(f"worse than before on {', '.join(worse)}")
    parts.append(
        f"{duration(manifest['train_seconds'])} of steps ({duration(manifest['total_seconds'])} in all), "
        f"{manifest['samples_per_second']:.1f} samples/s, "
        f"{manifest['padding_share']:.0%} padding, "
        f"peak memory {manifest['peak_memory_gib']:.1f} GiB"
    )
    return "verdict   " + " · ".join(parts)
