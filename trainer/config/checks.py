"""Contradictions between keys that are each valid alone."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.schema import (
    FROM_SCRATCH,
    Config,
    FromScratchConfig,
    LocalSource,
    MiningConfig,
    ModelConfig,
    TeacherConfig,
    TeacherModel,
)
from trainer.config.tree import Path_

Contradiction = tuple[Path_, str]  # the key to change, and what is wrong with it: the text that follows its name

# Keys of the loss that csr has no use for; `regularizer` has a default, so it is not among them.
SPLADE_KEYS = (
    "document_regularizer_weight",
    "query_regularizer_weight",
    "target_document_dims",
    "target_query_dims",
    "document_dims_cap",
)
FILE_ENDINGS = (".jsonl", ".json", ".parquet")
# Four bytes each, so 4 GB: more than that is no small model, and would take the machine's memory before it is said why.
LARGEST_FROM_SCRATCH = 10**9
TEACHER_KINDS = ("cross-encoder", "dense", "sparse", "bm25", "data")
FAMILIES = ("nli", "scandi_qa", "ddsc", "quickstart")
RESERVED_NAMES = ("quickstart_nli", "quickstart_scandi_qa", "quickstart_ddsc", "quickstart_sister_languages")


def is_local(source: str) -> bool:
    """Whether a source names files rather than a hub repository (owner/name)."""
    return (
        exists(source)
        or source.startswith((".", "/", "~"))
        or source.endswith(FILE_ENDINGS)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    )


def exists(name: str) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(name)  # noqa: PTH110 Path.exists raises for a name that is too long


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which cannot move."""
    return bool(revision and re.fullmatch(r"[0-9a-f]{40}", revision))


def find_contradictions(config: Config) -> Iterator[Contradiction]:
    """Every contradiction, as the path of the key to change and the text that follows its name."""
    yield from _model(config)
    yield from _training(config)
    yield from _loss(config)
    yield from _datasets(config)


def _revision(path: Path_, source: str, revision: str | None) -> Iterator[Contradiction]:
    """A repository is named with its revision. path: of the key that names it."""
    if not is_local(source) and revision is None:
        yield path, f"is the repository {source}, which needs '{dotted((*path[:-1], 'revision'))}' (a commit is best)"


def dotted(path: Path_) -> str:
    """A key as messages write it."""
    return ".".join(map(str, path))


def _model(config: Config) -> Iterator[Contradiction]:
    model = config.model
    inference_free = model.architecture == "inference-free-splade"
    if model.use_router is not None and model.use_router != inference_free:
        yield (
            ("model", "use_router"),
            f"is {str(model.use_router).lower()}, but architecture {model.architecture} "
            f"{'needs' if inference_free else 'has no'} router. Remove the key or change the architecture.",
        )
    if model.trust_remote_code and not is_commit(model.revision):
        which = ", the commit the folder is a copy of" if is_local(model.base_model) else ""
        yield (
            ("model", "trust_remote_code"),
            "runs code that comes with the base model, so 'model.revision' must be a full commit hash "
            f"(40 hex digits{which}), not {model.revision!r}",
        )
    if model.base_model != FROM_SCRATCH:
        yield from _revision(("model", "base_model"), model.base_model, model.revision)
        if model.from_scratch:
            yield (
                ("model", "from_scratch"),
                f"has no effect on base_model {model.base_model}. Remove it, or set base_model: {FROM_SCRATCH}.",
            )
    else:
        yield from _from_scratch(model.from_scratch or FromScratchConfig(), config.training.max_seq_length)
    yield from _vocabulary(model)
    yield from _attention(config)
    yield from _prompts(config)
    yield from _head(config)
    if model.long_documents == "windows" and (model.architecture == "csr" or model.pooling_strategy != "max"):
        what = "csr" if model.architecture == "csr" else f"pooling_strategy {model.pooling_strategy}"
        yield (
            ("model", "long_documents"),
            f"is windows, which is for SPLADE with pooling_strategy max: with {what}, the maximum over the windows is not "
            "the vector of the text. Set it to cut",
        )
    if model.architecture == "csr" and model.dropout is not None and not model.csr_train_base:
        yield ("model", "dropout"), "has no effect on a frozen base model. Remove it, or set csr_train_base: true"
    if model.architecture == "csr":
        quarter = f"a quarter of csr_hidden_dim ({model.csr_hidden_dim})"
        if 4 * model.csr_k > model.csr_hidden_dim:
            yield (
                ("model", "csr_k"),
                f"({model.csr_k}) may be at most {quarter}: the loss reconstructs from 4 × csr_k dimensions",
            )
        if model.csr_k_start and not model.csr_k <= model.csr_k_start <= model.csr_hidden_dim // 4:
            yield (
                ("model", "csr_k_start"),
                f"({model.csr_k_start}) must lie between csr_k ({model.csr_k}) and {quarter}",
            )
        if model.csr_k_aux > model.csr_hidden_dim:
            yield ("model", "csr_k_aux"), "is more than csr_hidden_dim"
    if model.freeze_static_embedding and not inference_free:
        yield (
            ("model", "freeze_static_embedding"),
            f"is for inference-free-splade; {model.architecture} has no static embedding. Remove it.",
        )


def _from_scratch(shape: FromScratchConfig, max_seq_length: int) -> Iterator[Contradiction]:
    if shape.hidden_size % shape.num_attention_heads:
        yield (
            ("model", "from_scratch", "hidden_size"),
            f"({shape.hidden_size}) must be a multiple of num_attention_heads ({shape.num_attention_heads})",
        )
    if (parameters := most_parameters(shape)) > LARGEST_FROM_SCRATCH:
        yield (
            ("model", "from_scratch"),
            f"would have {parameters:,} parameters; at most {LARGEST_FROM_SCRATCH:,} are built",
        )
    if max_seq_length > shape.max_position_embeddings:
        yield (
            ("training", "max_seq_length"),
            f"({max_seq_length}) is more than model.from_scratch.max_position_embeddings ({shape.max_position_embeddings})",
        )


def most_parameters(shape: FromScratchConfig) -> int:
    """Parameters of a BERT of this shape, biases and norms aside, when the texts fill its vocabulary."""
    width = shape.hidden_size
    layer = 4 * width**2 + 2 * width * shape.intermediate_size
    return (shape.vocab_size + shape.max_position_embeddings) * width + shape.num_hidden_layers * layer


def _vocabulary(model: ModelConfig) -> Iterator[Contradiction]:
    if model.vocabulary == "texts":
        if model.base_model == FROM_SCRATCH:
            yield ("model", "vocabulary"), "is texts, but a model from scratch has no other vocabulary. Remove it."
        return
    for key in ("vocabulary_texts", "vocabulary_min_count"):
        if getattr(model, key) != ModelConfig.model_fields[key].default:
            yield ("model", key), "has no effect with model.vocabulary: keep. Remove it, or set vocabulary: texts."


def _prompts(config: Config) -> Iterator[Contradiction]:
    prompts = config.model.prompts
    for side, text in prompts or ():
        if text and not text.strip():
            yield ("model", "prompts", side), 'is blank. For nothing in front, write ""'
    if prompts and prompts.query and config.model.architecture == "inference-free-splade":
        yield (
            ("model", "prompts", "query"),
            "would put the same words, with the same weights, into every query of inference-free-splade, "
            "whose queries are only looked up. Remove it",
        )


def _head(config: Config) -> Iterator[Contradiction]:
    model = config.model
    if model.head == "own":
        if model.head_dims != ModelConfig.model_fields["head_dims"].default:
            yield ("model", "head_dims"), "is of a fitted head. Remove it, or set model.head: fit"
    elif model.base_model == FROM_SCRATCH:
        yield ("model", "head"), f"fits a head to the states of a trained encoder; base_model is {FROM_SCRATCH}"
    elif not config.loss.has_regularizers:
        yield ("model", "head"), "is for SPLADE; csr has no head over a vocabulary. Remove it"


def _attention(config: Config) -> Iterator[Contradiction]:
    training, attention = config.training, config.model.attention
    if not config.model.packs_texts:
        return
    if config.hardware.device in ("cpu", "mps"):
        yield ("model", "attention"), f"{attention} is for CUDA; device is {config.hardware.device}"
    if not (training.bf16 or training.fp16):
        yield ("model", "attention"), f"{attention} computes in 16 bits: set training.bf16 to true"


def _training(config: Config) -> Iterator[Contradiction]:
    training = config.training
    if training.start_share and (whose := _whose_first_weights_are_random(config.model)):
        yield (
            ("training", "start_share"),
            f"keeps weights from before training, and those of {whose} are random. Remove it (null unsets a parent's)",
        )
    if training.load_best_model_at_end and training.save_steps % training.eval_steps:
        yield (
            ("training", "save_steps"),
            f"({training.save_steps}) must be a multiple of eval_steps ({training.eval_steps}) with "
            "load_best_model_at_end, or the best step has no checkpoint",
        )
    if training.query_learning_rate is not None:
        if config.model.architecture != "inference-free-splade":
            yield (
                ("training", "query_learning_rate"),
                f"is the rate of the static query weights of inference-free-splade; {config.model.architecture} has none. "
                "Remove it.",
            )
        elif config.model.freeze_static_embedding:
            yield (
                ("training", "query_learning_rate"),
                "has no effect with model.freeze_static_embedding. Remove one of them.",
            )
    if training.bf16 and training.fp16:
        yield ("training", "fp16"), "and 'training.bf16' exclude each other"
    if training.dataloader_prefetch_factor and not training.dataloader_num_workers:
        yield ("training", "dataloader_prefetch_factor"), "needs training.dataloader_num_workers of at least 1"
    if training.max_steps == 0 or training.max_steps < -1:
        yield ("training", "max_steps"), "is a number of steps, or -1 for num_train_epochs"
    if config.hub.push and not config.hub.repo:
        yield ("hub", "push"), "needs 'hub.repo'"


def _whose_first_weights_are_random(model: ModelConfig) -> str | None:
    if model.architecture == "csr":
        return "csr's autoencoder"
    from_scratch = (model.from_scratch or FromScratchConfig()) if model.base_model == FROM_SCRATCH else None
    return "a model from scratch with init normal" if from_scratch and from_scratch.init == "normal" else None


def _loss(config: Config) -> Iterator[Contradiction]:
    loss, architecture = config.loss, config.model.architecture
    teacher = loss.teacher
    if teacher:
        yield from _teachers(teacher)
    expected = "csr" if architecture == "csr" else "splade"
    if loss.type != expected:
        yield ("loss", "type"), f"is {loss.type}, but architecture {architecture} needs {expected}"
        return
    if expected == "csr":
        for key in (*SPLADE_KEYS, "cached"):
            if getattr(loss, key):
                yield ("loss", key), "is for SPLADE; a csr model is sparse by model.csr_k. Remove it."
        return
    for route in ("document", "query"):
        yield from _weight_or_target(config, route)
    if loss.regularizer == "idf-flops" and architecture != "inference-free-splade":
        yield (
            ("loss", "regularizer"),
            f"idf-flops is for inference-free-splade, where queries weigh words by IDF, not {architecture}",
        )
    cap, target = loss.document_dims_cap, loss.target_document_dims
    if cap and target and cap >= target:
        yield (
            ("loss", "document_dims_cap"),
            f"({cap}) must be less than target_document_dims ({target}): documents up to the cap are not penalised, "
            "so no weight brings their mean below it",
        )


def _teachers(teacher: TeacherConfig) -> Iterator[Contradiction]:
    here: Path_ = ("loss", "teacher")
    for key, field in TeacherModel.model_fields.items():
        if teacher.models is not None and getattr(teacher, key) != field.default:
            yield (*here, key), "has no effect beside 'loss.teacher.models'. Write it under a teacher's name"
    if not teacher.teachers:
        yield (*here, "models"), "names no teacher: write name: {kind: …, model: …} for each"
    for key, one in teacher.teachers.items():
        yield from _one_teacher(tuple(key.split(".")), one)
        if teacher.passages == "batch" and one.kind in ("cross-encoder", "data"):
            why = f"is for teachers that give each text a vector (dense, sparse, bm25), not for {one.kind}"
            yield (*here, "passages"), f"batch {why}. Set it to row"
    if teacher.temperature != 1 and teacher.objective != "kl":
        yield (*here, "temperature"), "has no effect on margin-mse. Remove it, or set objective: kl"
    if teacher.passages == "batch" and teacher.objective != "kl":
        yield (*here, "passages"), "batch compares probabilities: set loss.teacher.objective: kl"


def _one_teacher(path: Path_, teacher: TeacherModel) -> Iterator[Contradiction]:
    if teacher.kind is None:
        yield (*path, "kind"), f"is missing. It is one of {', '.join(TEACHER_KINDS)}"
    elif teacher.kind in ("bm25", "data"):
        for key in ("model", "revision", "cache"):
            if getattr(teacher, key) is not None:
                yield (*path, key), f"has no effect with kind {teacher.kind}. Remove it"
    elif teacher.model is None:
        yield (*path, "kind"), f"{teacher.kind} needs '{dotted((*path, 'model'))}'"
    else:
        yield from _revision((*path, "model"), teacher.model, teacher.revision)
    if teacher.prompts and teacher.kind != "dense":
        yield (*path, "prompts"), f"is for kind dense, not for {teacher.kind}. Remove it"


def _weight_or_target(config: Config, route: str) -> Iterator[Contradiction]:
    """Each route's sparsity is said once: by a weight, or by the dims that the weight is found for."""
    weight_key, target_key = f"{route}_regularizer_weight", f"target_{route}_dims"
    weight, target = getattr(config.loss, weight_key), getattr(config.loss, target_key)
    inference_free = config.model.architecture == "inference-free-splade"
    if target and weight:
        yield (
            ("loss", target_key),
            f"({target}) finds the weight during training, 'loss.{weight_key}' ({weight:g}) gives it: remove one of them "
            "(null unsets a parent's). A target holds for every vocabulary, batch size and data set",
        )
    elif route == "query" and target and inference_free:
        yield ("loss", target_key), "is for splade: queries of inference-free-splade are their own words. Remove it."
    elif route == "document" and not target and not weight:
        yield (
            ("loss", weight_key),
            f"must be more than 0, or documents stay dense. Or say how many dims documents shall have: loss.{target_key}",
        )
    elif route == "query" and not target and not weight and not inference_free:
        yield (
            ("loss", weight_key),
            "must be more than 0 for splade, or queries stay dense (0 is for inference-free-splade). "
            f"Or say how many dims queries shall have: loss.{target_key}",
        )


def _datasets(config: Config) -> Iterator[Contradiction]:
    datasets = config.datasets
    sets = {name: getattr(datasets, name) for name in FAMILIES} | datasets.local
    if not any(source and source.enabled for source in sets.values()):
        yield ("datasets",), "has no set that is enabled"
    if datasets.queries_per_passage > 1:
        if config.loss.type == "csr":
            yield ("datasets", "queries_per_passage"), "is for SPLADE, not for csr. Remove it."
        elif config.loss.cached:
            yield ("datasets", "queries_per_passage"), "and 'loss.cached' exclude each other. Remove one of them"
    for name, source in datasets.local.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            yield ("datasets", name), "is a name of more than letters, digits and _. Choose another"
        if name in RESERVED_NAMES:
            yield ("datasets", name), "is the name of an embedded set. Choose another"
        if source.enabled:
            yield from _local(("datasets", name), source)
    for name, source in sets.items():
        if source and source.enabled and source.mine:
            yield from _mining(("datasets", name, "mine"), source.mine)
            yield from _mining_rounds(("datasets", name, "mine"), source.mine, config)


def _mining_rounds(path: Path_, mining: MiningConfig, config: Config) -> Iterator[Contradiction]:
    if mining.method != "self":
        for key in ("every", "rounds"):
            if getattr(mining, key) != MiningConfig.model_fields[key].default:
                yield (*path, key), f"has no effect with method {mining.method}. Remove it, or set method: self"
    elif mining.every is None:
        yield (*path, "method"), f"self needs '{dotted((*path, 'every'))}': the steps from one mining to the next"
    elif mining.every % config.training.save_steps:
        steps = config.training.save_steps
        yield (
            (*path, "every"),
            f"({mining.every}) must be a multiple of training.save_steps ({steps}): the checkpoint mines",
        )
    if mining.method == "self" and (config.loss.type == "csr" or config.loss.cached):
        what = "csr" if config.loss.type == "csr" else "loss.cached"
        yield (*path, "method"), f"self is for SPLADE without GradCache, not with {what}. Choose bm25 or model"


def _mining(path: Path_, mining: MiningConfig) -> Iterator[Contradiction]:
    lowest, highest = mining.range
    if highest - lowest < mining.per_query:
        yield (*path, "range"), f"[{lowest}, {highest}] has fewer ranks than per_query ({mining.per_query}) asks for"
    if mining.method != "model":
        for key in ("model", "revision"):
            if getattr(mining, key):
                yield (*path, key), f"has no effect with method {mining.method}. Remove it, or set method: model"
    elif not mining.model:
        yield (*path, "method"), f"model needs '{dotted((*path, 'model'))}'"
    else:
        yield from _revision((*path, "model"), mining.model, mining.revision)


def _local(path: Path_, source: LocalSource) -> Iterator[Contradiction]:
    columns = source.columns
    named = [name for _, name in columns if name is not None] if columns else []
    if len(set(named)) < len(named):
        yield (*path, "columns"), "names one column twice"
    if columns and columns.scores and (columns.positive_scores or columns.negative_scores):
        yield (*path, "columns", "scores"), "and 'positive_scores', 'negative_scores' exclude each other"
    if columns and (columns.positive_scores is None) != (columns.negative_scores is None):
        missing = "negative" if columns.positive_scores else "positive"
        yield (*path, "columns", f"{missing}_scores"), "is missing: scores of positives and negatives are compared"
    if not is_local(source.source):
        yield from _revision((*path, "source"), source.source, source.revision)
        if columns is None:
            yield (
                (*path, "source"),
                f"is the repository {source.source}, which needs '{dotted((*path, 'columns'))}' "
                "({anchor: …, positive: …, negative: …})",
            )
        return
    without_effect: dict[str, Any] = {"revision": source.revision}
    if not Path(source.source).is_dir():
        without_effect |= {"subset": source.subset, "eval_split": source.eval_split}
    elif exists(f"{source.source}/corpus.jsonl") or exists(f"{source.source}/corpus.jsonl.gz"):
        without_effect |= {"subset": source.subset, "columns": columns}
    for key, value in without_effect.items():
        if value is not None:
            yield (*path, key), f"has no effect on the source {source.source}. Remove it."
