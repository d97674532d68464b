"""The Triton head in Triton's interpreter: test_fused_triton.py runs this file in a process of its own.

TRITON_INTERPRET must be set before triton is first imported, and would change what other tests of this process compile.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import ReduceOps

from tests.dense_head import (
    Case,
    dense_gradients,
    dense_maxima,
    largest_error,
    magnitude_of_gradients,
    offsets_of,
    random_case,
    whole_number_case,
)
from trainer.encoding import triton_head
from trainer.encoding.triton_head import INTERPRETED, backward, forward

# Blocks are 16 words × 16 tokens × 16 features here: each size is met below, at and above a block, and odd.
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=3)
WIDTHS = st.sampled_from([1, 7, 16, 21, 32])
VOCABULARIES = st.sampled_from([1, 15, 16, 19])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
few = settings(max_examples=8, deadline=None, derandomize=True)


def reduce_by_slices(self, operands):
    """The kernel's own combination, a slice at a time: the interpreter's loop takes single elements, 16 times as slow."""
    (operand,) = operands
    first, *others = (self.to_tensor(part, operand.dtype) for part in np.moveaxis(operand.handle.data, self.axis, 0))
    for other in others:
        first = self.combine_fn.fn(first, other)
    return [first]


ReduceOps.generic_reduce = reduce_by_slices


def test_this_process_interprets():
    assert INTERPRETED


@few
@given(LENGTHS, WIDTHS, VOCABULARIES, DTYPES, st.booleans(), st.integers(0, 2**31))
def test_maxima_positions_and_gradients_are_exact_for_whole_numbers(lengths, width, vocabulary, dtype, biased, seed):
    case = whole_number_case(lengths, width, vocabulary, dtype, seed)
    case.bias = case.bias if biased else None
    maxima, positions = forward(*case.inputs, want_positions=True)
    expected, rows = dense_maxima(case)
    assert torch.equal(maxima.double(), expected.clamp_min(0))
    assert torch.equal(positions.long(), torch.where(expected > 0, rows, -1))

    gradient = torch.randint(-3, 4, maxima.shape).float() * (maxima > 0)
    got = backward(gradient, positions, case.hidden, case.weight)
    wanted = dense_gradients(case, gradient)
    for ours, dense in zip(got, wanted, strict=False):
        assert torch.equal(ours, dense.to(ours.dtype))
    assert torch.equal(got[2].double(), gradient.double().sum(0))
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32]


@few
@given(LENGTHS, WIDTHS, st.sampled_from([0.0, 1.0, 3.0]), DTYPES, st.integers(0, 2**31))
def test_float_results_are_within_the_rounding_of_a_float32_sum(lengths, width, shift, dtype, seed):
    case = random_case(lengths, width, 19, dtype, shift, seed)
    maxima, positions = forward(*case.inputs, want_positions=True)
    expected, _ = dense_maxima(case)
    assert (maxima - expected.clamp_min(0)).abs().max() <= largest_error(case)

    gradient = torch.randn(maxima.shape) * (maxima > 0)
    got = backward(gradient, positions, case.hidden, case.weight)
    magnitudes = magnitude_of_gradients(case, gradient, positions)
    for ours, dense, magnitude in zip(got, dense_gradients(case, gradient), magnitudes, strict=True):
        # At most 19 terms a sum, each rounded to float32 twice; then one rounding to the dtype, whose numbers lie evenly
        # below its smallest normal one (in float16 below 6e-5, which one gradient in 40,000 is).
        kind = torch.finfo(ours.dtype)
        rounding = kind.eps * dense.abs().clamp_min(kind.smallest_normal)
        assert ((ours - dense).abs() <= 21 * 2.0**-24 * magnitude + rounding).all()


def test_without_positions_the_maxima_are_the_same():
    case = random_case([5, 0, 18], 21, 19)
    maxima, positions = forward(*case.inputs, want_positions=False)
    assert positions is None
    assert torch.equal(maxima, forward(*case.inputs, want_positions=True)[0])


def test_no_positive_logit_means_zero_and_no_position():
    case = whole_number_case([3, 20], 8, 5)
    maxima, positions = forward(case.hidden.abs(), -case.weight.abs(), None, case.offsets, True)
    assert (maxima == 0).all()
    assert (positions == -1).all()


def test_among_equal_tokens_the_first_has_the_gradient():
    hidden = torch.ones(40, 3)
    maxima, positions = forward(hidden, torch.ones(2, 3), None, offsets_of([18, 22]), True)
    assert maxima.tolist() == [[3, 3], [3, 3]]
    assert positions.tolist() == [[0, 0], [18, 18]]
    d_hidden, d_weight, d_bias = backward(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), positions, hidden, torch.ones(2, 3))
    assert d_hidden[0].tolist() == [3, 3, 3]
    assert d_hidden[18].tolist() == [4, 4, 4]
    assert d_hidden.sum() == 21
    assert d_weight.tolist() == [[1, 1, 1], [6, 6, 6]]
    assert d_bias.tolist() == [1, 6]


@pytest.mark.parametrize("row", [0, 16, 19], ids=["first tile", "second tile", "last token"])
def test_a_nan_reaches_its_text_and_no_other(row):
    case = random_case([20, 2], 8, 5)
    case.hidden[row, 3] = torch.nan
    maxima, positions = forward(*case.inputs, want_positions=True)
    assert maxima[0].isnan().all()
    assert (positions[0] == -1).all()
    assert maxima[1].isfinite().all()


def test_a_nan_or_infinite_word_reaches_its_column_only():
    bias = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 0.0])
    case = Case(torch.ones(3, 17), torch.ones(5, 17), bias, offsets_of([3, 0]))  # a block of 16 features and one more
    case.weight[4] = torch.inf
    maxima, positions = forward(*case.inputs, want_positions=True)
    assert maxima[0, 1].isnan()
    assert maxima[0, [0, 2, 3, 4]].tolist() == [17, torch.inf, 0, torch.inf]
    assert positions[0].tolist() == [0, -1, 0, -1, 0]
    assert maxima[1].tolist() == [0, 0, 0, 0, 0]  # a text without tokens, whatever the bias


@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_order_of_the_programs_makes_no_difference(group, monkeypatch):
    case = random_case([3, 3, 3, 3, 3], 4, 35)
    maxima, _ = forward(*case.inputs, want_positions=False)
    monkeypatch.setattr(triton_head, "GROUP_BYTES", group * 3 * 4 * 4)  # of 5 texts of 3 tokens, width 4, float32
    assert torch.equal(forward(*case.inputs, want_positions=False)[0], maxima)


def test_a_gradient_that_is_nan_is_not_taken_for_none():
    case = whole_number_case([4], 4, 3)
    maxima, positions = forward(case.hidden.abs(), case.weight.abs() + 1, None, case.offsets, True)
    gradient = torch.zeros_like(maxima)
    gradient[0, 1] = torch.nan
    d_hidden, d_weight, d_bias = backward(gradient, positions, case.hidden, case.weight)
    assert d_hidden[positions[0, 1]].isnan().all()
    assert d_weight.isnan().all(1).tolist() == d_bias.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=["no text", "an empty text", "two empty texts"])
def test_no_tokens_at_all_is_a_case_like_any_other(lengths):
    case = random_case(lengths, 4, 3)
    maxima, positions = forward(*case.inputs, want_positions=True)
    assert maxima.tolist() == [[0, 0, 0]] * len(lengths)
    d_hidden, d_weight, _ = backward(maxima, positions, case.hidden, case.weight)
    assert d_hidden.shape == (0, 4)
    assert (d_weight == 0).all()


def test_rows_after_the_last_text_belong_to_none():
    case = random_case([5, 12], 6, 9)
    padding = torch.full((20, 6), torch.nan)
    maxima, positions = forward(*case.inputs, want_positions=True)
    padded = forward(torch.cat([case.hidden, padding]), *case.inputs[1:], want_positions=True)
    assert torch.equal(maxima, padded[0])
    assert torch.equal(positions, padded[1])
    d_hidden, _, _ = backward((maxima > 0).float(), positions, torch.cat([case.hidden, padding]), case.weight)
    assert d_hidden[:17].any()
    assert not d_hidden[17:].any()


def test_layouts_in_memory_make_no_difference():
    case = random_case([5, 12], 6, 9)
    hidden, weight = case.hidden.t().contiguous().t(), torch.cat([case.weight, case.weight], 1)[:, :6]
    bias, offsets = case.bias.repeat_interleave(2)[::2], case.offsets.long()
    assert not any(t.is_contiguous() for t in (hidden, weight, bias))
    maxima, positions = forward(*case.inputs, want_positions=True)
    strided = forward(hidden, weight, bias, offsets, want_positions=True)
    assert torch.equal(maxima, strided[0])
    assert torch.equal(positions, strided[1])
    gradient = (maxima > 0).float()
    for one, other in zip(
        backward(gradient, positions, case.hidden, case.weight),
        backward(gradient.t().contiguous().t(), positions.t().contiguous().t(), hidden, weight),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_cells_sorted_in_parts_give_the_same_gradients(monkeypatch):
    case = random_case([5, 0, 12, 1, 7], 6, 9, shift=1.0)
    maxima, positions = forward(*case.inputs, want_positions=True)
    gradient = torch.randn(maxima.shape) * (maxima > 0)
    whole = backward(gradient, positions, case.hidden, case.weight)
    monkeypatch.setattr(triton_head, "SORTED_CELLS", 2 * 9 + 3)  # two texts at once
    for one, other in zip(whole, backward(gradient, positions, case.hidden, case.weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"weight": torch.ones(4, 3)}, r"hidden \[2, 2\] and weight \[4, 3\] must be"),
        ({"weight": torch.ones(4, 2).half()}, "must share float32, bfloat16 or float16"),
        ({"hidden": torch.ones(2, 2).double(), "weight": torch.ones(4, 2).double()}, "must share float32"),
        ({"bias": torch.ones(3)}, r"bias must be 4 floats, not \[3\]"),
        ({"bias": torch.ones(4).long()}, "bias must be 4 floats"),
        ({"offsets": torch.tensor([0.0, 2.0])}, r"offsets must be \[texts \+ 1\] of int32 or int64"),
        ({"offsets": torch.tensor([0, 2], device="meta")}, r"on one CUDA device, not on \['cpu', 'meta'\]"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    inputs = {"hidden": torch.ones(2, 2), "weight": torch.ones(4, 2), "bias": None, "offsets": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=said):
        forward(**inputs | change, want_positions=False)
