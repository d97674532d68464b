"""Which implementation of attention a model computes with, and packed texts where that one can read them."""

import contextlib
import importlib.util
from collections.abc import Iterator

from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer

from trainer.config import Config, ConfigError, one_line
from trainer.fused.model import transformers_of

# Python packages of the implementations that take the texts of a batch one after the other, without padding.
PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def choose_attention(model: SparseEncoder, config: Config, device: str) -> None:
    """Compute attention as the config asks. Raises ConfigError where that is not possible."""
    name = config.model.attention
    check_attention(model, config, device)
    for transformer in transformers_of(model) if name != "auto" else ():
        try:
            _set(transformer, name)
        except (ImportError, ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"model.attention: {name} cannot be used: {one_line(error)}") from None
        if name in PACKAGES and not transformer.can_flatten_inputs:
            raise ConfigError(f"model.attention: {name} has no function for packed texts here. Leave it at auto")


def check_attention(model: SparseEncoder, config: Config, device: str) -> None:
    """Raise ConfigError when the device, a missing package or the base model's code rules the config's attention out."""
    name = config.model.attention
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if device != "cuda":
            raise ConfigError(f"model.attention: {name} is for CUDA, and training is on {device}. Leave it at auto")
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"model.attention: {name} needs the package {package}, which is not installed here")
    for transformer in transformers_of(model) if name != "auto" else ():
        network = transformer.model
        if not network._can_set_attn_implementation() or (name in PACKAGES and not network._supports_flash_attn):
            raise ConfigError(
                f"model.attention: {type(network).__name__} ({config.model.base_model}) has code of its own for attention, "
                f"so {name} cannot be set. Leave it at auto"
            )


def attention_line(model: SparseEncoder, config: Config) -> str:
    """For the plan: what attention is computed with, and why."""
    name = config.model.attention
    if name in PACKAGES:
        return f"attention {name} (model.attention says so), texts packed without padding"
    own = {transformer.model.config._attn_implementation for transformer in transformers_of(model)}
    used = ", ".join(sorted(own)) if name == "auto" else name
    return f"attention {used} ({'the base model has it' if name == 'auto' else 'model.attention says so'})"


@contextlib.contextmanager
def in_any_precision(model: SparseEncoder) -> Iterator[None]:
    """Flash attention computes in 16 bits only: the model is scored, as users open it, with torch's own attention."""
    switched = [(each, each.model.config._attn_implementation) for each in transformers_of(model)]
    switched = [(transformer, name) for transformer, name in switched if name in PACKAGES]
    for transformer, _ in switched:
        _set(transformer, "sdpa")
    try:
        yield
    finally:
        for transformer, name in switched:
            _set(transformer, name)


def _set(transformer: Transformer, name: str) -> None:
    transformer.model.set_attn_implementation(name)
    transformer.unpad_inputs = transformer.unpad_inputs  # the library decides anew whether to pack
