"""The head alone: stock logits and pooling, the fused head, and one plain matrix product of the same shape."""

import time
from typing import Any

import torch

from tests.benchmarks.speed.process import answer, best_seconds, forget_peak, peak_mib
from tests.oracles import splade_head
from trainer.encoding.fused_head import splade_max

TEXTS, LENGTH, WORDS = 16, 256, 50_000
# With logits of standard deviation 1, the largest of 256 is above this for 1 % of the words.
BIAS = -3.95
HEADS = {"stock": splade_head, "fused": splade_max}


def inputs(width: int, padded: bool) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias and mask; padded: lengths from a fifth of the longest up, evenly."""
    torch.manual_seed(0)
    hidden = torch.randn(TEXTS, LENGTH, width)
    weight = torch.randn(WORDS, width) * width**-0.5
    bias = torch.randn(WORDS) * 0.1 + BIAS
    lengths = torch.linspace(0.2, 1, TEXTS).mul(LENGTH).long() if padded else torch.full((TEXTS,), LENGTH)
    return hidden, weight, bias, (torch.arange(LENGTH) < lengths[:, None]).long()


def measure(side: str, width: int, padded: bool = False) -> dict[str, Any]:
    """CPU seconds of forward and backward, and the memory they need beside their inputs, in MiB."""
    hidden, weight, bias, mask = inputs(width, padded)
    if side == "product":
        seconds = best_seconds(lambda: torch.mm(hidden.view(-1, width), weight.t()))
        return {"forward": seconds}
    leaves = [part.requires_grad_() for part in (hidden, weight, bias)]
    outer = torch.randn(TEXTS, WORDS) / WORDS
    before, found = forget_peak(), []
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = None
        start = time.process_time()
        values = HEADS[side](hidden, weight, bias, mask)
        middle = time.process_time()
        values.backward(outer)
        found.append((middle - start, time.process_time() - middle))
    forward, backward = (min(times) for times in zip(*found, strict=True))
    active = (values > 0).float().mean().item()
    return {
        "forward": forward,
        "backward": backward,
        "both": forward + backward,
        "mib": peak_mib() - before,
        "active": active,
    }


if __name__ == "__main__":
    answer(measure)
