"""The SPLADE head worked out with all its logits, in float64, and cases to compare it with."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """Texts of given lengths, packed: hidden [tokens, width], weight [vocabulary, width], bias, offsets [texts + 1]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    offsets: Tensor

    @property
    def inputs(self):
        return self.hidden, self.weight, self.bias, self.offsets


def random_case(lengths, width, vocabulary, dtype=torch.float32, shift=0.0, seed=0, device="cpu"):
    """Normal numbers, so that logits have a deviation of 1; a bias around -shift."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    bias = torch.randn(vocabulary, generator=generator) * 0.1 - shift
    return Case(hidden.to(device, dtype), weight.to(device, dtype), bias.to(device), offsets_of(lengths, device))


def whole_number_case(lengths, width, vocabulary, dtype=torch.float32, seed=0, device="cpu"):
    """Small whole numbers: every product and sum is exact in every dtype, and many tokens tie."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (sum(lengths), width), generator=generator)
    weight = torch.randint(-2, 3, (vocabulary, width), generator=generator)
    bias = torch.randint(-3, 3, (vocabulary,), generator=generator).float()
    return Case(hidden.to(device, dtype), weight.to(device, dtype), bias.to(device), offsets_of(lengths, device))


def offsets_of(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def dense_maxima(case):
    """[texts, vocabulary] in float64, not clamped, differentiable; and the first rows that attain them."""
    logits = case.hidden.double() @ case.weight.double().t()
    maxima, rows = [], []
    for start, end in case.offsets.long().unfold(0, 2, 1).tolist():
        if start == end:
            maxima.append(case.weight.double().sum(1) * 0)
            rows.append(torch.full_like(case.weight[:, 0], -1, dtype=torch.long))
            continue
        text = logits[start:end]
        largest = text.detach().max(0).values
        first = (text == largest).int().argmax(0)  # of several, argmax documents the first; max promises none
        value = text.gather(0, first[None])[0]
        maxima.append(value if case.bias is None else value + case.bias.double())
        rows.append(start + first)
    return torch.stack(maxima), torch.stack(rows)


def dense_gradients(case, gradient):
    """(d_hidden, d_weight, d_bias) of sum(maxima * gradient), by autograd in float64."""
    leaves = Case(*(None if t is None else t.detach().double().requires_grad_() for t in case.inputs[:3]), case.offsets)
    maxima, _ = dense_maxima(leaves)
    wanted = [leaf for leaf in leaves.inputs[:3] if leaf is not None]
    return torch.autograd.grad(maxima, wanted, gradient.double(), materialize_grads=True)


def largest_error(case):
    """How far a float32 sum of `width` exact products may be from the truth, whatever its order (Higham 2002, (3.5))."""
    tokens, width = case.hidden.shape
    if tokens == 0:
        return 0.0
    magnitude = case.hidden.double().norm(dim=1).max() * case.weight.double().norm(dim=1).max()
    return (width + 1) * 2.0**-24 * (magnitude + (0 if case.bias is None else case.bias.abs().max())).item()


def magnitude_of_gradients(case, gradient, positions):
    """The sums of d_hidden, d_weight and d_bias with every term's absolute value: what rounding is in proportion to."""
    active = gradient.nonzero()
    scattered = case.hidden.new_zeros(len(case.hidden), len(case.weight), dtype=torch.float64)
    scattered[positions[*active.t()].long(), active[:, 1]] = gradient[*active.t()].double().abs()
    return scattered @ case.weight.double().abs(), scattered.t() @ case.hidden.double().abs(), scattered.sum(0)
