"""Vocabulary projection, activation and max pooling in one step, so that no [texts, tokens, words] logits exist.

    value[text, word] = activation(max over the text's tokens (hidden · weight[word] + bias[word]))

The activations only grow, so the largest logit gives the largest value; and a word's gradient goes to the one token that
its value comes from. Padding is left out before anything is computed. (On GPUs the idea is Sparton's, arXiv 2603.25011.)
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.encoding import tiles


def splade_max(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, activation: str = "relu") -> Tensor:
    """What a masked-language-model head and SpladePooling compute, to float tolerance, on any device and for any mask.

    hidden: [texts, length, width]; weight: [words, width]; bias: [words]; mask: [texts, length]. Returns [texts, words] in
    float32, or float64 for float64 inputs. Under autocast the product is made in autocast's precision. A NaN among the
    logits of a word gives NaN, an infinite one infinity.
    """
    rows, offsets = pack(mask)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    hidden = hidden if rows is None else hidden.index_select(0, rows)
    return splade_max_packed(hidden, weight, bias, offsets, activation)


def splade_max_packed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, activation: str = "relu"
) -> Tensor:
    """The same for texts without padding: hidden [tokens, width], text by text; offsets [texts + 1], where each starts."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return _SpladeMax.apply(hidden, weight.to(hidden.dtype), bias, offsets, activation)


def pack(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """Which rows of [texts × length] are tokens, text by text, and where each text starts: [texts + 1].

    None for the rows when all are. On a GPU the rows of padding follow behind those of the tokens instead of being cut
    off: to ask for their number would wait for all that the GPU still has to do.
    """
    kept = mask.bool()
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
    if mask.device.type == "cuda":
        return torch.argsort(~kept.flatten(), stable=True), offsets
    return (None if kept.all() else kept.flatten().nonzero().squeeze(1)), offsets


class _SpladeMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, activation: str
    ) -> Tensor:
        learns = any(ctx.needs_input_grad[:3])
        hidden, weight = hidden.contiguous(), weight.contiguous()
        values, positions = _path(hidden).forward(hidden, weight, bias, offsets, learns)
        for _ in range(ACTIVATIONS[activation]):
            values.log1p_()
        if learns:
            ctx.save_for_backward(hidden, weight, values, positions)
            ctx.activation, ctx.bias_type = activation, None if bias is None else bias.dtype
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        hidden, weight, values, positions = ctx.saved_tensors
        gradient = torch.where(values > 0, gradient * SLOPES[ctx.activation](values), 0.0)
        to_hidden, to_weight, to_bias = _path(hidden).backward(gradient, positions, hidden, weight)
        return to_hidden, to_weight, None if ctx.bias_type is None else to_bias.to(ctx.bias_type), None, None


# SpladePooling's names: how often log1p is applied to the positive logits,
ACTIVATIONS = {"relu": 1, "log1p_relu": 2}
# and the slope from the value: that of y = log1p(x) is exp(-y).
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda values: torch.exp(-values),
    "log1p_relu": lambda values: torch.exp(-values - torch.expm1(values)),
}


def _path(hidden: Tensor) -> ModuleType:
    """The module that computes it on this device."""
    if hidden.device.type == "cuda":
        from trainer.encoding import triton_head

        return triton_head
    return tiles
