"""Contradictions between keys that are each valid alone."""

from collections.abc import Iterator

from trainer.config.checks_of_data import contradictions_of_data
from trainer.config.checks_of_loss import contradictions_of_loss
from trainer.config.names import Contradiction, is_commit, is_local, missing_revision
from trainer.config.schema import FROM_SCRATCH, Config, FromScratchConfig, ModelConfig

# Four bytes each, so 4 GB: more than that is no small model, and would take the machine's memory before it is said why.
LARGEST_FROM_SCRATCH = 10**9


def find_contradictions(config: Config) -> Iterator[Contradiction]:
    """Every contradiction, as the path of the key to change and the text that follows its name."""
    yield from _model(config)
    yield from _training(config)
    yield from contradictions_of_loss(config)
    yield from contradictions_of_data(config)


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
        yield from missing_revision(("model", "base_model"), model.base_model, model.revision)
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
