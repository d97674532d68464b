"""Which implementation of attention a model computes with, and packed texts where that one can read them."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from transformers import AttentionInterface, DataCollatorWithFlattening

from trainer.config import Config, ConfigError, one_line
from trainer.config.schema import PACKED_ATTENTION
from trainer.encoding.fuse import PROBE, transformers_of

# torch's own flash attention, on texts of varying length one after the other; by this name transformers finds it here.
VARLEN = "varlen"
# Texts to try it with, of several lengths.
TRIED = ["Hva er høyest?", PROBE, "Glittertind"]
# Relative difference of their vectors, packed and padded, from which on something is wrong. In bf16 with random weights it
# was 0.2 to 1 %, and 30 to 73 % where texts saw each other, or each word only those before it.
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
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query, key, value = (each.squeeze(0).transpose(0, 1).to(dtype) for each in (query, key, value))
    # torch.nn.attention.varlen is this function without dropout, which BERT and RoBERTa train with
    output, *_ = torch.ops.aten._flash_attention_forward(
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
    return output.unsqueeze(0), None


AttentionInterface.register(VARLEN, attend)


def plan_attention(model: SparseEncoder, config: Config, device: str) -> tuple[Config, str]:
    """The config with the attention that will be used, as far as that is known without a try, and a line for the plan.

    auto: varlen on CUDA, in 16 bits, with a base model that can be told which attention to use; otherwise the base model's
    own. Raises ConfigError when the device, a missing package or the base model's code rules out what the config asks for.
    """
    name, transformers = config.model.attention, transformers_of(model)
    if name == "auto":
        if reason := _why_padded(transformers, config, device):
            return config, _own_line(transformers, reason, device)
        packed = config.model_copy(update={"model": config.model.model_copy(update={"attention": VARLEN})})
        return packed, f"{_packed_line(VARLEN)}, if a few texts, tried before training, come out the same"
    if config.model.packs_texts and device != "cuda":
        raise ConfigError(f"model.attention: {name} is for CUDA, and training is on {device}. Leave it at auto")
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"model.attention: {name} needs the package {package}, which is not installed here")
    if own := _own_code(transformers, config.model.packs_texts):
        raise ConfigError(
            f"model.attention: {own} ({config.model.base_model}), so {name} cannot be set. Leave it at auto"
        )
    return config, _packed_line(name) if config.model.packs_texts else f"attention {name} (model.attention says so)"


def choose_attention(
    model: SparseEncoder, config: Config, device: str, packed: bool | None = None
) -> tuple[Config, str]:
    """Compute attention as the config asks. Returns the config with the attention that is used, and a line for the plan.

    packed: whether a resumed run has packed its texts, so that its batches stay what they were; None for a new run. Raises
    ConfigError where the config's attention is not possible.
    """
    transformers, by_auto = transformers_of(model), config.model.attention == "auto"
    if by_auto and packed is False:
        return config, _own_line(transformers, "this run did so from the start", device)
    chosen, line = plan_attention(model, config, device)
    name = chosen.model.attention
    if name == "auto":
        reason = _why_padded(transformers, config, device)
    else:
        reason = _try(model, chosen, compare=chosen.model.packs_texts and not packed)
        if reason is None:
            return chosen, _packed_line(name) if chosen.model.packs_texts else line
    if not by_auto:
        raise ConfigError(f"model.attention: {name} cannot be used: {reason}. Leave it at auto")
    if packed:
        raise ConfigError(
            f"model.attention: this run packed its texts, and cannot here: {reason}. Go on where it began: on CUDA, in "
            "16 bits"
        )
    return config, _own_line(transformers, reason, device)


def _why_padded(transformers: list[Transformer], config: Config, device: str) -> str | None:
    """Why auto does not pack texts, if it does not."""
    if device != "cuda":
        return f"training is on {device}"
    if not (config.training.bf16 or config.training.fp16):
        return "training.bf16 is off"
    if any(transformer.unpad_inputs is False for transformer in transformers):
        return "the base model says so (unpad_inputs)"
    return _own_code(transformers, packed=True)


def _own_code(transformers: list[Transformer], packed: bool) -> str | None:
    """The network, if any, that cannot be told which attention to use, or not to read packed texts."""
    for network in (transformer.model for transformer in transformers):
        if not network._can_set_attn_implementation() or (packed and not network._supports_flash_attn):
            return f"{type(network).__name__} has code of its own for attention"
    return None


def _try(model: SparseEncoder, config: Config, compare: bool) -> str | None:
    """Compute with the config's attention from now on, unless that fails. Returns why not.

    compare: it also fails if the vectors of a few texts, packed, are not those of padded ones.
    """
    transformers = transformers_of(model)
    before = [transformer.model.config._attn_implementation for transformer in transformers]
    precision = torch.autocast(model.device.type, torch.bfloat16 if config.training.bf16 else torch.float16)
    padded = _vectors(model, precision) if compare else None
    try:
        for transformer in transformers:
            set_attention(transformer, config.model.attention)
        packed = _vectors(model, precision) if config.model.packs_texts else None
        reason = None if packed is None or padded is None else _difference(packed, padded)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of a base model that was not made for it fails in any way
        reason = one_line(error) or type(error).__name__
    if reason:
        for transformer, own in zip(transformers, before, strict=True):
            set_attention(transformer, own)
    return reason


@torch.no_grad()
def _vectors(model: SparseEncoder, precision: torch.autocast) -> Tensor:
    """Vectors of a few texts, [texts, dimensions]; of CSR, the dense ones: rounding changes which dims are kept."""
    with precision:
        features = batch_to_device(model.eval().preprocess(TRIED, task="document"), model.device)
        output = model(features, task="document")
    return output.get("sentence_embedding_backbone", output["sentence_embedding"]).float()


def _difference(packed: Tensor, padded: Tensor) -> str | None:
    """The difference of the vectors in words, if it is too large."""
    if not padded.any():
        return "the vectors of a few texts are empty, so nothing can be compared"
    share = (packed - padded).norm() / padded.norm()
    return None if share <= TOLERANCE else f"packed, the vectors of a few texts are {share:.0%} off"


def _packed_line(name: str) -> str:
    return f"attention {name}, texts packed without padding"


def _own_line(transformers: list[Transformer], reason: str | None, device: str) -> str:
    """For the plan: attention is the base model's; and why texts are padded on CUDA, where they need not be."""
    own = ", ".join(sorted({transformer.model.config._attn_implementation for transformer in transformers}))
    return f"attention {own} (the base model has it)" + (f"; texts are padded: {reason}" if device == "cuda" else "")


@contextlib.contextmanager
def with_padded_attention(model: SparseEncoder) -> Iterator[None]:
    """Flash attention computes in 16 bits only: the model is scored, as users open it, with torch's own attention."""
    switched = [(each, each.model.config._attn_implementation) for each in transformers_of(model)]
    switched = [(transformer, name) for transformer, name in switched if name in PACKED_ATTENTION]
    for transformer, _ in switched:
        set_attention(transformer, "sdpa")
    try:
        yield
    finally:
        for transformer, name in switched:
            set_attention(transformer, name)


def set_attention(transformer: Transformer, name: str) -> None:
    """Compute with this attention. Raises ValueError where its name stands for packed texts, which cannot be read then."""
    transformer.model.set_attn_implementation(name)
    transformer.unpad_inputs = transformer.unpad_inputs  # the library decides anew whether to pack
    if name == VARLEN:  # what the library does for the flash attention it knows
        transformer.data_collator = DataCollatorWithFlattening(
            return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
        )
        if (handed_on := transformer.model_forward_params) is not None:  # to the network's layers
            handed_on |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
        transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
        transformer.can_flatten_inputs = True
    if name in PACKED_ATTENTION and not transformer.can_flatten_inputs:
        raise ValueError(f"{type(transformer.model).__name__} has no function for packed texts here")
