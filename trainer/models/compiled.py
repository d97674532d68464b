"""torch.compile of the networks alone: the head has kernels of its own, and the Router and the losses are plain Python."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from torch import nn

from trainer.fused.model import transformers_of


def compile_networks(model: SparseEncoder, lengths: Collection[int], backend: str | Callable = "inductor") -> None:
    """Compile what the networks compute in training, once per length: `lengths` are those that texts are padded to.

    The number of texts may vary without a compilation. Scoring, whose texts have any length, is not compiled. What is
    saved stays as it is. Call it last: what it compiles is what the networks compute at that moment.
    """
    # one graph per length, and twice that with GradCache, whose first pass is without gradients
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(lengths))
    for transformer in transformers_of(model):
        transformer.model.forward = _Compiled(transformer.model, backend)


class _Compiled:
    """A network's forward, compiled in training."""

    def __init__(self, network: nn.Module, backend: str | Callable):
        self.network, self.plain = network, network.forward
        self.compiled = torch.compile(network.forward, backend=backend)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not self.network.training:
            return self.plain(*inputs, **named)
        for tensor in (*inputs, *named.values()):
            if torch.is_tensor(tensor) and tensor.ndim == 2:  # [texts, length]
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
                torch._dynamo.mark_static(tensor, 1)
        return self.compiled(*inputs, **named)
