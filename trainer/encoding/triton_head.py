"""The CUDA path of the fused SPLADE head, in Triton: each text's largest logit per word, and the gradient through it.

`maxima[b, v] = max over tokens t of text b of (hidden[t] · weight[v]) + bias[v]` needs no [tokens, vocabulary] tensor:
a tile of logits lives in registers until its maximum is taken. Only one token per (text, word) has a gradient, so the
backward is two sums over those pairs. The idea is Sparton's (Nguyen et al. 2026, arXiv:2603.25011).

Needs a CUDA device, or `TRITON_INTERPRET=1` in the environment before the first import of triton (CPU tensors; tests).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What @triton.jit makes below is decided by the environment at this moment, so it is read at this moment as well.
INTERPRETED = triton.knobs.runtime.interpret

# Bytes of hidden states that the programs running at once share through L2 (50 MiB on an H100, in two halves): each
# weight block then comes from memory once per 8 MiB of texts, 4 times at 32 texts × 512 tokens × 960 bf16.
GROUP_BYTES = 8 << 20


def _config(words: int, tokens: int, features: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_WORDS": words, "BLOCK_TOKENS": tokens, "BLOCK_FEATURES": features}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# 128 × 256 does 85 operations per byte read from L2, the most whose accumulator (128 registers a thread) and stages
# (48 KiB each, of 227) fit an H100; compiled for sm_90 it takes 253 registers and spills none. The narrower ones waste
# less of the last tile of a short text. Where a stage does not fit (A100), the tuner passes over the config.
HALF = [
    _config(128, 256, 64, 8, 4),
    _config(128, 256, 64, 8, 3),
    _config(256, 128, 64, 8, 3),
    _config(128, 128, 64, 4, 3),
    _config(256, 64, 64, 8, 4),
    _config(128, 32, 64, 4, 4),
]
CONFIGS = {
    "half": HALF,
    "tf32": [_config(128, 128, 32, 4, 3), _config(128, 256, 32, 8, 3), _config(128, 32, 32, 4, 4)],
    "ieee": [_config(64, 64, 16, 4, 2), _config(128, 64, 16, 8, 2), _config(64, 32, 32, 4, 2)],
}
SMALL = {"BLOCK_WORDS": 16, "BLOCK_TOKENS": 16, "BLOCK_FEATURES": 16}  # the interpreter visits every element in Python

# Cells read at once: the sums' tiles of 8 × 1,024 floats are 64 registers a thread.
BLOCK_TEXTS = BLOCK_PAIRS = 8
# Texts × words that are sorted at once, in 40 bytes each: 32 texts × 51,200 words are 65 MB, and 5 % of this.
SORTED_CELLS = 1 << 25


@triton.jit
def _larger(left, right):
    """The larger of two, and NaN where either is, as in torch.max; tl.max would drop the NaN."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["texts", "group", "length_bucket"])
def _maxima(
    hidden,
    weight,
    bias,
    offsets,
    maxima,
    positions,
    texts,
    vocabulary,
    group,
    length_bucket,  # read by the tuner only
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
) -> None:
    """One program: BLOCK_WORDS words of one text, over the text's tokens."""
    # Neighbouring programs take the texts of one group for the same words, then the next words: see GROUP_BYTES.
    blocks = tl.cdiv(vocabulary, BLOCK_WORDS)
    program = tl.program_id(0)
    first_text = program // (group * blocks) * group
    in_group = tl.minimum(texts - first_text, group)
    rest = program % (group * blocks)
    text = first_text + rest % in_group
    words = rest // in_group * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    first = tl.load(offsets + text).to(tl.int32)
    end = tl.load(offsets + text + 1).to(tl.int32)

    columns = tl.arange(0, BLOCK_TOKENS)
    features = tl.arange(0, BLOCK_FEATURES)
    word_pointers = weight + tl.minimum(words, vocabulary - 1).to(tl.int64)[:, None] * WIDTH + features[None, :]
    best = tl.full([BLOCK_WORDS], float("-inf"), tl.float32)
    position = tl.full([BLOCK_WORDS], -1, tl.int32)
    # flatten makes one pipelined loop of both: the next tile's first loads run while this tile's maxima are taken.
    for start in tl.range(first, end, BLOCK_TOKENS, flatten=True):
        # Past the end the last token is read again: it changes no maximum, and costs no mask on the logits.
        rows = tl.minimum(start + columns, end - 1).to(tl.int64)
        token_pointers = hidden + rows[None, :] * WIDTH + features[:, None]
        logits = tl.zeros([BLOCK_WORDS, BLOCK_TOKENS], tl.float32)
        for feature in range(0, WIDTH, BLOCK_FEATURES):
            if WIDTH % BLOCK_FEATURES == 0:
                word_tile = tl.load(word_pointers + feature)
                token_tile = tl.load(token_pointers + feature)
            else:
                word_tile = tl.load(word_pointers + feature, mask=features[None, :] < WIDTH - feature, other=0.0)
                token_tile = tl.load(token_pointers + feature, mask=features[:, None] < WIDTH - feature, other=0.0)
            logits = tl.dot(word_tile, token_tile, logits, input_precision=PRECISION)
        # Words are the rows of the product, so that a thread holds 64 of a row's 256 logits and two shuffles finish the
        # row. The maximum is one instruction a logit, finding it again three. On an H100, by its data sheet, these run 64
        # a clock and the product 2,048 terms a clock: at width 960 about an eighth on top.
        tile_best = tl.reduce(logits, 1, _larger)
        if positions is not None:
            # No logit equals NaN: then the column is BLOCK_TOKENS, and the position is not used.
            column = tl.min(tl.where(logits == tile_best[:, None], columns[None, :], BLOCK_TOKENS), 1)
            position = tl.where(tile_best > best, start + column, position)
        best = _larger(best, tile_best)

    real = words < vocabulary
    if bias is not None:
        best += tl.load(bias + words, mask=real, other=0.0).to(tl.float32)
    best = _larger(best, tl.zeros_like(best))
    best = tl.where(end > first, best, 0.0)  # an empty text is 0 whatever the bias
    cells = text.to(tl.int64) * vocabulary + words
    tl.store(maxima + cells, best, mask=real)
    if positions is not None:
        tl.store(positions + cells, tl.where(best > 0, position, -1), mask=real)


# Tuned once per width, bucket of lengths, and dtypes of the arguments (with positions or without is one of those);
# `cache_results` keeps the choice on disk, beside the compiled kernels.
_TUNED = {
    name: triton.autotune(configs, key=["WIDTH", "length_bucket"], cache_results=True)(_maxima)
    for name, configs in CONFIGS.items()
}


@triton.jit
def _sum_over_texts(
    hidden,
    gradient,
    positions,
    out,
    texts,
    vocabulary,
    WIDTH: tl.constexpr,
    BLOCK_TEXTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """One program: out[word] = sum over texts b of gradient[b, word] * hidden[positions[b, word]]."""
    word = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(0, texts, BLOCK_TEXTS):
        of_block = start + tl.arange(0, BLOCK_TEXTS)
        cells = of_block.to(tl.int64) * vocabulary + word
        factors = tl.load(gradient + cells, mask=of_block < texts, other=0.0)
        rows = tl.load(positions + cells, mask=of_block < texts, other=-1)
        active = (factors != 0) & (rows >= 0)
        if tl.sum(active.to(tl.int32), 0) > 0:  # one word in a hundred, of one text
            inside = active[:, None] & (columns < WIDTH)[None, :]
            values = tl.load(hidden + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
            total += tl.sum(tl.where(active, factors, 0.0)[:, None] * values.to(tl.float32), 0)
    tl.store(out + word.to(tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _sum_over_words(
    weight,
    gradient,
    order,
    starts,
    out,
    vocabulary,
    WIDTH: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """One program: out[row] = sum over cells c in order[starts[row]:starts[row + 1]] of gradient[c] * weight[c's word].

    A row without cells is left as it is.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(first, end, BLOCK_PAIRS):
        pairs = start + tl.arange(0, BLOCK_PAIRS)
        cells = tl.load(order + pairs, mask=pairs < end, other=0)
        factors = tl.load(gradient + cells, mask=pairs < end, other=0.0)
        inside = (pairs < end)[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(weight + (cells % vocabulary)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(factors[:, None] * values.to(tl.float32), 0)
    written = (columns < WIDTH) & (end > first)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=written)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, want_positions: bool
) -> tuple[Tensor, Tensor | None]:
    """The largest logit of every word in every text, and the token it comes from. Nothing waits for the device.

    hidden: [tokens, width], the tokens of all texts one after the other; float32, bfloat16 or float16. Rows after the last
    text (padding, say) belong to none: their gradient is 0.
    weight: [vocabulary, width], of hidden's dtype. bias: [vocabulary], any float dtype, or None.
    offsets: [texts + 1], int32 or int64, ascending from 0, at most tokens; text b is rows offsets[b]:offsets[b + 1], maybe
    none.

    Returns maxima [texts, vocabulary], float32, 0 where no logit is positive (so for a text without tokens), NaN where a
    logit is NaN; and positions [texts, vocabulary], int32, the first row of `hidden` that attains a positive maximum and
    -1 elsewhere, or None unless wanted. Products accumulate in float32; float32 inputs are multiplied in TF32 only when
    torch.backends.cuda.matmul allows it. Not contiguous means one copy. Raises ValueError for anything else.

    A shape met for the first time is tuned: seconds, and up to 256 MiB for the while.
    """
    _check(hidden, weight, bias, offsets)
    hidden, weight, offsets = hidden.contiguous(), weight.contiguous(), offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    (tokens, width), vocabulary, texts = hidden.shape, len(weight), len(offsets) - 1
    maxima = hidden.new_empty(texts, vocabulary, dtype=torch.float32)
    positions = hidden.new_empty(texts, vocabulary, dtype=torch.int32) if want_positions else None
    mean_length = max(1, tokens // max(1, texts))
    group = max(1, min(texts, GROUP_BYTES // (mean_length * width * hidden.element_size())))
    bucket = min(512, triton.next_power_of_2(max(16, mean_length)))  # six of them: no new tuning for every batch
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

    kernel, blocks = _TUNED[precision if hidden.dtype == torch.float32 else "half"], {}
    if INTERPRETED:  # where the product of two bfloat16 tiles would be one of their bit patterns
        kernel, blocks, hidden, weight = _maxima, SMALL, hidden.float(), weight.float()
    with torch.cuda.device_of(hidden):
        kernel[lambda meta: (texts * triton.cdiv(vocabulary, meta["BLOCK_WORDS"]),)](
            hidden,
            weight,
            bias,
            offsets,
            maxima,
            positions,
            texts,
            vocabulary,
            group,
            bucket,
            WIDTH=width,
            PRECISION=precision,
            **blocks,
        )
    return maxima, positions


def backward(gradient: Tensor, positions: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias: every sum in float32, in one fixed order, so two runs are bit-equal.

    gradient: [texts, vocabulary], float32, with respect to the maxima before clamping: 0 where inactive.
    positions, hidden, weight: as `forward` took and returned them. A gradient without a position reaches the bias only.

    Returns d_hidden [tokens, width] and d_weight [vocabulary, width], in the dtypes of hidden and weight (summed in
    float32 and rounded once), and d_bias [vocabulary] in float32. Memory besides is in proportion to texts × vocabulary.
    Nothing waits for the device: to sort all texts × vocabulary cells costs less than to ask how many are active.
    """
    hidden, weight = hidden.contiguous(), weight.contiguous()
    gradient, positions = gradient.contiguous(), positions.contiguous()
    (texts, vocabulary), (tokens, width) = gradient.shape, hidden.shape
    d_hidden, d_weight = torch.zeros_like(hidden), torch.empty_like(weight)
    block_width = min(1024, triton.next_power_of_2(width))
    columns = triton.cdiv(width, block_width)
    with torch.cuda.device_of(hidden):
        _sum_over_texts[(vocabulary, columns)](
            hidden, gradient, positions, d_weight, texts, vocabulary, width, BLOCK_TEXTS, block_width
        )
        every_row = torch.arange(tokens + 1, dtype=torch.int32, device=hidden.device)
        at_once = max(1, SORTED_CELLS // vocabulary)
        for part, positions_part in zip(gradient.split(at_once), positions.split(at_once), strict=True):
            # the cells of each row of hidden, and before them those without a gradient
            rows, order = torch.where(part != 0, positions_part, -1).flatten().sort(stable=True)
            starts = torch.searchsorted(rows, every_row)
            _sum_over_words[(tokens, columns)](
                weight, part, order, starts, d_hidden, vocabulary, width, BLOCK_PAIRS, block_width
            )
    return d_hidden, d_weight, gradient.sum(0)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> None:
    """Shapes, dtypes and devices, none of which needs the device."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [tokens, width] and [vocabulary, width]"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden and weight must share float32, bfloat16 or float16: {hidden.dtype}, {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be {len(weight)} floats, not {list(bias.shape)} of {bias.dtype}")
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be [texts + 1] of int32 or int64, not {list(offsets.shape)} of {offsets.dtype}")
    devices = {tensor.device for tensor in (hidden, weight, bias, offsets) if tensor is not None}
    if len(devices) > 1 or not (hidden.is_cuda or INTERPRETED):
        raise ValueError(f"the Triton head needs its tensors on one CUDA device, not on {sorted(map(str, devices))}")
