"""The fused head against the logits it does without: any shape, mask and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles import splade_head
from trainer.encoding import tiles
from trainer.encoding.fused_head import pack, splade_max

ACTIVATIONS = ["relu", "log1p_relu"]
MASKS = ["full", "right", "left", "gaps", "some empty", "all empty"]


def mask_of(kind, texts, length, generator):
    lengths = torch.randint(1, length + 1, (texts, 1), generator=generator)
    place = torch.arange(length)
    return {
        "full": torch.ones(texts, length),
        "right": (place < lengths),
        "left": (place >= length - lengths),
        "gaps": torch.rand(texts, length, generator=generator) > 0.4,
        "some empty": (place < lengths) & (torch.arange(texts) % 2 == 0)[:, None],
        "all empty": torch.zeros(texts, length),
    }[kind].long()


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    texts, length, width = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 7))
    words, shift = draw(st.integers(1, 700)), draw(st.sampled_from([-9.0, -1.0, 0.0, 1.0]))
    if draw(st.booleans()):  # small whole numbers: many tokens tie for a word's maximum
        hidden = torch.randint(-1, 2, (texts, length, width), generator=generator).double()
        weight = torch.randint(-1, 2, (words, width), generator=generator).double()
    else:
        hidden = torch.randn(texts, length, width, generator=generator, dtype=torch.float64)
        weight = torch.randn(words, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(words, generator=generator, dtype=torch.float64) + shift if draw(st.booleans()) else None
    return hidden, weight, bias, mask_of(draw(st.sampled_from(MASKS)), texts, length, generator)


def run(head, inputs, mask, activation, outer):
    inputs = [None if part is None else part.detach().requires_grad_() for part in inputs]
    values = head(*inputs, mask, activation)
    gradients = torch.autograd.grad(values, [part for part in inputs if part is not None], outer.to(values.dtype))
    return values.detach(), *gradients


def outer_of(texts, words):
    return torch.linspace(-1, 1, texts * words, dtype=torch.float64).reshape(texts, words)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), precision=st.sampled_from([torch.float32, torch.float64]))
def test_values_are_those_of_the_reference(activation, case, precision):
    hidden, weight, bias, mask = case
    expected = splade_head(hidden, weight, bias, mask, activation)
    inputs = [None if part is None else part.to(precision) for part in (hidden, weight, bias)]
    found = splade_max(*inputs, mask, activation)
    assert found.dtype == precision
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_gradients_are_those_of_autograd_through_the_reference(activation, case):
    hidden, weight, bias, mask = case
    logits = torch.einsum("tlw,vw->tlv", hidden, weight) + (0 if bias is None else bias)
    real = logits.masked_fill(mask[:, :, None] == 0, -torch.inf).sort(1, descending=True).values
    if real.shape[1] > 1 and ((real[:, 0] > 0) & (real[:, 0] == real[:, 1])).any():
        hidden = hidden + torch.linspace(0, 0.3, hidden.numel(), dtype=torch.float64).sin().reshape(hidden.shape)
    outer = outer_of(len(hidden), len(weight))
    expected = run(splade_head, (hidden, weight, bias), mask, activation, outer)
    found = run(splade_max, (hidden, weight, bias), mask, activation, outer)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_word_whose_maximum_two_tokens_share_passes_its_gradient_to_one_of_them():
    hidden = torch.tensor([[[1.0], [1.0], [0.5]]], requires_grad=True)
    splade_max(hidden, torch.ones(1, 1), None, torch.ones(1, 3)).sum().backward()
    assert hidden.grad.flatten().tolist() == [0.5, 0.0, 0.0]  # the slope of log1p at 1, once


def test_the_numbers_of_a_small_case_worked_out_by_hand():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 1.0], [-1.0, 0.5], [-1.0, -1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    values = splade_max(hidden, weight, bias, torch.tensor([[1, 1, 0]]))
    # logits of the two tokens: word 0: 1, 2; word 1: 0, 2; word 2: -0.5, -1.5. The third token is padding.
    torch.testing.assert_close(values, torch.tensor([[3.0, 3.0, 1.0]]).log())
    values.sum().backward()
    third = 1 / 3  # the slope at 2
    torch.testing.assert_close(
        hidden.grad, torch.tensor([[[0.0, 0.0], [third - third, third + third / 2], [0.0, 0.0]]])
    )
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 2 * third], [0.0, 2 * third], [0.0, 0.0]]))
    torch.testing.assert_close(bias.grad, torch.tensor([third, third, 0.0]))


@pytest.mark.parametrize("kind", MASKS)
def test_what_stands_in_padding_changes_nothing_even_infinities(kind):
    generator = torch.Generator().manual_seed(1)
    mask = mask_of(kind, 4, 6, generator)
    hidden, weight = torch.randn(4, 6, 8, generator=generator), torch.randn(300, 8, generator=generator)
    spoilt = hidden.masked_fill(mask[:, :, None] == 0, torch.nan)
    assert torch.equal(splade_max(spoilt, weight, None, mask), splade_max(hidden, weight, None, mask))


@pytest.mark.parametrize("bad,expected", [(torch.nan, torch.nan), (torch.inf, torch.inf)])
def test_a_token_that_is_no_number_shows_in_every_value_it_could_be_the_maximum_of(bad, expected):
    hidden, weight = torch.ones(2, 3, 1), torch.ones(5, 1)
    hidden[1, 2] = bad
    values = splade_max(hidden, weight, None, torch.ones(2, 3))
    torch.testing.assert_close(values[1], torch.full((5,), expected), equal_nan=True)
    assert torch.isfinite(values[0]).all()


def test_minus_infinity_is_a_word_that_is_not_active():
    bias = torch.tensor([0.0, -torch.inf])
    values = splade_max(torch.ones(1, 2, 1), torch.ones(2, 1), bias, torch.ones(1, 2))
    assert values.tolist() == [[pytest.approx(0.6931472), 0.0]]


@pytest.mark.parametrize("words", [1, 255, 256, 257, 5003])
@pytest.mark.parametrize("length", [1, 40, 300])
def test_vocabularies_and_texts_around_the_size_of_a_tile(words, length):
    generator = torch.Generator().manual_seed(words + length)
    mask = mask_of("right", 7, length, generator)
    inputs = [torch.randn(7, length, 16, generator=generator), torch.randn(words, 16, generator=generator) / 4, None]
    outer = outer_of(7, words)
    for ours, theirs in zip(
        run(splade_max, inputs, mask, "relu", outer), run(splade_head, inputs, mask, "relu", outer), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_inputs_that_do_not_lie_together_in_memory_give_the_same():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(6, 3, 8, generator=generator), torch.randn(8, 301, generator=generator)
    mask = torch.ones(3, 6)
    across = hidden.transpose(0, 1), weight.t(), None
    straight = hidden.transpose(0, 1).contiguous(), weight.t().contiguous(), None
    outer = outer_of(3, 301)
    for ours, theirs in zip(
        run(splade_max, across, mask, "relu", outer), run(splade_max, straight, mask, "relu", outer), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_is_as_exact_as_bf16_logits_are(activation):
    generator = torch.Generator().manual_seed(4)
    mask = mask_of("right", 4, 20, generator)
    inputs = [
        torch.randn(4, 20, 32, generator=generator),
        torch.randn(500, 32, generator=generator) / 6,
        torch.zeros(500),
    ]
    outer = outer_of(4, 500)
    exact = run(splade_head, inputs, mask, activation, outer)
    half = [part.bfloat16() for part in inputs]
    ours, stock = run(splade_max, half, mask, activation, outer), run(splade_head, half, mask, activation, outer)
    assert ours[0].dtype == torch.float32
    for found, theirs, wanted in zip(ours, stock, exact, strict=True):
        # no further from float32 than what the library gets in bf16, and a little
        assert (found.float() - wanted).norm() <= 1.1 * (theirs.float() - wanted).norm() + 1e-3


def test_under_autocast_the_product_is_made_in_bf16_and_the_gradients_come_back_in_float32():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(300, 8, generator=generator, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = splade_max(hidden, weight, None, torch.ones(2, 5))
    assert torch.equal(values, splade_max(hidden.bfloat16(), weight.bfloat16(), None, torch.ones(2, 5)))
    values.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_deterministic_mode_is_no_obstacle_and_two_runs_are_bit_equal():
    generator = torch.Generator().manual_seed(6)
    inputs = [torch.randn(8, 30, 16, generator=generator), torch.randn(2000, 16, generator=generator), None]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(splade_max, inputs, torch.ones(8, 30), "relu", outer_of(8, 2000)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_devices_without_an_embedding_bag_sum_the_same_gradients(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    source, rows = torch.randn(50, 8, generator=generator), torch.randint(50, (400,), generator=generator)
    values, targets = (
        torch.randn(400, generator=generator),
        torch.randint(30, (400,), generator=generator).sort().values,
    )
    bag = tiles._sum_rows(source, rows, values, targets, 30)
    monkeypatch.setattr(tiles, "CHUNK", 37)
    added = tiles._sum_rows(source.double(), rows, values.double(), targets, 30)  # float64 takes the other way
    torch.testing.assert_close(bag, added.float())


def test_rows_of_padding_are_not_computed():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])
    rows, offsets = pack(mask)
    assert rows.tolist() == [0, 1, 9, 11]
    assert offsets.tolist() == [0, 2, 2, 4]
    assert pack(torch.ones(2, 3))[0] is None


def test_no_tensor_of_texts_tokens_and_words_is_made():
    texts, length, words = 8, 64, 20_000
    inputs = [torch.randn(texts, length, 8), torch.randn(words, 8), torch.zeros(words)]
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            parts = found if isinstance(found, tuple) else (found,)
            sizes.extend(part.untyped_storage().nbytes() for part in parts if torch.is_tensor(part))
            return found

    for head, most in ((splade_head, None), (splade_max, tiles.TILE_BYTES + 64 * 4 * words)):
        sizes.clear()
        with Sizes():
            run(head, inputs, torch.ones(texts, length), "relu", outer_of(texts, words))
        assert max(sizes) <= most if most else max(sizes) >= 4 * texts * length * words
