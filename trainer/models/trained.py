"""A trained sparse model as the base model: inference-free SPLADE that is trained further, with its query weights."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling, Transformer

from trainer.config import Config, ConfigError
from trainer.config.schema import ModelConfig
from trainer.models.heads import decoder_of, silence_special_tokens
from trainer.models.normalizers import compose_first
from trainer.models.queries import query_tokenizer
from trainer.models.weights import loading
from trainer.system.files import read_json

SPARSE_MODULES = ("SpladePooling", "SparseAutoEncoder", "SparseStaticEmbedding")


def is_router(folder: Path) -> bool:
    """Whether a base model encodes queries and documents with different modules, as inference-free SPLADE does."""
    return (folder / "router_config.json").is_file()


def saved_modules(folder: Path) -> list[dict[str, Any]]:
    """What modules.json says of a SentenceTransformer's modules; nothing for a model of transformers alone."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    return [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []


def trained_router(config: Config, folder: Path) -> Router:
    """The modules of a trained inference-free model, in float32, with silent special tokens, as a new model has them.

    Raises ConfigError when it is no such model, or when its queries cannot be matched with its documents.
    """
    name, model = config.model.base_model, config.model
    with loading("model.base_model", name, own_code=True):
        modules = list(SparseEncoder(str(folder), trust_remote_code=model.trust_remote_code, device="cpu").float())
    match modules, {side: list(parts) for side, parts in modules[0].sub_modules.items()}:
        case [router], {
            "query": [SparseStaticEmbedding() as query],
            "document": [Transformer() as document, SpladePooling()],
        }:
            pass
        case _:
            raise ConfigError(
                f"model.base_model: {name} is no inference-free SPLADE model: it is not a Router alone, of a "
                "SparseStaticEmbedding for queries and a masked language model with SpladePooling for documents. "
                "Name the model it was made from"
            )
    widths = len(query.weight), decoder_of(document, name).out_features, len(document.tokenizer), len(query.tokenizer)
    if len(set(widths)) > 1:
        raise ConfigError(
            f"model.base_model: the queries of {name} have {widths[0]:,} dimensions, its documents {widths[1]:,}, and its "
            f"tokenizers {widths[2]:,} and {widths[3]:,} words. Name the model it was made from"
        )
    for each in (query, document):
        compose_first(each.tokenizer)
        each.tokenizer.model_max_length = each.max_seq_length = config.training.max_seq_length
    query.tokenizer = query_tokenizer(query.tokenizer)
    silence_special_tokens(document, name)
    with torch.no_grad():
        query.weight[query.tokenizer.all_special_ids] = 0.0
    return router


def require_what_training_settled(config: Config, folder: Path) -> None:
    """Raise ConfigError when the config asks for another head, vocabulary or pooling than a trained SPLADE model has."""
    poolings = [
        file.parent for file in sorted(folder.rglob("config.json")) if file.parent.name.endswith("SpladePooling")
    ]
    if not poolings:
        return
    model, fields, name = config.model, ModelConfig.model_fields, config.model.base_model
    own = {"head": "own", "vocabulary": "keep"}
    if any(getattr(model, key) != value for key, value in own.items()):
        defaults = own | {key: fields[key].get_default() for key in ("head_dims", "vocabulary_min_count")}
        others = [f"model.{key}={value}" for key, value in defaults.items() if getattr(model, key) != value]
        remedy = " ".join(others + ["model.vocabulary_texts=[]"] * bool(model.vocabulary_texts))
        raise ConfigError(
            f'model.base_model: {name} is a trained sparse model, with a head and a vocabulary. Add SET="{remedy}"'
        )
    pooling = read_json(poolings[0] / "config.json")
    for key in ("pooling_strategy", "activation_function"):
        if (trained := pooling.get(key, fields[key].get_default())) != (wanted := getattr(model, key)):
            raise ConfigError(
                f"model.{key}: {name} was trained with {trained}, not with {wanted}. Add SET=model.{key}={trained}"
            )


def require_no_sparse_model(config: Config, folder: Path) -> None:
    """Raise ConfigError when the base model's vectors are sparse already, and it is to be the dense part of CSR."""
    if is_router(folder) or any(str(module.get("type")).endswith(SPARSE_MODULES) for module in saved_modules(folder)):
        raise ConfigError(
            f"model.base_model: {config.model.base_model} is a trained sparse model, and csr needs a dense one. Name the "
            "model it was made from"
        )
