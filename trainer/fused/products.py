"""Matrix products on CPUs through oneDNN instead of MKL.

torch sends float32 products to MKL, which on AMD's processors keeps to AVX2: on one core of a Zen 5, 107 GFLOP/s against
oneDNN's 240. On Intel's the two are alike.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs · weightᵀ + bias, as F.linear: [..., in] and [out, in] to [..., out]."""
    if goes_through_onednn(inputs) and weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return F.linear(inputs, weight, bias)


def goes_through_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN is here, and for this tensor an alternative to MKL."""
    return ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        to_inputs = to_weight = to_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            to_inputs = product(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            to_weight = product(flat.t(), inputs.reshape(-1, inputs.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        return to_inputs, to_weight, to_bias


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, layer.weight, layer.bias)
    if goes_through_onednn(inputs):
        return _Linear.apply(inputs, layer.weight, layer.bias)
    return F.linear(inputs, layer.weight, layer.bias)


def use_onednn(network: nn.Module) -> None:
    """Let a network's linear layers compute through oneDNN where that is possible."""
    for layer in _linear_layers(network):
        layer.forward = partial(_forward, layer)


def use_torch(network: nn.Module) -> None:
    """Let them compute as torch does."""
    for layer in _linear_layers(network):
        vars(layer).pop("forward", None)


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if type(module) is nn.Linear]
