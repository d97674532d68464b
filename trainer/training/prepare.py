"""Makes everything that a run needs. `make check` prints the decisions; `make train` prints them and goes on."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments
from torch import nn

from trainer.config import Config, ConfigError, LoadedConfig
from trainer.data.best_windows import BestWindows
from trainer.data.dense_vectors import DenseVectors, let_vectors_pass, pays, texts_to_encode
from trainer.data.forward_passes import forward_passes_of
from trainer.data.loading import load_data
from trainer.data.tokens import Tokeniser
from trainer.data.training_data import TrainingData
from trainer.data.vocabulary_texts import read_vocabulary_texts
from trainer.encoding.fuse import fuse
from trainer.encoding.windows import read_in_windows
from trainer.hub.download import HubUnreachable
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.losses.teacher_vectors import batch_scores
from trainer.losses.teachers import add_teacher_scores, check_teachable, missing_scores_lines
from trainer.models.attention import choose_attention, plan_attention
from trainer.models.build import build_model, document_idf, fetch_base_model, load_model
from trainer.models.compiled import compile_networks
from trainer.models.remote_code import BaseModel
from trainer.runs.run import MODELS, Run
from trainer.system.device import choose_device
from trainer.system.distributed import first_on_each_machine_first, from_first, is_first
from trainer.system.progress_bar import going_on, in_columns
from trainer.training import describe
from trainer.training.arguments import build_arguments, routes_of
from trainer.training.best_checkpoint import BestCheckpoint, best_checkpoint_of, checkpoint_line, what_differs
from trainer.training.evaluators import SearchEvaluator, build_evaluator
from trainer.training.memory import estimate_memory, memory_lines, precision_of
from trainer.training.mining_rounds import mine_again
from trainer.training.progress import Progress
from trainer.training.resume import START, Start, check_same_data, check_steps_left

# Rows of each set that `make check` tokenises to estimate the share of padding. Training tokenises all rows.
CHECKED_ROWS = 5_000


@dataclass(frozen=True)
class Parts:
    """The parts of a run that `make check` makes too."""

    config: Config
    """The config. Its model.attention is the one that was chosen."""
    device: str
    device_reason: str
    base: BaseModel | None
    """The base model's files; None for a model from scratch, and for a run that is resumed."""
    data: TrainingData
    progress: Progress
    teacher: dict[str, Any] | None
    """What run.json holds of the teacher and its scores; None without a teacher, and for `make check`."""
    model: SparseEncoder
    statistics: BatchStatistics
    loss: nn.Module


@dataclass(frozen=True)
class Prepared(Parts):
    """Everything that training needs."""

    evaluator: SearchEvaluator | None
    best: BestCheckpoint
    arguments: SparseEncoderTrainingArguments
    decisions: tuple[str, ...]
    """The printed lines: each decision with its reason."""

    @property
    def continues_scores(self) -> bool:
        """Whether scores of before the resume can be compared with later ones."""
        return self.progress.is_comparable(self.best.depends_on)


class Decisions:
    """Prints each decision as soon as it is made, and keeps the line. Of several processes only the first prints."""

    def __init__(self, echo: Callable[[str], None], *, quiet: bool = False) -> None:
        """quiet: keep the lines and do not print them."""
        self.lines: list[str] = []
        self.quiet = quiet
        self.echo = echo if is_first() else lambda line: None

    def add(self, *lines: str) -> None:
        """Print and keep these lines."""
        self.lines += lines
        for line in () if self.quiet else lines:
            self.echo(line)


def prepare(loaded: LoadedConfig, run: Run, start: Start, decisions: Decisions) -> Prepared:
    """Make everything that training needs. Raises ConfigError for a mistake that the user can fix."""
    parts = make_parts(loaded, decisions, run, start)
    config = parts.config
    evaluator = share_evaluator(config, parts.data, decisions)
    best = best_checkpoint_of(config, parts.data, evaluator)
    decisions.add(checkpoint_line(config, best))
    if config.training.load_best_model_at_end and not parts.progress.is_comparable(best.depends_on):
        differs = what_differs(parts.progress.depends_on or {}, best.depends_on)
        decisions.add(f"          checkpoints up to step {start.step} do not count: {differs}")
    arguments = build_arguments(
        config, run, parts.model, parts.loss, parts.device, best_metric=best.metric, roles=parts.data.roles
    )
    return Prepared(**vars(parts), evaluator=evaluator, best=best, arguments=arguments, decisions=(*decisions.lines,))


def check(loaded: LoadedConfig, decisions: Decisions) -> None:
    """Print the decisions of `make_parts`. No run folder is written, and nothing is uploaded.

    The machine may be another than the one that will train. When the hub cannot be reached, a line names what needs it.
    """
    pushed = f", pushed to {loaded.config.hub.repo}" if loaded.config.hub.push else ""
    decisions.add(f"config    {loaded.file} is valid", f"output    {MODELS / loaded.name}{pushed}")
    with contextlib.suppress(HubUnreachable):  # the decisions say so
        make_parts(loaded, decisions)


def make_parts(loaded: LoadedConfig, decisions: Decisions, run: Run | None = None, start: Start = START) -> Parts:
    """Make data, model and loss, and add a line for each decision. run: None for `make check`.

    `make check` makes the model on the CPU, tokenises at most CHECKED_ROWS rows of each set, and lets no teacher score.
    """
    config = loaded.config
    device, reason = decide_device(config, decisions, must_exist=run is not None)
    base, data, progress = load(loaded, decisions, run, start)
    if run:
        mine_again(config, data, run, start, progress.steps, device, decisions.echo)
    teacher = decide_teacher(config, data, device, decisions, score=run is not None)
    model = make_model(config, base, data, start, device if run else "cpu", decisions)
    decisions.add(*describe.model_lines(config, base, model))
    decisions.add(*fuse_head(config, model, device))
    # from here on, the model may have an attention that computes in 16 bits only
    config = decide_attention(config, model, device, decisions, run, start)
    different, drawn = texts_to_encode(config, data)
    once = pays(different, drawn)
    tokenise(config, data, model, device, decisions, keep=run is not None, in_batches=not once)
    if once:
        decisions.add(
            f"vectors   the frozen model encodes {different:,} different texts once, not {drawn:,} step by step"
            + (encode_once(config, data, model) if run else "")
        )
    if config.model.long_documents == "windows":
        read_in_windows(model)
    decisions.add(*describe.length_lines(data, model))
    estimate = estimate_memory(config, data.columns, model, vectors=different if once else 0)
    decisions.add(*memory_lines(config, estimate, device if reason else None))
    if run and config.training.torch_compile and once:
        decisions.add("compile   nothing: no step goes through the network")
    elif run and config.training.torch_compile:
        decisions.add(f"compile   {compile_networks(model, forward_passes_of(config, device).lengths)}")
    if once:
        let_vectors_pass(model)
    statistics = BatchStatistics(enabled=config.evaluation.track_sparsity)
    loss = build_loss(config, model, statistics, document_idf(config, model, data.passages))
    decisions.add(*describe.rate_lines(config, model, loss), *describe.sparsity_lines(config))
    return Parts(config, device, reason, base, data, progress, teacher, model, statistics, loss)


# ------------------------------------------------------------------------------------------- the parts, one by one
def decide_device(config: Config, decisions: Decisions, *, must_exist: bool) -> tuple[str, str]:
    """The device and the reason for it.

    must_exist: raise ConfigError when this machine lacks the device. Otherwise the reason is then "".
    """
    try:
        device, reason = choose_device(config)
    except ConfigError as error:
        if must_exist:
            raise
        decisions.add(f"device    {error.format_message()}")
        return config.hardware.device, ""
    decisions.add(f"device    {device} ({reason})")
    return device, reason


def load(
    loaded: LoadedConfig, decisions: Decisions, run: Run | None, start: Start
) -> tuple[BaseModel | None, TrainingData, Progress]:
    """The base model's files, the data, and the run's progress, which knows the number of steps.

    Raises ConfigError when there is nothing to learn from, or when a resumed run would have other rows. `make check` (run
    is None) leaves out data that needs the hub. It raises HubUnreachable when no model can be made.
    """
    config, needs = loaded.config, ""
    base: BaseModel | None = None
    with first_on_each_machine_first():
        try:  # the base model before the larger data: its code may not be trusted, and then the run stops at once
            base = None if start.checkpoint else fetch_base_model(config, loaded.pin_command)
        except HubUnreachable:
            if run:
                raise
            needs = f"needs the hub: {config.model.base_model}"
        data = load_data(config, without_hub=run is None)
    progress = Progress(config, data)
    if run:
        check_same_data(data, run)
    if start.checkpoint:
        progress.load(start.checkpoint, start.step, decisions.add)
    if data.unreachable:
        decisions.add(*(f"data      {name}: needs the hub" for name in data.unreachable))
        decisions.add("steps     needs the hub: the number of rows is not known")
    else:
        check_steps_left(loaded, start.step, progress.steps, decisions.add)
        progress.plan()
        decisions.add(*describe.data_lines(config, data, progress.steps), describe.steps_line(config, progress))
        check_something_to_learn(config, data)
        decisions.add(*describe.lonely_pairs_lines(config, data))
    if data.unreachable and config.model.depends_on_texts:
        needs = needs or "needs the hub: the model is made from the training texts"
    if needs:
        decisions.add(*describe.base_model_lines(config, None), f"rates     {needs}", f"memory    {needs}")
        raise HubUnreachable(needs)
    return base, data, progress


def check_something_to_learn(config: Config, data: TrainingData) -> None:
    """Raise ConfigError when every training batch is a single pair, so that the contrastive loss is always 0."""
    if not config.loss.has_regularizers:
        return  # reconstruction is learned from single rows too
    counts = [data.batches_of_one(name, config) for name in data.train]
    alone, batches = (sum(column) for column in zip(*counts, strict=True))
    if alone == batches:
        raise ConfigError(
            f"there is nothing to learn from: {describe.NOTHING_TO_COMPARE}, which is so in every batch. "
            f"{describe.more_rows(config)}"
        )


def decide_teacher(
    config: Config, data: TrainingData, device: str, decisions: Decisions, *, score: bool
) -> dict[str, Any] | None:
    """Give the rows their teacher scores, and return what run.json holds of them.

    score: False for `make check`, which only adds lines on what the teachers have to read.
    """
    teacher = config.loss.teacher
    if teacher is None or all(one.kind != "data" for one in teacher.teachers.values()):
        decisions.add(*describe.unused_scores_lines(data))
        data.forget_scores()
    if teacher is None:
        return None
    decisions.add(*describe.teacher_lines(config, data))
    if not data.unreachable:
        check_teachable(data.train, teacher)
    if not score:
        decisions.add(*missing_scores_lines(teacher, data.train, config.model))
        return None
    sets = {name: {subset: data.train[subset] for subset in subsets} for name, subsets in data.subsets.items()}
    if teacher.passages == "batch":
        data.batch_scores, record = batch_scores(sets, teacher, device, decisions.add, config.model, data.languages)
    else:
        taught, record = add_teacher_scores(sets, teacher, device, decisions.add, config.model, data.languages)
        data.train.update(taught)
    return record


def make_model(
    config: Config, base: BaseModel | None, data: TrainingData, start: Start, device: str, decisions: Decisions
) -> SparseEncoder:
    """The untrained model, or the model of the checkpoint that a run is resumed from."""
    transformers.set_seed(config.training.seed)
    if start.checkpoint:
        return load_model(start.checkpoint, config, device)
    corpus, lines = read_vocabulary_texts(config.model.vocabulary_texts)
    decisions.add(*(in_columns("vocabulary", line) for line in lines))
    queries, documents = data.queries(), data.passages()
    with going_on(in_columns("model", "building")):
        return build_model(config, base, queries, documents, device, corpus or None)


def fuse_head(config: Config, model: SparseEncoder, device: str) -> list[str]:
    """Put the fused head into the model if config and model allow it. Returns the line that says so, or why not."""
    if not config.loss.has_regularizers:
        return []  # CSR has no head over a vocabulary
    if not config.hardware.fused_head:
        return ["head      as the library computes it: hardware.fused_head is false"]
    return [f"head      {fuse(model, device)}"]


def decide_attention(
    config: Config, model: SparseEncoder, device: str, decisions: Decisions, run: Run | None, start: Start
) -> Config:
    """Set the model's attention, and return the config with the attention that was chosen.

    `make check` (run is None) sets nothing; it decides as far as that is possible without trying. Raises ConfigError when
    the GPUs of one training would choose differently.
    """
    if run:
        config, line = choose_attention(model, config, device, start.packed_texts)
    else:
        try:
            config, line = plan_attention(model, config, device)
        except ConfigError as error:
            line = f"attention {error.format_message()}"
    if config.model.attention != from_first(config.model.attention):
        raise ConfigError("model.attention: this training's GPUs differ in what they can do. Train on GPUs of one kind")
    decisions.add(line)
    return config


def tokenise(
    config: Config,
    data: TrainingData,
    model: SparseEncoder,
    device: str,
    decisions: Decisions,
    *,
    keep: bool,
    in_batches: bool = True,
) -> None:
    """Make the token ids of all rows. Each different text is tokenised once.

    keep: False for `make check`, which tokenises CHECKED_ROWS rows of each set and keeps no ids. in_batches: whether the
    network encodes the texts of every batch; otherwise there is no padding to speak of.
    """
    rows = data if keep else data.sample(CHECKED_ROWS, config.training.seed)
    tokeniser = Tokeniser(model, routes_of(config), decisions.add, keep=keep)
    with first_on_each_machine_first():
        windows = BestWindows(model) if config.model.long_documents == "windows" else None
        rows.tokenise(tokeniser, windows, config.datasets.queries_per_passage, config.training.seed)
    if keep:
        decisions.add(describe.token_line(tokeniser))
    if not data.unreachable:
        decisions.add(*describe.sitting_out_lines(config, data))
        decisions.add(*([describe.padding_line(config, rows, device)] if in_batches else []))
        decisions.add(*describe.query_lines(config, data))


def encode_once(config: Config, data: TrainingData, model: SparseEncoder) -> str:
    """Have the frozen dense model encode each different text once, for all steps. Returns how large and long that was."""
    began, vectors = time.perf_counter(), DenseVectors(model, precision_of(config))
    for name, tokens in data.tokens.items():
        data.tokens[name] = vectors.add_to(name, tokens)
    return f": {vectors.bytes / 2**20:,.0f} MiB in {time.perf_counter() - began:.0f} s"


def share_evaluator(config: Config, data: TrainingData, decisions: Decisions) -> SearchEvaluator | None:
    """The evaluator; None without searches. The first process runs it. The evaluators of the others are empty."""
    evaluator = build_evaluator(config, data.search, decisions.add) if is_first() else None
    exists = from_first(evaluator is not None)
    return evaluator if is_first() else SearchEvaluator({}) if exists else None
