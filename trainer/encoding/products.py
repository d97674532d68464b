"""Matrix products on CPUs through oneDNN instead of MKL.

torch sends float32 products to MKL, which on AMD's processors keeps to AVX2: on one core of a Zen 5, 107 GFLOP/s against
oneDNN's 240. A GELU whose values go into such a product is computed again for the backward pass: kept, they would be a
quarter of what a BERT layer keeps. A step takes no longer for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs · weightᵀ + bias, as F.linear: [..., in] and [out, in] to [..., out]."""
    if _through_onednn(inputs, weight):
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return F.linear(inputs, weight, bias)


def _through_onednn(inputs: Tensor, weight: Tensor) -> bool:
    on_cpu = inputs.device.type == "cpu" and inputs.dtype == weight.dtype == torch.float32
    return ONEDNN and on_cpu and inputs.numel() > 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, made_by: Callable | None, made_of: Tensor | None
    ) -> Tensor:
        """inputs may be left out of what is kept if they are made_by(made_of)."""
        ctx.made_by = made_by
        ctx.save_for_backward(inputs if made_by is None else made_of, weight)
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        inputs, weight = ctx.saved_tensors
        if ctx.made_by is not None:
            inputs = ctx.made_by(inputs)
        to_inputs = to_weight = to_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            to_inputs = product(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            to_weight = product(flat.t(), inputs.reshape(-1, inputs.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        return to_inputs, to_weight, to_bias, None, None


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu") or not _through_onednn(inputs, layer.weight):
        return F.linear(inputs, layer.weight, layer.bias)
    made_by, made_of, version = getattr(inputs, "made", (None, None, None))
    if made_by is not None and version != inputs._version:  # changed in place since then
        made_by = made_of = None
    return _Linear.apply(inputs, layer.weight, layer.bias, made_by, made_of)


class _ScaledLinear(torch.autograd.Function):
    """A linear layer of weights under each other, with their columns multiplied by scale + 1.

    The multiplied weights are not kept: of 24 layers 640 wide, 800 MB for each pass through the network.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, scale: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, scale, *weights)
        return product(inputs, torch.cat(weights) * (scale + 1.0), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        inputs, scale, *weights = ctx.saved_tensors
        stacked, flat = torch.cat(weights), gradient.reshape(-1, gradient.shape[-1])
        to_inputs = product(gradient, (stacked * (scale + 1.0)).t()) if ctx.needs_input_grad[0] else None
        to_bias = flat.sum(0) if ctx.needs_input_grad[1] else None
        if not any(ctx.needs_input_grad[2:]):
            return to_inputs, to_bias, None, *(None for _ in weights)
        to_product = product(flat.t(), inputs.reshape(-1, inputs.shape[-1]).t())
        to_weights = (to_product * (scale + 1.0)).split([len(weight) for weight in weights])
        return to_inputs, to_bias, (to_product * stacked).sum(0), *to_weights


def _forward_scaled(layer: nn.Module, inputs: Tensor) -> Tensor:
    """NorBERT4's layers, which have one weight or several."""
    if torch.is_autocast_enabled("cpu") or not _through_onednn(inputs, layer.scale):
        return type(layer).forward(layer, inputs)
    return _ScaledLinear.apply(inputs, layer.bias, layer.scale, *_weights_of(layer))


def _weights_of(layer: nn.Module) -> list[Tensor]:
    return list(layer.weights) if hasattr(layer, "weights") else [layer.weight]


def _activate(activation: nn.Module, inputs: Tensor) -> Tensor:
    """The activation's values, which say what they are made of. What is computed from them (dropout, a gate) does not."""
    values = type(activation).forward(activation, inputs)
    if values.requires_grad:
        values.made = partial(type(activation).forward, activation), inputs.detach(), values._version
    return values


# What takes the place of a layer's forward; of those in a base model's own code, by name.
REPLACED = {nn.Linear: _forward, nn.GELU: _activate, GELUActivation: _activate}
SCALED = {"CastedLinearIn", "MultiCastedLinearOrthoIn"}


def use_onednn(network: nn.Module) -> None:
    """Let a network's linear layers compute through oneDNN where that is possible."""
    forwards = dict(REPLACED)
    for layer in network.modules():
        if type(layer) not in forwards:  # a class computes the same in every layer
            forwards[type(layer)] = _of_own_code(layer)
        if forward := forwards[type(layer)]:
            layer.forward = partial(forward, layer)


def use_torch(network: nn.Module) -> None:
    """Let them compute as torch does."""
    for layer in network.modules():
        if type(layer) in REPLACED or type(layer).__name__ in SCALED:
            vars(layer).pop("forward", None)


@torch.no_grad()
def _of_own_code(layer: nn.Module) -> Callable | None:
    """_forward_scaled, if that is what this layer computes: another revision's may be another function."""
    if type(layer).__name__ not in SCALED or not hasattr(layer, "scale"):
        return None
    probe = torch.linspace(-1, 1, 2 * len(layer.scale), device=layer.scale.device).view(2, -1).to(layer.scale.dtype)
    own = type(layer).forward(layer, probe)
    ours = F.linear(probe, torch.cat(_weights_of(layer)) * (layer.scale + 1.0), layer.bias)
    return _forward_scaled if torch.allclose(own, ours, rtol=1e-4, atol=1e-4 * own.abs().max().item()) else None
