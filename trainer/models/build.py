"""Builds the three architectures from a base model: inference-free SPLADE, SPLADE, and CSR."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sparse_encoder.modules import (
    Router,
    SparseAutoEncoder,
    SparseStaticEmbedding,
    SpladePooling,
    Transformer,
)
from torch import nn

from trainer.config import FROM_SCRATCH, Config, ConfigError
from trainer.config.schema import FromScratchConfig
from trainer.encoding.fuse import transformers_of
from trainer.hub.download import fetch
from trainer.models.card import build_card
from trainer.models.cut_vocabulary import ReadTexts, cut_to_texts
from trainer.models.fitted_head import fit_head, weigh_words
from trainer.models.heads import check_not_dense, decoder_of, silence_special_tokens
from trainer.models.normalizers import compose_first
from trainer.models.prompts import base_prompts, in_front
from trainer.models.queries import START_WEIGHTS, query_tokenizer, weights_of_idf
from trainer.models.remote_code import BaseModel, check_code, keep_code, with_own_code
from trainer.models.scratch import build_from_scratch
from trainer.models.trained import (
    is_router,
    require_no_sparse_model,
    require_what_training_settled,
    saved_modules,
    trained_router,
)
from trainer.models.weights import loading
from trainer.system.distributed import is_first, share_files

PROBE_TEXTS = 8
# transformers 5 loads weights in the precision they were saved in; optimizers need float32 copies of them.
FLOAT32 = {"dtype": torch.float32}


def build_model(
    config: Config,
    base: BaseModel | None,
    queries: list[str],
    documents: list[str],
    device: str,
    corpus: list[str] | None = None,
) -> SparseEncoder:
    """The untrained encoder. Raises ConfigError when the base model cannot be loaded or cannot become sparse.

    base: from fetch_base_model. queries, documents: the training texts, for the vocabulary of a model from scratch, the
    IDF of query weights, and the check that the base model can become sparse. corpus: the texts of model.vocabulary_texts.
    """
    name = config.model.base_model
    prompts = base_prompts(config.model, base.folder if base else None)
    # as the model will read them
    read_queries, read_documents = in_front(prompts["query"], queries), in_front(prompts["document"], documents)
    with tempfile.TemporaryDirectory() as folder:
        source = base.folder if base else Path(folder)
        if base is None:
            if is_first():  # transformers saves in the first process only
                build_from_scratch(
                    config.model.from_scratch or FromScratchConfig(), read_queries + read_documents, source
                )
            share_files(source)
        if config.model.architecture != "csr":
            require_what_training_settled(config, source)
        texts = ReadTexts(read_queries, read_documents, prompts, corpus)
        modules = ARCHITECTURES[config.model.architecture](config, source, texts)
    model = SparseEncoder(
        modules=modules,
        trust_remote_code=config.model.trust_remote_code,
        device=device,
        similarity_fn_name="cosine" if config.model.architecture == "csr" else "dot",
        prompts=prompts,
        model_card_data=build_card(config),
    )
    for transformer in transformers_of(model):
        transformer.model.config._name_or_path = name  # a temporary folder or a cache path says nothing to a reader
    _require_room_behind_prompts(model, config)
    if config.model.architecture != "csr":
        check_not_dense(model, documents[:PROBE_TEXTS], name)
    train_only_what_the_config_says(model, config)
    return model


def load_model(folder: Path, config: Config, device: str) -> SparseEncoder:
    """The encoder saved in a checkpoint, to go on training. Raises ConfigError for missing or edited code, and for a config
    that asks for more than the model can do."""
    check_code(folder)
    trust = config.model.trust_remote_code
    with loading("model.base_model", config.model.base_model, own_code=True):
        model = SparseEncoder(str(folder), trust_remote_code=trust, device=device, model_card_data=build_card(config))
    for transformer in transformers_of(model):
        _require_what_the_config_needs(transformer, config)
    for module in model.modules():
        if isinstance(module, (Transformer, SparseStaticEmbedding)):
            module.tokenizer.model_max_length = module.max_seq_length = config.training.max_seq_length
    _require_room_behind_prompts(model, config)
    train_only_what_the_config_says(model, config)
    return model


def save_model(model: SparseEncoder, folder: Path) -> None:
    """Save the encoder so that stock sentence-transformers opens it, with its own code where it has any."""
    model.save_pretrained(str(folder))
    keep_code(folder)


def fetch_base_model(config: Config, pin_command: str = "make pin") -> BaseModel | None:
    """The base model's files in a local folder, its code converted; None for a model from scratch.

    pin_command: what the user types to pin this config. Raises ConfigError when they cannot be had, or hold code that the
    config does not trust or that cannot be converted.
    """
    name = config.model.base_model
    if name == FROM_SCRATCH:
        return None
    snapshot = fetch(name, config.model.revision, kind="model", why="the base model", key="model.base_model")
    return with_own_code(snapshot, config, pin_command)


def static_embedding(model: SparseEncoder) -> SparseStaticEmbedding | None:
    """The query weights of inference-free SPLADE."""
    return next((module for module in model.modules() if isinstance(module, SparseStaticEmbedding)), None)


def autoencoder_of(model: SparseEncoder) -> SparseAutoEncoder | None:
    """The part of a CSR model that makes the sparse code."""
    return next((module for module in model.modules() if isinstance(module, SparseAutoEncoder)), None)


def vocabulary_of(model: SparseEncoder) -> int:
    """Dimensions of the vectors."""
    if (autoencoder := autoencoder_of(model)) is not None:
        return autoencoder.hidden_dim
    return transformers_of(model)[0].model.get_output_embeddings().out_features


def document_idf(config: Config, model: SparseEncoder, documents: Callable[[], list[str]]) -> torch.Tensor | None:
    """IDF of every word in the training documents, [vocabulary]; None unless the loss needs it.

    documents: collects the texts, which is done for such a loss alone.
    """
    if config.loss.regularizer != "idf-flops":
        return None
    return weights_of_idf(model.tokenizer, in_front(model.prompts.get("document") or "", documents()))


def train_only_what_the_config_says(model: SparseEncoder, config: Config) -> None:
    """Freeze CSR's dense model unless csr_train_base, and the query weights if freeze_static_embedding. Set the dropout."""
    if config.model.dropout is not None:
        for transformer in transformers_of(model):
            if not set_dropout(transformer, config.model.dropout) and config.model.dropout:
                raise ConfigError(f"model.dropout: {config.model.base_model} has no layer with dropout. Remove it")
    if config.model.has_frozen_base:
        for module in model.children():
            if not isinstance(module, SparseAutoEncoder):
                module.requires_grad_(False)
                set_dropout(module, 0.0)  # a frozen model's vectors are data: no noise in them
    if (embedding := static_embedding(model)) is not None:
        embedding.frozen = config.model.freeze_static_embedding  # which is saved
        embedding.weight.requires_grad_(not embedding.frozen)


def set_dropout(network: nn.Module, share: float) -> int:
    """Drop this share of activations, and of attention weights, in every layer. In memory only. Returns how many."""
    places = 0
    for module in network.modules():
        named = {"p"} if isinstance(module, nn.Dropout) else {"attention_dropout", "dropout_prob", "dropout"}
        for name in named & vars(module).keys():  # some layers keep it as a number; a 0 of JSON is an int
            if type(getattr(module, name)) in (int, float):
                setattr(module, name, share)
                places += 1
    return places


# ------------------------------------------------------------------------------------------- architectures
def build_inference_free_splade(config: Config, source: Path, texts: ReadTexts) -> list[nn.Module]:
    """Queries: a weight per token. Documents: masked language model and SpladePooling (arXiv 2411.04403)."""
    if is_router(source):
        router = trained_router(config, source)
        _require_what_the_config_needs(router.sub_modules["document"][0], config)
        return [router]
    transformer = load_transformer(config, source, texts)
    tokenizer = transformer.tokenizer
    weights = START_WEIGHTS[config.model.query_init](tokenizer, texts.documents)
    weights[tokenizer.all_special_ids] = 0.0
    frozen = config.model.freeze_static_embedding
    query = SparseStaticEmbedding(query_tokenizer(tokenizer), weight=weights, frozen=frozen)
    documents = [transformer, pooling_over(transformer, config)]
    return [Router.for_query_document(query_modules=[query], document_modules=documents)]


def build_splade(config: Config, source: Path, texts: ReadTexts) -> list[nn.Module]:
    """Queries and documents both through masked language model and SpladePooling (arXiv 2109.10086)."""
    transformer = load_transformer(config, source, texts)
    if config.model.head == "fit":
        weigh_words(transformer, weights_of_idf(transformer.tokenizer, texts.documents), config.model.base_model)
    return [transformer, pooling_over(transformer, config)]


def pooling_over(transformer: Transformer, config: Config) -> SpladePooling:
    """Each word's largest, or summed, activation over the tokens of a text."""
    dimension = transformer.model.get_output_embeddings().out_features
    return SpladePooling(config.model.pooling_strategy, config.model.activation_function, dimension)


def build_csr(config: Config, source: Path, texts: ReadTexts) -> list[nn.Module]:
    """The dense model's own modules, and a sparse autoencoder on top (arXiv 2503.01776)."""
    require_no_sparse_model(config, source)
    with loading("model.base_model", config.model.base_model, own_code=True):
        dense = SentenceTransformer(
            str(source), trust_remote_code=config.model.trust_remote_code, device="cpu", model_kwargs=FLOAT32
        )
    _require_what_the_config_needs(dense[0], config)
    compose_first(dense.tokenizer)
    cut_to_texts(dense[0], config.model, texts)
    dense.max_seq_length = config.training.max_seq_length
    autoencoder = SparseAutoEncoder(
        input_dim=dense.get_embedding_dimension(),
        hidden_dim=config.model.csr_hidden_dim,
        k=config.model.csr_k,
        k_aux=config.model.csr_k_aux,
    )
    return [*dense.children(), autoencoder]


def load_transformer(config: Config, source: Path, texts: ReadTexts) -> Transformer:
    """The base model with a masked-language-model head, in float32, cut and fitted where the config says so."""
    if is_router(source):
        raise ConfigError(
            f"model.base_model: {config.model.base_model} is a trained inference-free model, queries and all. "
            "Set model.architecture: inference-free-splade, or name the masked language model it was made from"
        )
    trust, fits = {"trust_remote_code": config.model.trust_remote_code}, config.model.head == "fit"
    with loading("model.base_model", config.model.base_model, own_code=True, without_head=fits):
        transformer = Transformer(
            str(folder_of_encoder(source)),
            transformer_task="fill-mask",
            max_seq_length=config.training.max_seq_length,
            model_kwargs=trust | FLOAT32,
            processor_kwargs=trust,
            config_kwargs=trust
            | ({"tie_word_embeddings": False} if fits else {}),  # a fitted decoder has its own words
        )
    _require_what_the_config_needs(transformer, config)
    compose_first(transformer.tokenizer)
    cut_to_texts(transformer, config.model, texts)
    decoder, words = decoder_of(transformer, config.model.base_model), len(transformer.tokenizer)
    # Vocabularies padded to a round number: the extra dimensions have no word, and query weights are saved one per token.
    if decoder.out_features != words:
        if type(decoder) is not nn.Linear:
            raise ConfigError(
                f"model.base_model: {config.model.base_model} has {decoder.out_features} dimensions but {words} tokens, "
                f"and its {type(decoder).__name__} cannot be cut"
            )
        transformer.model.resize_token_embeddings(words)
    transformer.max_seq_length = config.training.max_seq_length
    if fits:
        fit_head(transformer, texts.documents, config.model.head_dims, config.model.base_model)
    silence_special_tokens(transformer, config.model.base_model)
    return transformer


def folder_of_encoder(source: Path) -> Path:
    """The folder with the weights of a base model's first module: some SentenceTransformers have one for each module."""
    first = next((module.get("path") for module in saved_modules(source)), "")
    return source / first if first and not (source / "config.json").is_file() else source


def _require_what_the_config_needs(transformer: Transformer, config: Config) -> None:
    """Stop before training when the base model lacks what would otherwise fail in the middle of it."""
    name, settings = config.model.base_model, transformer.model.config
    if transformer.tokenizer.pad_token is None:
        raise ConfigError(
            f"model.base_model: the tokenizer of {name} has no pad token, so texts cannot be batched. "
            'Add one to its tokenizer_config.json ("pad_token": "<pad>")'
        )
    positions = getattr(settings, "max_position_embeddings", None) or getattr(settings, "max_sequence_length", None)
    for path, table in transformer.model.named_modules():
        if positions and path.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            positions -= table.padding_idx + 1  # RoBERTa and its like count positions from behind the padding's
    if positions and config.training.max_seq_length > positions:
        raise ConfigError(
            f"training.max_seq_length: {config.training.max_seq_length} tokens are more than {name} can read ({positions})"
        )
    if config.hardware.gradient_checkpointing and not transformer.model.supports_gradient_checkpointing:
        raise ConfigError(f"hardware.gradient_checkpointing: {name} does not support it. Set it to false")


def _require_room_behind_prompts(model: SparseEncoder, config: Config) -> None:
    """Stop before training when a prompt leaves no token for the text behind it."""
    for side, prompt in model.prompts.items():
        if prompt and (tokens := len(model.tokenizer(prompt)["input_ids"])) >= config.training.max_seq_length:
            raise ConfigError(
                f"training.max_seq_length: {config.training.max_seq_length} tokens leave none for the text: the {side} "
                f"prompt alone has {tokens}. Raise it, or shorten model.prompts.{side}"
            )


ARCHITECTURES: dict[str, Callable[[Config, Path, ReadTexts], list[nn.Module]]] = {
    "inference-free-splade": build_inference_free_splade,
    "splade": build_splade,
    "csr": build_csr,
}
