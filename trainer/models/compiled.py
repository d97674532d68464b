"""torch.compile of the networks' layers: the head has kernels of its own, and the Router and the losses are plain Python.

A network's layers are alike, so one of them is compiled for all: 28 layers for 8 lengths are 8 small graphs, not 8 of 28
layers each.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from torch import nn
from torch.utils._pytree import tree_leaves

from trainer.config import ConfigError
from trainer.encoding.fuse import transformers_of
from trainer.encoding.products import use_torch


def compile_networks(
    model: SparseEncoder, lengths: Collection[int] | None, backend: str | Callable = "inductor"
) -> str:
    """Compile what the networks' layers compute in training. Returns what is compiled, in words.

    lengths: those that texts are padded to, one graph for each; None for packed texts, of which one graph serves every
    number of tokens. The number of texts may vary. Scoring, whose texts have any length, is not compiled, and loses
    oneDNN's products on a CPU. Call it last: what the layers compute at that moment is compiled. The model cannot be
    pickled then.
    """
    layers = [layer for transformer in transformers_of(model) for layer in layers_of(transformer.model)]
    for layer in layers:
        use_torch(layer)  # oneDNN's forwards differ from layer to layer, and with them what is compiled
    # one graph per length and kind of layer; twice that for a single text; and twice that for GradCache's pass without
    # gradients
    most = 4 * len(lengths or [0]) * len(layers)
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), most))
    compiled = {
        kind: torch.compile(kind.forward, backend=backend, dynamic=None if lengths else True)
        for kind in {type(layer) for layer in layers}
    }
    for layer in layers:
        layer.forward = _Compiled(layer, compiled[type(layer)], packed=lengths is None)
    texts = f"texts of {', '.join(map(str, lengths))} tokens" if lengths else "packed texts of any length"
    return f"the networks' {len(layers)} layers, for {texts}"


def layers_of(network: nn.Module) -> list[nn.Module]:
    """What a network's outermost lists of modules hold, or the lists in them. Raises ConfigError where it has none."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [outer for outer in lists if not any(isinstance(layer, nn.ModuleList) for layer in outer)]
    inside = {inner for outer in lists for layer in outer for inner in layer.modules()}
    layers = [layer for outer in lists if outer not in inside for layer in outer]
    if not layers:
        raise ConfigError(
            f"training.torch_compile: {type(network).__name__} has no list of layers to compile. Set it to false"
        )
    return layers


class _Compiled:
    """A layer's forward, compiled in training."""

    def __init__(self, layer: nn.Module, compiled: Callable, packed: bool) -> None:
        self.layer, self.plain, self.compiled, self.packed = layer, layer.forward, compiled, packed

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not self.layer.training:
            return self.plain(*inputs, **named)
        if not self.packed:
            tensors = [leaf for leaf in tree_leaves((inputs, named)) if torch.is_tensor(leaf) and leaf.ndim]
            texts = len(tensors[0])
            for tensor in tensors:  # [texts, length, ...], or [1, length, ...] for what all texts share
                for dim in range(tensor.ndim):
                    if dim == 0 and len(tensor) == texts:
                        torch._dynamo.maybe_mark_dynamic(tensor, 0)
                    else:
                        torch._dynamo.mark_static(tensor, dim)
        return self.compiled(self.layer, *inputs, **named)
