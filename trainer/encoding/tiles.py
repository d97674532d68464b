"""The head on CPUs and MPS, in plain torch: tiles of some texts × some words, of which only the maxima are kept."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.encoding.products import product

# A tile of 2 MiB stays in one core's cache while its maxima are taken (fastest of 0.5 to 16 MiB on Zen 3 and Zen 5).
TILE_BYTES = 2 << 20
# Short texts share a tile until it is so many tokens wide: a product of 32 columns ran at half the speed of one of 256.
TILE_TOKENS = 256
# Pairs whose vectors are gathered at a time where there is no embedding bag.
CHUNK = 65_536


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, want_positions: bool
) -> tuple[Tensor, Tensor | None]:
    """Per text and word the largest logit, at least 0, and the row of `hidden` that it comes from where it is above 0.

    hidden: [tokens, width], one text after the other; offsets: [texts + 1], where each text starts and the last ends;
    weight: [words, width]; bias: [words]. Returns float32 [texts, words] and int32 [texts, words].
    """
    bounds, words = offsets.tolist(), len(weight)
    maxima = hidden.new_zeros(len(bounds) - 1, words, dtype=torch.promote_types(hidden.dtype, torch.float32))
    positions = torch.zeros_like(maxima, dtype=torch.int32) if want_positions else None
    groups = list(_groups(bounds))
    widest = max((bounds[last] - bounds[first] for first, last in groups), default=0)
    block = max(256, TILE_BYTES // (hidden.element_size() * max(widest, 1)) // 64 * 64)
    for start in range(0, words, block):
        part = slice(start, start + block)
        part_bias = 0.0 if bias is None else bias[part].to(maxima.dtype)
        for first, last in groups:  # the inner loop, so that this part of the weights is read from memory once
            tile = product(weight[part], hidden[bounds[first] : bounds[last]])
            for text in range(first, last):
                begin, end = bounds[text], bounds[text + 1]
                if begin == end:
                    continue
                columns = tile[:, begin - bounds[first] : end - bounds[first]]
                # rounding is monotone, so max(x) + b is max(x + b)
                top = columns.amax(1).to(maxima.dtype) + part_bias
                maxima[text, part] = top.clamp_min_(0)
                if positions is not None:
                    active = top.nonzero().squeeze(1)
                    # early in training most words are active: then a copy of their rows costs more than it saves
                    found = columns.argmax(1)[active] if 2 * len(active) > len(top) else columns[active].argmax(1)
                    positions[text, start + active] = (found + begin).int()
    return maxima, positions


def _groups(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive texts that share tiles."""
    first = 0
    for text in range(len(bounds) - 1):
        if text > first and bounds[text + 1] - bounds[first] > TILE_TOKENS:
            yield first, text
            first = text
    if len(bounds) > 1:
        yield first, len(bounds) - 1


def backward(gradient: Tensor, positions: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each pair of a text and an active word adding one row to either.

    gradient: float32 [texts, words] of the maxima, 0 where there is nothing to pass on; positions as forward gave them.
    """
    word, text = gradient.t().nonzero(as_tuple=True)  # by word, so that each word's rows lie together
    value, row = gradient[text, word], positions[text, word].long()
    order = torch.argsort(row, stable=True)
    to_weight = _sum_rows(hidden, row, value, word, len(weight))
    to_hidden = _sum_rows(weight, word[order], value[order], row[order], len(hidden))
    return to_hidden, to_weight, gradient.sum(0)


def _sum_rows(source: Tensor, rows: Tensor, values: Tensor, targets: Tensor, size: int) -> Tensor:
    """[size, width]: at each target the sum of its rows of `source` times their values. `targets` is sorted."""
    if source.device.type == "cpu" and source.dtype == torch.float32:
        bounds = torch.zeros(size + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(targets, minlength=size), 0, out=bounds[1:])
        return F.embedding_bag(rows, source, bounds, mode="sum", per_sample_weights=values, include_last_offset=True)
    total = torch.zeros(size, source.shape[1], dtype=values.dtype, device=source.device)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        total.index_add_(0, targets[part], source[rows[part]].to(values.dtype) * values[part, None])
    return total.to(source.dtype)
