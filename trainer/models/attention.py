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
# Texts to try it with, of several lengths.
TRIED = ["Hva er høyest?", "Galdhøpiggen er Norges høyeste fjell, og ligger i Lom kommune i Innlandet.", "Glittertind"]
# Relative difference of their vectors, packed and padded, from which on something is wrong. In bf16 with random weights it
# was 0.2 to 1 %, and 30 to 54 % where texts saw each other.
TOLERANCE = 0.1
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


def plan_attention(model: SparseEncoder, config: Config, device: str) -> tuple[Config, str]:
    """The config with what its attention comes to, as far as that is known without a try, and a line for the plan.

    auto: varlen on CUDA, in 16 bits, with a base model that can be told which attention to use; otherwise it stays. Raises
    ConfigError when the device, a missing package or the base model's code rules out what the config asks for.
    """
    name, networks = config.model.attention, [transformer.model for transformer in transformers_of(model)]
    if name == "auto":
        reason = _why_padded(networks, config)
        if device == "cuda" and reason is None:
            return _with(config, VARLEN), f"attention {VARLEN}, texts packed without padding"
        return config, _own_line(networks, reason if device == "cuda" else None)
    if config.model.packs_texts and device != "cuda":
        raise ConfigError(f"model.attention: {name} is for CUDA, and training is on {device}. Leave it at auto")
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"model.attention: {name} needs the package {package}, which is not installed here")
    if own := _own_code(networks, config.model.packs_texts):
        raise ConfigError(
            f"model.attention: {own} ({config.model.base_model}), so {name} cannot be set. Leave it at auto"
        )
    packed = ", texts packed without padding" if config.model.packs_texts else ""
    return config, f"attention {name} (model.attention says so){packed}"


def choose_attention(
    model: SparseEncoder, config: Config, device: str, packed: bool | None = None
) -> tuple[Config, str]:
    """Compute attention as the config asks. Returns the config with what that came to, and a line for the plan.

    Where auto comes to packed texts, their vectors are compared with those of padded ones first; where that fails, texts
    stay padded, and the line says why. packed: whether a run that goes on has packed its texts, so that its batches stay
    what they were; None for a new one. Raises ConfigError where that is not possible.
    """
    transformers = transformers_of(model)
    networks = [transformer.model for transformer in transformers]
    if config.model.attention != "auto":
        config, line = plan_attention(model, config, device)
        try:
            _set(transformers, config.model.attention)
        except (ImportError, ValueError, OSError, RuntimeError) as error:
            name = config.model.attention
            raise ConfigError(f"model.attention: {name} cannot be used: {one_line(error)}") from None
        return config, line
    if packed is False:
        return config, _own_line(networks, "this run did so from the start" if device == "cuda" else None)
    chosen, line = plan_attention(model, config, device)
    if chosen.model.packs_texts:
        half = torch.bfloat16 if config.training.bf16 else torch.float16
        if reason := _why_not(model, transformers, torch.autocast(model.device.type, half)):
            chosen, line = config, _own_line(networks, reason)
    if packed and not chosen.model.packs_texts:
        raise ConfigError(f"model.attention: this run packed its texts, and here they are padded: {line}")
    return chosen, line


def _why_padded(networks: list[nn.Module], config: Config) -> str | None:
    """Why auto does not pack texts on CUDA, if it does not."""
    if not (config.training.bf16 or config.training.fp16):
        return "training.bf16 is off"
    return _own_code(networks, packed=True)


def _own_code(networks: list[nn.Module], packed: bool) -> str | None:
    """The network, if any, that cannot be told which attention to use, or not to read packed texts."""
    for network in networks:
        if not network._can_set_attn_implementation() or (packed and not network._supports_flash_attn):
            return f"{type(network).__name__} has code of its own for attention"
    return None


def _why_not(model: SparseEncoder, transformers: list[Transformer], precision: torch.autocast) -> str | None:
    """Pack texts from now on, unless that fails or gives other vectors than padded texts have; then the reason."""

    def vectors() -> Tensor:
        with precision:
            return model.encode_document(TRIED, convert_to_sparse_tensor=False, show_progress_bar=False).float()

    names, padded = [transformer.model.config._attn_implementation for transformer in transformers], vectors()
    try:
        _set(transformers, VARLEN)
        difference = (vectors() - padded).norm()
        if difference <= TOLERANCE * padded.norm():
            return None
        reason = f"packed, the vectors of a few texts are {difference / padded.norm():.0%} off"
    except torch.OutOfMemoryError:
        raise
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        reason = f"{VARLEN} cannot be used: {one_line(error)}"
    for transformer, name in zip(transformers, names, strict=True):
        _set([transformer], name)
    return reason


def _with(config: Config, attention: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})


def _own_line(networks: list[nn.Module], reason: str | None) -> str:
    """For the plan: attention is the base model's, and texts are padded for this reason, if one needs saying."""
    own = ", ".join(sorted({network.config._attn_implementation for network in networks}))
    return f"attention {own} (the base model has it)" + (f"; texts are padded: {reason}" if reason else "")


@contextlib.contextmanager
def in_any_precision(model: SparseEncoder) -> Iterator[None]:
    """Flash attention computes in 16 bits only: the model is scored, as users open it, with torch's own attention."""
    switched = [(each, each.model.config._attn_implementation) for each in transformers_of(model)]
    switched = [(transformer, name) for transformer, name in switched if name in PACKED_ATTENTION]
    _set([transformer for transformer, _ in switched], "sdpa")
    try:
        yield
    finally:
        for transformer, name in switched:
            _set([transformer], name)


def _set(transformers: list[Transformer], name: str) -> None:
    """Raises ValueError where the name stands for packed texts, which cannot be read then."""
    for transformer in transformers:
        transformer.model.set_attn_implementation(name)
        transformer.unpad_inputs = transformer.unpad_inputs  # the library decides anew whether to pack
        if name == VARLEN:
            _pack(transformer)
        if name in PACKED_ATTENTION and not transformer.can_flatten_inputs:
            raise ValueError(f"{type(transformer.model).__name__} has no function for packed texts here")


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
