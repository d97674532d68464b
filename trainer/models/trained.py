"""A trained sparse model as the base model: inference-free SPLADE that is trained further, with its query weights."""

from pathlib import Path
from typing import Any

from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling, Transformer

from trainer.config import Config, ConfigError
from trainer.config.schema import ModelConfig
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


def trained_router(config: Config, folder: Path) -> tuple[Router, Transformer]:
    """The modules of a trained inference-free model, and its masked language model, in float32.

    Raises ConfigError when it is no such model, or when the config asks for what its training has settled.
    """
    name, model = config.model.base_model, config.model
    own = {"head": "own", "vocabulary": "keep"}
    if settled := [key for key, value in own.items() if getattr(model, key) != value]:
        values = " ".join(f"model.{key}={own[key]}" for key in settled)
        raise ConfigError(
            f'model.{settled[0]}: {name} is a trained sparse model, with a head and a vocabulary. Add SET="{values}"'
        )
    with loading("model.base_model", name, own_code=True):
        router = SparseEncoder(str(folder), trust_remote_code=model.trust_remote_code, device="cpu").float()[0]
    match {side: list(modules) for side, modules in router.sub_modules.items()}:
        case {
            "query": [SparseStaticEmbedding()],
            "document": [Transformer() as transformer, SpladePooling() as pooling],
        }:
            _require_same_pooling(pooling, model)
            return router, transformer
    raise ConfigError(
        f"model.base_model: {name} is no inference-free SPLADE model: its Router does not have a SparseStaticEmbedding for "
        "queries, and a masked language model with SpladePooling for documents. Name the model it was made from"
    )


def require_no_sparse_model(config: Config, folder: Path) -> None:
    """Raise ConfigError when the base model's vectors are sparse already, and it is to be the dense part of CSR."""
    if is_router(folder) or any(str(module.get("type")).endswith(SPARSE_MODULES) for module in saved_modules(folder)):
        raise ConfigError(
            f"model.base_model: {config.model.base_model} is a trained sparse model, and csr needs a dense one. Name the "
            "model it was made from"
        )


def _require_same_pooling(pooling: SpladePooling, model: ModelConfig) -> None:
    for key in ("pooling_strategy", "activation_function"):
        if (trained := getattr(pooling, key)) != (wanted := getattr(model, key)):
            raise ConfigError(
                f"model.{key}: {model.base_model} was trained with {trained}, not with {wanted}. "
                f"Add SET=model.{key}={trained}"
            )
