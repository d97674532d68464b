"""The plan of a run, in words: what will be trained on what, for how long, with how much memory, and where it goes."""

from collections.abc import Iterator
from dataclasses import dataclass

from sentence_transformers import SparseEncoder
from torch import nn

from trainer.config import FROM_SCRATCH, Config, ConfigError, LoadedConfig
from trainer.config.schema import ModelConfig, TeacherConfig
from trainer.data.choosing import choice_words
from trainer.data.mining import mining_words
from trainer.data.tokens import Tokeniser, folder_of_tokens
from trainer.data.training_data import TrainingData, load_data
from trainer.encoding.fuse import fuse
from trainer.hub.download import HubUnreachable
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.losses.teachers import ScoreStore, fetch_teacher, with_negatives
from trainer.models.attention import plan_attention
from trainer.models.build import build_model, document_idf, fetch_base_model, vocabulary_of
from trainer.models.normalizers import composes_first
from trainer.models.prompts import prompt_lines
from trainer.models.remote_code import BaseModel
from trainer.runs.run import MODELS
from trainer.system.device import choose_device
from trainer.system.distributed import processes
from trainer.system.progress_bar import going_on, in_columns
from trainer.training.arguments import query_rate_mapping, routes_of
from trainer.training.memory import memory_lines
from trainer.training.progress import Progress

# Rows of each set that a plan tokenises to say how much padding there will be; training looks at all of them.
PLAN_ROWS = 5_000


@dataclass(frozen=True)
class Schedule:
    """How long a run is."""

    steps: int
    epochs: float


def schedule_of(config: Config, data: TrainingData, progress: Progress | None = None) -> Schedule:
    """Steps as transformers' Trainer counts them; notes in the data's summaries how many rows they draw.

    progress: of a run that goes on.
    """
    progress = progress or Progress(config, data)
    progress.plan()
    return Schedule(progress.steps, progress.place_at(progress.steps) / progress.steps_per_epoch)


def data_lines(config: Config, data: TrainingData, schedule: Schedule) -> Iterator[str]:
    """Rows per set and language, what was left out, and the share of each set that will be seen."""
    for summary in data.summaries.values():
        kinds = [
            f"{count:,} {kind}" for kind, count in (("triplets", summary.triplets), ("pairs", summary.pairs)) if count
        ]
        languages = ", ".join(f"{language} {count:,}" for language, count in summary.languages.items())
        seen = f"{summary.rows_seen / summary.rows:.0%} seen"
        passes = summary.rows_drawn / summary.rows
        yield (
            f"data      {summary.name}: {summary.rows:,} rows ({' + '.join(kinds)}; {languages}), {seen}"
            + (f", {passes:.1f} times" if passes > 1 else "")
        )
        for source, commit in summary.revisions.items():
            yield f"            from {source}" + (f" at {commit}" if commit else " (local copy)")
        if summary.mined:
            yield f"            {mining_words(summary.mined)}"
        for reason, count in summary.left_out.items():
            yield f"            {count:,} rows not trained on: {reason}"
        for reason, count in summary.eval_left_out.items():
            yield f"            {count:,} rows not evaluated on: {reason}"
        for note in summary.notes:
            yield f"            {note}"
        if left := data.rows_left_over(config, summary.name):
            yield f"            {left:,} rows sit out each pass: they cannot be shared equally by {processes()} processes"
    for found in data.search:
        size = f"{len(found.queries):,} queries over {len(found.corpus):,} passages"
        yield f"search    {found.name}: {size}{choice_words(found)}"
        for note in found.reading.lines():
            yield f"            {note}"
    datasets = config.datasets
    how = datasets.sampling_strategy.replace("_", " ")
    if datasets.sampling_strategy == "round_robin":
        how += f", an epoch ends with the {datasets.epoch} set"
    training = config.training
    batch = f"{training.per_device_train_batch_size} rows"
    if processes() > 1:
        batch += f" × {processes()} processes"
    if training.gradient_accumulation_steps > 1:
        batch += f" × {training.gradient_accumulation_steps} accumulated"
    yield f"steps     {schedule.steps:,} of {batch} ({schedule.epochs:.3g} epochs; {how})"


def comparison_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Warnings of pairs that are alone in their batch: their contrastive loss is 0, whatever the model.

    Raises ConfigError where there is nothing else to train on.
    """
    if not (config.loss.type == "splade" or config.loss.gamma):
        return  # no contrastive loss
    found = {half: data.batches_of_one(half, config) for half in data.train}
    alone, batches = (sum(counts) for counts in zip(*found.values(), strict=True))
    why = "a pair that is alone in its batch is told from nothing, and its contrastive loss is 0"
    if config.training.per_device_train_batch_size * processes() == 1:
        advice = (
            "Set training.per_device_train_batch_size to 2 or more (rows of accumulated batches are not compared; "
            "loss.cached compares many in little memory), or find negatives: datasets.<name>.mine"
        )
    else:
        advice = "Add negatives, or rows that share neither query nor passage with most others"
    if alone == batches and config.loss.type == "splade":
        raise ConfigError(f"there is nothing to learn from: {why}, which is so in every batch. {advice}")
    for half, (alone, batches) in found.items():
        if alone:
            yield f"Warning: {half}: {why}, as in {alone:,} of {batches:,} batches ({alone / batches:.1%}). {advice}"
    for half in data.eval:
        alone, batches = data.eval_batches_of_one(half, config)
        if alone:
            yield (
                f"Warning: {half}: the evaluation loss is 0 in {alone:,} of {batches:,} batches ({alone / batches:.1%}), "
                "whatever the model: a held-out pair is alone in its batch. Set training.per_device_eval_batch_size to 2 "
                "or more, and hold out more rows"
            )


def token_line(tokeniser: Tokeniser) -> str:
    """How many tokens there are, and where their ids are kept."""
    made = tokeniser.texts - tokeniser.texts_found
    how = f"tokenised in {tokeniser.seconds:.0f} s" if made else "found"
    if made and tokeniser.texts_found:
        how += f", {tokeniser.texts_found:,} of the texts found"
    kept = f", {tokeniser.bytes / 2**20:,.0f} MiB in {folder_of_tokens()}" if tokeniser.bytes else ""
    return f"tokens    {tokeniser.tokens:,} in {tokeniser.texts:,} different texts, {how}{kept}"


def sitting_out_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Rows for which there is no batch."""
    for name in data.summaries:
        if alone := data.rows_without_a_batch(config, name):
            advice = "too many share a text; lower per_device_train_batch_size"
            yield f"batches   {name}: {alone:,} rows sit out each pass: {advice}"


def padding_line(config: Config, data: TrainingData, device: str) -> str:
    """How much of what the network computes will be padding. The data has its token ids."""
    if config.model.packs_texts:
        return "padding   none: texts are packed (model.attention), so datasets.length_window has no effect"
    share, at_random = data.padding(config, device)
    window = config.datasets.length_window
    how = f"; {at_random:.0%} if rows of any length were batched (length_window: {window})" if window > 1 else ""
    return f"padding   {share:.0%} of the positions that go through the network{how}"


def training_lines(config: Config, model: SparseEncoder, loss: nn.Module) -> Iterator[str]:
    """Parameters per learning rate, and what decides the sparsity."""
    rates = query_rate_mapping(config, loss)
    query = {name.removeprefix("^").removesuffix("$").replace("\\", "") for name in rates}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"query": [], "rest": [], "frozen": []}
    for name, parameter in model.named_parameters():
        full = f"model.{name}"
        groups["frozen" if not parameter.requires_grad else "query" if full in query else "rest"].append(
            (name, parameter)
        )

    def count(group: str) -> str:
        return f"{sum(parameter.numel() for _, parameter in groups[group]):,} parameters"

    yield f"rates     {config.training.learning_rate:g}: {count('rest')} in {len(groups['rest'])} tensors"
    if groups["query"]:
        names = ", ".join(name for name, _ in groups["query"])
        yield f"          {config.training.query_learning_rate:g}: {count('query')}: {names}"
    if groups["frozen"]:
        yield f"          not trained: {count('frozen')} in {len(groups['frozen'])} tensors"
    yield from sparsity_lines(config)


def sparsity_lines(config: Config) -> Iterator[str]:
    """The targets that weights are found for, and the penalty where it is not the usual one."""
    loss = config.loss
    for route, target in (("documents", loss.target_document_dims), ("queries", loss.target_query_dims)):
        if target:
            yield f"sparsity  {route}: {target:,} active dims on average, for which the first third finds the weight"
    if loss.type == "splade" and (loss.penalty != "flops" or loss.document_dims_cap):
        cap = f", of documents with more than {loss.document_dims_cap:,} active dims" if loss.document_dims_cap else ""
        yield f"penalty   {loss.penalty}{cap}"


def model_lines(config: Config, base: BaseModel | None) -> Iterator[str]:
    """Architecture, base model, and the Python code that it brings."""
    name, revision = config.model.base_model, config.model.revision
    origin = "built from scratch" if name == FROM_SCRATCH else f"from {name}" + (f" at {revision}" if revision else "")
    yield f"model     {config.model.architecture} {origin}"
    for file, changes in base.code.items() if base else ():
        what = f"{len(changes)} faults mended: {', '.join(changes)}" if changes else "runs as it came"
        yield f"code      {file}: {what}"


def tokenizer_lines(model: SparseEncoder) -> Iterator[str]:
    """A warning where texts come in one form of Unicode here, and users of the model may encode another."""
    if composes_first(model.tokenizer):
        return
    fast = model.tokenizer.is_fast
    why = "it was saved before tokenizers did so" if fast else "it is Python code, to which nothing can be added"
    yield (
        f"tokenizer does not bring texts into Unicode's form NFC: {why}. Who encodes with the model has to, or words with "
        "å, ä and ö that were typed on a Mac match nothing"
    )


def head_line(config: Config, model: SparseEncoder, device: str) -> str:
    """Put the fused head into the model where config and model allow it, and say so. device: where training will be."""
    if not config.hardware.fused_head:
        return "head      as the library computes it: hardware.fused_head is false"
    return f"head      {fuse(model, device)}"


def plan(loaded: LoadedConfig) -> Iterator[str]:
    """Every line of the plan. What cannot be said without the hub is said to need it. Nothing is trained or uploaded."""
    config = loaded.config
    yield f"config    {loaded.file} is valid"
    yield f"output    {MODELS / loaded.name}" + (f", pushed to {config.hub.repo}" if config.hub.push else "")
    here = None
    try:
        here, reason = choose_device(config)
        yield f"device    {here} ({reason})"
    except ConfigError as error:
        yield f"device    {error.format_message()}"
    device = here or config.hardware.device
    missing: dict[str, HubUnreachable] = {}
    data = load_data(config, missing)
    for name in missing:
        yield f"data      {name}: needs the hub"
    if not missing:
        yield from data_lines(config, data, schedule_of(config, data))
        yield from comparison_lines(config, data)
    else:
        yield "steps     needs the hub: the number of rows is not known"
    try:
        base = fetch_base_model(config)
    except HubUnreachable:
        yield from model_lines(config, None)
        yield f"rates     needs the hub: {config.model.base_model}"
        yield f"memory    needs the hub: {config.model.base_model}"
        return
    yield from model_lines(config, base)
    if base is None and missing:
        yield "rates     needs the hub: the model is built from the training texts"
        return
    with going_on(in_columns("model", "building")):
        model = build_model(config, base, data.texts("anchor"), data.texts("positive", "negative"), "cpu")
    yield f"          {vocabulary_of(model):,} dimensions, {sum(p.numel() for p in model.parameters()):,} parameters"
    yield from tokenizer_lines(model)
    yield from prompt_lines(config.model, base.folder if base else None, model.prompts)
    try:
        config, line = plan_attention(model, config, device)
        yield line
    except ConfigError as error:
        yield f"attention {error.format_message()}"
    if config.loss.type == "splade":
        yield head_line(config, model, device)
    if not missing:
        yield from sitting_out_lines(config, data)
        sample = data.sample(PLAN_ROWS, config.training.seed)
        sample.tokenise(Tokeniser(model, routes_of(config), lambda line: None, keep=False))
        yield padding_line(config, sample, device)
    yield from memory_lines(config, data, model, here)
    idf = document_idf(config, model, data.texts("positive", "negative"))
    yield from training_lines(config, model, build_loss(config, model, BatchStatistics(), idf))
    if config.loss.teacher:
        yield teacher_line(config.loss.teacher, data, config.model)


def teacher_line(teacher: TeacherConfig, data: TrainingData, base: ModelConfig) -> str:
    """What the teacher has to score before the first step."""
    try:
        missing = ScoreStore(teacher, fetch_teacher(teacher), base).missing(data.train)
    except HubUnreachable:
        return f"teacher   needs the hub: {teacher.model}"
    rows = sum(map(len, with_negatives(data.train).values()))
    return f"teacher   {teacher.model}: {rows:,} rows with a negative to teach, {len(missing):,} pairs to score first"
