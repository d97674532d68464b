"""What happens beside the training steps: TensorBoard, the watchdog, the progress bar, signals."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback

from trainer.device import peak_memory_gib
from trainer.distributed import largest, processes, total
from trainer.progress_bar import ProgressReport, in_columns
from trainer.sparsity import BatchStatistics

PROBES = (
    "Hvor høyt er Galdhøpiggen, Norges høyeste fjell?",
    "Søknad om barnehageplass sendes til kommunen.",
    "Hvornår blev Storebæltsbroen åbnet for trafik?",
    "Et nyt pas bestilles hos borgerservice i kommunen.",
    "Vilken är Sveriges största sjö?",
    "Älgjakten börjar i september i norra Sverige.",
)


class Throughput:
    """Rows and tokens that went through the model in all processes, padding with them, and the seconds it took: in the
    current interval, and in all.

    `restart` and `read` are called by every process at the same steps.
    """

    def __init__(self, static_routes: Collection[str] = (), clock: Callable[[], float] = time.perf_counter):
        """static_routes: tasks whose texts do not go through the network, where padding costs nothing."""
        self.static_routes, self.clock = static_routes, clock
        self.total_rows = self.total_tokens = self.total_encoded = self.total_padding = 0
        self.total_seconds = self.seconds = 0.0
        self.since: float | None = None  # the clock stands still until `restart`
        self.rows, self.positions, self.tokens, self.encoded = 0, 0, [], []

    def restart(self) -> None:
        """Count what was seen towards the totals, and start a new interval."""
        self.settle()
        self.since = self.clock()

    def settle(self) -> None:
        """Count what was seen towards the totals."""
        rows, tokens, encoded, positions = self._seen()
        self.total_rows += rows
        self.total_tokens += tokens
        self.total_encoded += encoded
        self.total_padding += positions - encoded
        self.rows, self.positions, self.tokens, self.encoded = 0, 0, [], []
        self.total_seconds += self.elapsed()
        self.seconds, self.since = 0.0, None if self.since is None else self.clock()

    def elapsed(self) -> float:
        """Seconds of the current interval."""
        return self.seconds + (0.0 if self.since is None else self.clock() - self.since)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here, evaluating or saving, takes no time of the steps."""
        was_running = self.since is not None
        self.seconds, self.since = self.elapsed(), None
        try:
            yield
        finally:
            self.since = self.clock() if was_running else None

    def _seen(self) -> tuple[int, int, int, int]:
        tokens, encoded = (int(sum(counts)) for counts in (self.tokens, self.encoded))
        return tuple(int(count) for count in total(self.rows, tokens, encoded, self.positions))

    def add(self, features: list[dict[str, Any]]) -> None:
        """The columns of one batch, with their attention masks [rows, length], or packed: with where each text begins."""
        first = features[0]
        self.rows += len(first["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in first else len(first["input_ids"])
        for column in features:
            # the sums stay on the device: reading them here would wait for the GPU at every step
            positions = column["input_ids"].numel()
            count = column["attention_mask"].sum() if "attention_mask" in column else positions
            self.tokens.append(count)
            if column.get("task") not in self.static_routes:
                self.encoded.append(count)
                self.positions += positions

    def read(self) -> dict[str, float]:
        """Rows (samples) and tokens per second of the current interval, and which share of the positions was padding."""
        seconds = self.elapsed()
        rows, tokens, encoded, positions = self._seen()
        return {
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - encoded / max(positions, 1),
        }


class TensorBoardLog(TrainerCallback):
    """Writes every scalar to TensorBoard, and the top terms of fixed probe sentences as text."""

    def __init__(self, folder: Path, statistics: BatchStatistics, throughput: Throughput, device: str, probes: int):
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

    def on_train_begin(self, args, state: TrainerState, control, **kwargs) -> None:
        """Start the clock."""
        self._open(state)
        self.throughput.restart()

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """One line of scalars: losses, learning rates, sparsity, speed, memory."""
        trained = bool(logs) and "loss" in logs
        speed = self.throughput.read() if trained else {}
        if trained and self._open(state):
            self._training_scalars(logs, speed, state, kwargs["optimizer"], kwargs["model"])
        elif logs and self._open(state):
            found = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            # how fast each set was evaluated would bury the scores
            self._scalars("eval", {k: v for k, v in found.items() if not k.endswith(("_second", "_runtime"))}, state)
        if trained:
            self.statistics.reset()
            self.throughput.restart()

    def _training_scalars(
        self,
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
                name = names.get(key, f"loss/{key}" if "loss" in key else None)
            if name:
                self.writer.add_scalar(name, value, state.global_step)
        for name, rate in learning_rates(optimizer, model).items():
            self.writer.add_scalar(f"optimizer/learning_rate_{name}", rate, state.global_step)
        for route, values in self.statistics.summary().items():
            kept = {k: v for k, v in values.items() if k not in ("busiest_dim", "active_share")}
            self._scalars("sparsity" if route == "both" else f"sparsity/{route}", kept, state)
        self._scalars("speed", speed, state)
        self._scalars("memory", {"peak (GiB)": peak_memory_gib(self.device)}, state)

    def _scalars(self, group: str, values: dict[str, float], state: TrainerState) -> None:
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{group}/{key}", value, state.global_step)

    def on_evaluate(self, args, state: TrainerState, control, model: SparseEncoder | None = None, **kwargs) -> None:
        """Top terms of the probe sentences."""
        writer = self._open(state)
        if writer and self.probes and self.last_panel != state.global_step:  # called once for every set
            self.last_panel = state.global_step
            if (text := top_terms(model, self.probes)) is not None:
                writer.add_text("top terms", text, state.global_step)

    def on_train_end(self, args, state: TrainerState, control, **kwargs) -> None:
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


def term_of(model: SparseEncoder | None, dimension: int) -> str:
    """A dimension's number and, where dimensions are words, its word."""
    if model is None or model.get_embedding_dimension() not in (None, len(model.tokenizer)):
        return str(dimension)
    return f"{dimension} ('{model.tokenizer.convert_ids_to_tokens(dimension)}')"


def top_terms(model: SparseEncoder, texts: tuple[str, ...], count: int = 12) -> str | None:
    """A Markdown table of the heaviest terms of each text as a document; None when dimensions are not words (CSR)."""
    vectors = model.encode_document(list(texts), show_progress_bar=False)
    if vectors.shape[1] != len(model.tokenizer):
        return None
    lines = ["| text | active dims | top terms |", "|---|---|---|"]
    for text, terms, row in zip(texts, model.decode(vectors, top_k=count), vectors, strict=True):
        words = ", ".join(f"{term} {weight:.2f}" for term, weight in terms)
        lines.append(f"| {text} | {int((row.to_dense() > 0).sum())} | {words.replace('|', '&#124;')} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Sign:
    """One sign of collapse: when it shows, and what to say."""

    name: str
    shows: Callable[[dict[str, dict[str, float]]], bool]
    message: str
    from_start: bool = False  # whether it is a bad sign even while the regulariser's weight is warmed up


SIGNS = (
    Sign(
        "dense documents",
        lambda s: s["document"]["active_share"] > 0.2,
        "documents are dense: {document[active_dims_mean]:.0f} active dims on average, {document[active_share]:.0%} of "
        "the vocabulary. Raise loss.document_regularizer_weight or lower loss.target_document_dims",
    ),
    Sign(
        "empty queries",
        lambda s: s["query"]["active_dims_min"] == 0,
        "a query has zero active dims, so it finds nothing. Lower loss.query_regularizer_weight or raise "
        "loss.target_query_dims, or look for queries of unknown words only",
        from_start=True,
    ),
    Sign(
        "empty documents",
        lambda s: s["document"]["active_dims_mean"] < 1,
        "documents have no active dims left, and no gradient brings one back. Stop, and train anew with a larger "
        "loss.target_document_dims, a smaller loss.document_regularizer_weight or a lower learning rate",
        from_start=True,
    ),
    Sign(
        "a dim in every document",
        lambda s: s["document"]["busiest_dim_share"] > 0.95,
        "dimension {document[busiest_term]} is active in {document[busiest_dim_share]:.0%} of the documents, so it "
        "tells nothing apart. Raise loss.document_regularizer_weight or lower loss.target_document_dims",
    ),
    Sign(
        "documents alike",
        lambda s: s["both"]["document_cosine_mean"] > 0.9,
        "documents look alike: their mean cosine is {both[document_cosine_mean]:.2f}. Lower the learning rate",
    ),
)


class Watchdog(TrainerCallback):
    """Warns of collapse, naming the step. Runs before TensorBoardLog, which resets the statistics.

    Dense and similar documents are normal while the regulariser's weight is warmed up (the library's quadratic schedule
    over the first third of training), so the watchdog looks for them from then on.
    """

    WARM_FROM = 1 / 3

    def __init__(self, statistics: BatchStatistics, say: Callable[[str], None]):
        self.statistics, self.say = statistics, say
        self.warnings: list[dict[str, Any]] = []

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Look at what was seen since the last log."""
        summary = self.statistics.summary() if logs and "loss" in logs else {}
        warm = state.global_step >= self.WARM_FROM * state.max_steps
        if summary:
            summary["document"]["busiest_term"] = term_of(kwargs.get("model"), summary["document"]["busiest_dim"])
        for sign in SIGNS if summary else ():
            if not (warm or sign.from_start) or not sign.shows(summary):
                continue
            known = next((w for w in self.warnings if w["sign"] == sign.name), None)
            if known:
                known["last_step"] = state.global_step
                continue
            message = sign.message.format(**summary)
            self.warnings.append(
                {"sign": sign.name, "step": state.global_step, "last_step": state.global_step, "message": message}
            )
            self.say(f"Warning: step {state.global_step}: {message}")


class EvaluationProgress(TrainerCallback):
    """How far the evaluation loss of a set has come."""

    progress: ProgressReport | None = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        """One batch more."""
        if self.progress is None:
            self.progress = ProgressReport(
                desc=in_columns("evaluating", "loss"), total=len(eval_dataloader), unit="batches"
            )
        self.progress.update()

    def on_evaluate(self, *args, **kwargs) -> None:
        """Called once for every set."""
        if self.progress is not None:
            self.progress.close()
        self.progress = None


class ProgressBar(ProgressCallback):
    """The progress bar with the loss behind it; no printed dictionary per log line, no bar per evaluation."""

    def on_prediction_step(self, *args, **kwargs) -> None:
        """An evaluation has a bar of ours, if it takes long."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


class ProgressLines(TrainerCallback):
    """A line now and then, where nobody sees a bar move: log files, containers, CI."""

    SECONDS = 10.0

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self.start = self.last = time.perf_counter()
        self.first_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """A line if the last one is long ago, or training is at its end."""
        now = time.perf_counter()
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if now - self.last < self.SECONDS and state.global_step < state.max_steps:
            return
        self.last = now
        left = (now - self.start) / max(state.global_step - self.first_step, 1) * (state.max_steps - state.global_step)
        self.say(
            f"step {state.global_step:,} of {state.max_steps:,}, loss {float(logs['loss']):.3f}, {left:.0f} s left"
        )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM outside the training steps, where there is nothing to save."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class EvaluationCut(BaseException):
    """An evaluation was ended by a signal, so that the checkpoint can be saved in time."""


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. Outside the steps, and on a later Ctrl-C, at once.

    A signal often comes twice within milliseconds, from a shell's group and from a program that passes it on: that is
    one wish to stop, not two.
    """

    SAME_SECONDS = 3.0

    def __init__(self):
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._in_steps = self._evaluating = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        later = time.monotonic() - self._received_at > self.SAME_SECONDS
        if not self._in_steps or (self.received is not None and later and number == signal.SIGINT):
            raise Interrupted(number)
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            if self._evaluating and processes() == 1:  # several processes evaluate together: they finish together
                raise EvaluationCut

    @contextlib.contextmanager
    def cuts(self) -> Iterator[None]:
        """Let a signal end what is done in here: an evaluation can take longer than a process has before it is killed."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """From here on there is something to save."""
        self._in_steps = True

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Save and stop after the step in which the signal came."""
        # one process may be told alone, or a step later than another: all stop after the same step
        if number := largest(self.received or 0):
            self.received = signal.Signals(number)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """From here on everything is saved."""
        self._in_steps = False


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the weights of the step before are untouched."""

    def __init__(self, step: int, value: float):
        super().__init__(f"the loss became {'NaN' if math.isnan(value) else 'infinite'} at step {step}")
        self.step = step
