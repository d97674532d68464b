"""The words of the plan: one line for each decision, with its reason."""

from collections.abc import Iterable, Iterator

from sentence_transformers import SparseEncoder
from torch import nn

from trainer.config import FROM_SCRATCH, Config, is_commit, is_local
from trainer.data.choosing import choice_words
from trainer.data.mining import mining_words
from trainer.data.roles import LABEL, negatives_of
from trainer.data.tokens import Tokeniser
from trainer.data.training_data import TrainingData
from trainer.encoding.windows import measure_lengths, reads_in_windows
from trainer.hub.cache import folder_of
from trainer.models.build import vocabulary_of
from trainer.models.cut_vocabulary import vocabulary_cut
from trainer.models.fitted_head import head_fit
from trainer.models.normalizers import composes_first
from trainer.models.prompts import prompt_lines
from trainer.models.remote_code import BaseModel
from trainer.models.trained import is_router
from trainer.system.distributed import processes
from trainer.system.progress_bar import in_columns
from trainer.training.arguments import query_rate_mapping
from trainer.training.progress import Progress

NOTHING_TO_COMPARE = "a pair that is alone in its batch is told from nothing, and its contrastive loss is 0"


def data_lines(config: Config, data: TrainingData, last: int) -> Iterator[str]:
    """Per set: rows, languages, the share that will be seen, and what is left out. Per search set: its queries.

    last: the run's last step.
    """
    for summary in data.summaries.values():
        kinds = (
            [f"{sum(summary.several.values()):,} with {_either(summary.several)} negatives"] if summary.several else []
        )
        kinds += [
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
        if to_mine := data.to_mine.get(summary.name):
            steps = to_mine.settings.steps_of_rounds(last)
            when = f"step {', '.join(f'{step:,}' for step in steps)}" if steps else "no step: training is shorter"
            yield f"            mined again with the model after {when}"
        for reason, count in summary.left_out.items():
            yield f"            {count:,} rows not trained on: {reason}"
        for reason, count in summary.eval_left_out.items():
            yield f"            {count:,} rows not evaluated on: {reason}"
        for note in summary.notes:
            yield f"            {note}"
        if left := data.rows_left_over(config, summary.name):
            yield f"            {left:,} rows sit out each pass: they cannot be shared equally by {processes()} processes"
    for search in data.search:
        size = f"{len(search.queries):,} queries over {len(search.corpus):,} passages"
        yield f"search    {search.name}: {size}{choice_words(search)}"
        for note in search.reading.lines():
            yield f"            {note}"


def unused_scores_lines(data: TrainingData) -> Iterator[str]:
    """Sets that bring a teacher's scores which nothing is taught with."""
    for name, subsets in data.subsets.items():
        if any(LABEL in data.train[subset].column_names for subset in subsets if subset in data.train):
            yield in_columns("teacher", f"{name}: its scores are not used, for no teacher is of kind data")


def teacher_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """How several teachers' scores become one, on which passages queries are taught, and what a teacher cannot tell."""
    teacher = config.loss.teacher
    assert teacher is not None
    if teacher.passages == "batch" or teacher.models is not None:
        names = ", ".join(f"{one.model or one.kind} × {one.weight:g}" for one in teacher.teachers.values())
        where = "all passages of a batch" if teacher.passages == "batch" else "the passages of each row"
        how = ", each teacher's normalized per query" if teacher.normalizes else ""
        yield in_columns("teacher", f"{names}, on {where}{how}")
    if teacher.normalizes and teacher.passages == "row":
        lone = sum(len(rows) for rows in data.train.values() if len(negatives_of(rows.column_names)) == 1)
        if lone:
            yield (
                f"Warning: loss.teacher: {lone:,} rows have one negative; normalized scores of two passages are 0 and 1, "
                "whatever the teachers' margin. Give rows more negatives, or set passages: batch"
            )


def _either(counts: Iterable[str]) -> str:
    """The least and the most of some numbers."""
    most, *_, least = [*counts, *counts]
    return most if most == least else f"{least} to {most}"


def steps_line(config: Config, progress: Progress) -> str:
    """Steps of the whole run, rows per step, epochs, and how the sets take turns."""
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
    return f"steps     {progress.steps:,} of {batch} ({progress.epochs:.3g} epochs; {how})"


def lonely_pairs_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Warnings about pairs that are alone in their batch. Their contrastive loss is 0, whatever the model does."""
    if not config.loss.is_contrastive:
        return
    for name in data.train:
        alone, batches = data.batches_of_one(name, config)
        if alone:
            share = f"{alone:,} of {batches:,} batches ({alone / batches:.1%})"
            yield f"Warning: {name}: {NOTHING_TO_COMPARE}, as in {share}. {more_rows(config)}"
    for name in data.eval:
        alone, batches = data.batches_of_one(name, config, held_out=True)
        if alone:
            yield (
                f"Warning: {name}: the evaluation loss is 0 in {alone:,} of {batches:,} batches ({alone / batches:.1%}), "
                "whatever the model: a held-out pair is alone in its batch. Set training.per_device_eval_batch_size to 2 "
                "or more, and hold out more rows"
            )


def more_rows(config: Config) -> str:
    """Advice for pairs that are alone in their batch."""
    if config.training.per_device_train_batch_size * processes() == 1:
        return (
            "Set training.per_device_train_batch_size to 2 or more (rows of accumulated batches are not compared; "
            "loss.cached compares many in little memory), or find negatives: datasets.<name>.mine"
        )
    return "Add negatives, or rows that share neither query nor passage with most others"


def token_line(tokeniser: Tokeniser) -> str:
    """Number of tokens and texts, how long it took to make the ids, and where they are stored."""
    made = tokeniser.texts - tokeniser.texts_found
    how = f"tokenised in {tokeniser.seconds:.0f} s" if made else "found"
    if made and tokeniser.texts_found:
        how += f", {tokeniser.texts_found:,} of the texts found"
    size = f", {tokeniser.bytes / 2**20:,.0f} MiB in {folder_of('tokens')}" if tokeniser.bytes else ""
    return f"tokens    {tokeniser.tokens:,} in {tokeniser.texts:,} different texts, {how}{size}"


def length_lines(data: TrainingData, model: SparseEncoder) -> Iterator[str]:
    """Per set: the documents that are longer than the model reads, and what becomes of the rest of them."""
    in_windows = reads_in_windows(model)
    for name in data.summaries:
        if lengths := measure_lengths(model, data.documents(name)):
            which = "; a row trains on the window that shares most with its query" * in_windows
            yield in_columns("lengths", f"{name}: {lengths.words(in_windows)}{which}")
    for search in data.search:
        if lengths := measure_lengths(model, list(search.corpus.values())):
            yield in_columns("lengths", f"search in {search.name}: {lengths.words(in_windows)}")


def sitting_out_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Rows for which no batch was found, because too many rows share a text."""
    for name in data.summaries:
        if alone := data.rows_without_a_batch(config, name):
            advice = "too many share a text; lower per_device_train_batch_size"
            yield f"batches   {name}: {alone:,} rows sit out each pass: {advice}"


def padding_line(config: Config, data: TrainingData, device: str) -> str:
    """The expected share of padding. `data` must be tokenised."""
    if config.model.packs_texts:
        return "padding   none: texts are packed (model.attention), so datasets.length_window has no effect"
    return f"padding   {data.padding(config, device):.0%} of the positions that go through the network"


def query_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Per set: how many queries the passages of a batch have. Before rows are tokenised, the number is about right."""
    most = config.datasets.queries_per_passage
    if most > 1:
        for name, subsets in data.subsets.items():
            about = "" if data.tokens.keys() >= set(subsets) else "about "
            queries = f"{about}{data.queries_per_passage(config, name):.1f}"
            yield in_columns("queries", f"{name}: {queries} for each passage of a batch, negatives too; at most {most}")


def rate_lines(config: Config, model: SparseEncoder, loss: nn.Module) -> Iterator[str]:
    """The learning rates, and the number of parameters that each one trains."""
    rates = query_rate_mapping(config, loss)
    query_weights = {name.removeprefix("^").removesuffix("$").replace("\\", "") for name in rates}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"query": [], "rest": [], "frozen": []}
    for name, parameter in model.named_parameters():
        is_query = f"model.{name}" in query_weights
        groups["frozen" if not parameter.requires_grad else "query" if is_query else "rest"].append((name, parameter))

    def count(group: str) -> str:
        return f"{sum(parameter.numel() for _, parameter in groups[group]):,} parameters"

    yield f"rates     {config.training.learning_rate:g}: {count('rest')} in {len(groups['rest'])} tensors"
    if groups["query"]:
        names = ", ".join(name for name, _ in groups["query"])
        yield f"          {config.training.query_learning_rate:g}: {count('query')}: {names}"
    if groups["frozen"]:
        yield f"          not trained: {count('frozen')} in {len(groups['frozen'])} tensors"


def sparsity_lines(config: Config) -> Iterator[str]:
    """The targets of active dims, and the regularizer if it is not plain FLOPS."""
    loss = config.loss
    for route, target in (("documents", loss.target_document_dims), ("queries", loss.target_query_dims)):
        if target:
            yield f"sparsity  {route}: {target:,} active dims on average, for which the first third finds the weight"
    if loss.has_regularizers and (loss.regularizer != "flops" or loss.document_dims_cap):
        cap = f", of documents with more than {loss.document_dims_cap:,} active dims" if loss.document_dims_cap else ""
        yield f"regularizer  {loss.regularizer}{cap}"


def base_model_lines(config: Config, base: BaseModel | None) -> Iterator[str]:
    """Architecture, base model, and the changes to the Python code that it brings. base: None if it is not at hand."""
    name, revision = config.model.base_model, config.model.revision
    has_commit = is_commit(revision) or (revision and not is_local(name))  # a folder has no branch that is looked at
    origin = (
        "built from scratch" if name == FROM_SCRATCH else f"from {name}" + (f" at {revision}" if has_commit else "")
    )
    yield f"model     {config.model.architecture} {origin}"
    for file, changes in base.code.items() if base else ():
        what = f"{len(changes)} faults mended: {', '.join(changes)}" if changes else "runs as it came"
        yield f"code      {file}: {what}"
    if base and config.model.has_static_queries and is_router(base.folder):
        yield in_columns("queries", "with the weights of the base model (model.query_init is not used)")


def tokenizer_lines(model: SparseEncoder) -> Iterator[str]:
    """A warning if the tokenizer does not convert texts to Unicode's form NFC. Training texts are in NFC already."""
    if composes_first(model.tokenizer):
        return
    fast = model.tokenizer.is_fast
    why = "it was saved before tokenizers did so" if fast else "it is Python code, to which nothing can be added"
    yield (
        f"tokenizer does not bring texts into Unicode's form NFC: {why}. Who encodes with the model has to, or words with "
        "å, ä and ö that were typed on a Mac match nothing"
    )


def vocabulary_lines(config: Config, model: SparseEncoder) -> Iterator[str]:
    """What was cut from the base model's vocabulary: pieces, parameters, memory, and texts that are split differently."""
    cut = vocabulary_cut(model)
    if cut is None:
        return
    least = config.model.vocabulary_min_count
    where = f"{cut.texts:,} {'texts of model.vocabulary_texts' if config.model.vocabulary_texts else 'training texts'}"
    often = f" {least} times or more" if least > 1 else ""
    pieces = f"{cut.pieces_before:,} pieces → {cut.pieces:,}: {cut.pieces_used:,} that {where} use{often}"
    yield in_columns("vocabulary", f"{pieces}, the others spell any other text")
    size = f"{cut.parameters_before:,} → {cut.parameters:,} parameters, {cut.bytes_saved / 2**20:,.0f} MiB less"
    share = f"{cut.changed / max(cut.compared, 1):.1%} of {cut.compared:,} training texts"
    yield in_columns("", f"{size}; {share} are split differently")


def head_lines(model: SparseEncoder) -> Iterator[str]:
    """What a head was fitted to, and how it does on texts that were held out."""
    if (fit := head_fit(model)) is None:
        return
    yield in_columns("head", f"fitted to {fit.tokens:,} tokens of {fit.texts:,} texts. Of texts that were held out:")
    own = f"{fit.own:.0%} of the tokens have their own word's logit as the largest"
    yield in_columns(
        "", f"{own}; {fit.active_dims:,.0f} active dims, {fit.own_active:.0%} of the text's own words among them"
    )


def model_lines(config: Config, base: BaseModel | None, model: SparseEncoder) -> Iterator[str]:
    """Architecture, base model, size, tokenizer and prompts."""
    yield from base_model_lines(config, base)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"          {vocabulary_of(model):,} dimensions, {parameters:,} parameters"
    yield from vocabulary_lines(config, model)
    yield from head_lines(model)
    yield from tokenizer_lines(model)
    yield from prompt_lines(config.model, base.folder if base else None, model.prompts)
