"""Which implementation of attention a model computes with, and packed texts where that one can read them."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from torch import Tensor, nn
from transformers import AttentionInterface, DataCollatorWithFlattening

from trainer.config import Config, ConfigError, one_line
from trainer.config.schema import PACKED_ATTENTION
from trainer.fused.model import transformers_of

# torch's own flash attention, on texts of varying length one after the other; by this name transformers finds it here.
VARLEN = "varlen"
# The module and package of those that are not torch's.
PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention of every text of a packed batch to itself, in the interface of transformers.

    query, key, value: [1, heads, tokens of all texts, size of a head], CUDA, 16 bits or under autocast. cu_seq_lens_q:
    [texts + 1], where each text starts, int32; max_length_q: tokens of the longest. sliding_window: one more than the
    tokens that are seen on either side. Returns [1, tokens of all texts, heads, size of a head].
    """
    window = None if sliding_window is None else sliding_window - 1
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query, key, value = (each.squeeze(0).transpose(0, 1).to(half) for each in (query, key, value))
    # torch.nn.attention.varlen is this function without dropout, which BERT and RoBERTa train with
    found = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        dropout,
        False,  # not causal
        False,  # no mask to look at
        scale=scaling,
        window_size_left=window,
        window_size_right=window,
    )
    return found[0].unsqueeze(0), None


AttentionInterface.register(VARLEN, attend)


def choose_attention(model: SparseEncoder, config: Config, device: str) -> None:
    """Compute attention as the config asks. Raises ConfigError where that is not possible."""
    name = config.model.attention
    check_attention(model, config, device)
    for transformer in transformers_of(model) if name != "auto" else ():
        try:
            _set(transformer, name)
        except (ImportError, ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"model.attention: {name} cannot be used: {one_line(error)}") from None
        if config.model.packs_texts and not transformer.can_flatten_inputs:
            raise ConfigError(f"model.attention: {name} has no function for packed texts here. Leave it at auto")


def check_attention(model: SparseEncoder, config: Config, device: str) -> None:
    """Raise ConfigError when the device, a missing package or the base model's code rules the config's attention out."""
    name = config.model.attention
    if config.model.packs_texts and device != "cuda":
        raise ConfigError(f"model.attention: {name} is for CUDA, and training is on {device}. Leave it at auto")
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"model.attention: {name} needs the package {package}, which is not installed here")
    for transformer in transformers_of(model) if name != "auto" else ():
        network = transformer.model
        if not network._can_set_attn_implementation() or (
            config.model.packs_texts and not network._supports_flash_attn
        ):
            raise ConfigError(
                f"model.attention: {type(network).__name__} ({config.model.base_model}) has code of its own for attention, "
                f"so {name} cannot be set. Leave it at auto"
            )


def attention_line(model: SparseEncoder, config: Config) -> str:
    """For the plan: what attention is computed with, and why."""
    name = config.model.attention
    if config.model.packs_texts:
        return f"attention {name} (model.attention says so), texts packed without padding"
    own = {transformer.model.config._attn_implementation for transformer in transformers_of(model)}
    used = ", ".join(sorted(own)) if name == "auto" else name
    return f"attention {used} ({'the base model has it' if name == 'auto' else 'model.attention says so'})"


@contextlib.contextmanager
def in_any_precision(model: SparseEncoder) -> Iterator[None]:
    """Flash attention computes in 16 bits only: the model is scored, as users open it, with torch's own attention."""
    switched = [(each, each.model.config._attn_implementation) for each in transformers_of(model)]
    switched = [(transformer, name) for transformer, name in switched if name in PACKED_ATTENTION]
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
    if name == VARLEN:
        _pack(transformer)


def _pack(transformer: Transformer) -> None:
    """What the library does for the flash attention it knows."""
    transformer.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if transformer.model_forward_params is not None:  # the network hands these on to its layers
        transformer.model_forward_params |= {
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "max_length_q",
            "max_length_k",
            "seq_idx",
        }
    transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
    transformer.can_flatten_inputs = True
