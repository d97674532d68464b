"""Linear layers through oneDNN: the numbers of torch's own."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation

from tests.standins.norbert4.modeling_gptbert import CastedLinearIn, MultiCastedLinearOrthoIn
from trainer.encoding import products
from trainer.encoding.products import use_onednn, use_torch


def outputs_and_gradients(layer, inputs):
    inputs = inputs.detach().requires_grad_()
    layer.zero_grad()
    found = layer(inputs)
    (found * torch.linspace(-1, 1, found.numel()).reshape(found.shape)).sum().backward()
    return found.detach(), inputs.grad, *(parameter.grad.clone() for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 7), (0, 7), (2, 40, 7)])
def test_values_and_gradients_are_those_of_float64(bias, shape):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(7, 13, bias=bias), torch.randn(shape)
    reference = nn.Linear(7, 13, bias=bias).double()
    reference.load_state_dict(layer.state_dict())
    exact = outputs_and_gradients(reference, inputs.double())
    use_onednn(layer)
    for ours, theirs in zip(outputs_and_gradients(layer, inputs), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_only_what_is_trained_gets_a_gradient():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    use_onednn(layer)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.tolist() == [2.0] * 4


def test_other_precisions_and_autocast_are_left_to_torch(monkeypatch):
    layer, inputs = nn.Linear(4, 4), torch.randn(3, 4)
    plain = layer(inputs)
    use_onednn(layer)
    monkeypatch.setattr(products._Linear, "apply", lambda *_: pytest.fail("went through oneDNN"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    assert layer.double()(inputs.double()).dtype == torch.float64
    layer.float()
    use_torch(layer)
    assert torch.equal(layer(inputs), plain)


def written(layer):
    """NorBERT4's layers leave it to a checkpoint to give their weights a value."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind,rows", [(CastedLinearIn, 13), (MultiCastedLinearOrthoIn, [5, 8])])
def test_norbert4s_layers_go_through_onednn_with_the_values_and_gradients_of_float64(monkeypatch, kind, rows, bias):
    torch.manual_seed(0)
    layer, inputs = written(kind(7, rows, bias)), torch.randn(2, 3, 7)
    exact = outputs_and_gradients(copy.deepcopy(layer).double(), inputs.double())
    use_onednn(layer)
    went = []
    monkeypatch.setattr(products, "product", lambda *parts, own=products.product: went.append(parts) or own(*parts))
    for ours, theirs in zip(outputs_and_gradients(layer, inputs), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert len(went) == 3 * products.ONEDNN
    use_torch(layer)
    assert "forward" not in vars(layer)


def test_a_layer_of_that_name_which_computes_something_else_is_left_alone(monkeypatch):
    use_onednn(layer := CastedLinearIn(7, 13, bias=True))
    assert "forward" in vars(layer)
    monkeypatch.setattr(
        CastedLinearIn, "forward", lambda self, x: 1.1 * nn.functional.linear(x, self.weight, self.bias)
    )
    use_onednn(layer := CastedLinearIn(7, 13, bias=True))
    assert "forward" not in vars(layer)


class Feed(nn.Module):
    """A BERT layer's second half; `between` is what happens to the GELU's values on their way to the second product."""

    def __init__(self, between=lambda values: values):
        super().__init__()
        self.up, self.activation, self.down, self.between = (
            nn.Linear(7, 28),
            GELUActivation(),
            nn.Linear(28, 7),
            between,
        )

    def forward(self, inputs):
        return self.down(self.between(self.activation(self.up(inputs))))


def kept_bytes(network, inputs):
    """What a forward pass keeps for its backward pass, its inputs and weights not counted."""
    known = {each.data_ptr() for each in (inputs, *network.parameters())}
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: found.setdefault(each.data_ptr(), each), lambda each: each
    ):
        network(inputs)
    return sum(each.nbytes for place, each in found.items() if place not in known)


@pytest.mark.parametrize("kind,rows", [(CastedLinearIn, 13), (MultiCastedLinearOrthoIn, [5, 8])])
def test_norbert4s_layers_keep_nothing_but_their_inputs(kind, rows):
    layer, inputs = written(kind(7, rows, bias=False)), torch.ones(2, 7, requires_grad=True)
    assert kept_bytes(layer, inputs) >= 4 * 7 * 13  # the weights times their scale
    use_onednn(layer)
    assert kept_bytes(layer, inputs) == 0 or not products.ONEDNN


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), GELUActivation()])
def test_the_values_of_a_gelu_are_not_kept_and_gradients_are_the_same(activation):
    torch.manual_seed(0)
    network, inputs = Feed(), torch.randn(5, 7)
    network.activation = activation
    wide = 5 * 28 * 4
    assert kept_bytes(network, inputs) == 2 * wide  # before and after the GELU
    exact = outputs_and_gradients(network, inputs)
    use_onednn(network)
    assert kept_bytes(network, inputs) == wide
    for ours, theirs in zip(outputs_and_gradients(network, inputs), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    use_torch(network)
    assert kept_bytes(network, inputs) == 2 * wide


@pytest.mark.parametrize(
    "between", [lambda values: 2 * values, lambda values: values.mul_(2), lambda values: values[..., :] + 0]
)
def test_values_that_are_changed_on_their_way_are_kept_as_they_are(between):
    torch.manual_seed(0)
    network, inputs = Feed(between), torch.randn(5, 7)
    exact = outputs_and_gradients(network, inputs)
    use_onednn(network)
    for ours, theirs in zip(outputs_and_gradients(network, inputs), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layers_of_another_class_keep_their_own_computation():
    class Scaled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    network = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4))
    use_onednn(network)
    assert ["forward" in vars(layer) for layer in network] == [True, False]
