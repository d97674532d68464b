"""Compiled networks: few compilations, the numbers of the plain ones, and nothing of it in what is saved."""

import re
from functools import partial

import pytest
import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import trainer.training.prepare
import trainer.training.train
from tests.checkpoints import DOCUMENTS, SHAPE, write_bert, write_modernbert
from tests.standins import write_norbert
from tests.test_attention import text_by_text
from tests.test_models import build_from, config_of, dense_vectors
from tests.test_remote_code import PINNED
from trainer.config import ConfigError, load_config
from trainer.encoding.fuse import fuse, transformers_of
from trainer.models.attention import VARLEN, set_attention
from trainer.models.build import set_dropout
from trainer.models.compiled import compile_networks, layers_of
from trainer.runs.run import Run

LENGTHS = [16, 24, 32]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vectors_of(model, texts, length):
    """In training mode, every text padded to this length."""
    transformer = model[0].sub_modules["document"][0]
    features = transformer.tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return model.train()(dict(features), task="document")["sentence_embedding"]


def models(tmp_path, family, device="cpu"):
    """One to compile and one to compare with, without dropout."""
    if family.startswith("norbert"):
        base, pinned = write_norbert(tmp_path / "base", family, bias=0.0), PINNED
    else:
        base, pinned = {"bert": write_bert, "modernbert": write_modernbert}[family](tmp_path / "base"), ()
    pair = [build_from(config_of(tmp_path, base, "inference-free-splade", *pinned)) for _ in range(2)]
    for model in pair:
        set_dropout(model, 0.0)
        fuse(model.to(device))
    return pair


@pytest.mark.parametrize(
    ("family", "kinds"),
    # ModernBERT's first layer has no norm before its attention; NorBERT4's others add the values of its first
    [
        ("bert", 1),
        ("norbert4", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("modernbert", 2), ("norbert3", 1))),
    ],
)
def test_a_length_is_compiled_once_for_all_layers_of_a_kind_whatever_the_number_of_texts(
    tmp_path, monkeypatch, family, kinds
):
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 5)
    compiled, plain = models(tmp_path, family)
    counter = CompileCounter()
    says = compile_networks(compiled, LENGTHS, backend=counter)
    for _ in range(2):
        for length in LENGTHS:
            for texts in (DOCUMENTS, DOCUMENTS[:3], [*DOCUMENTS, *DOCUMENTS]):
                found, expected = vectors_of(compiled, texts, length), vectors_of(plain, texts, length)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == kinds * len(LENGTHS)
    layers = len(layers_of(transformers_of(compiled)[0].model))
    assert layers == (2 if family.startswith("norbert") else 5)
    assert says == f"the networks' {layers} layers, for texts of 16, 24, 32 tokens"


@pytest.fixture
def flash_on_cpus(monkeypatch):
    """torch's flash attention for texts of varying length, which CPUs do not have, as one operation to the compiler."""

    @torch.library.custom_op("nordsparse_tests::flash", mutates_args=())
    def flash(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
    ) -> Tensor:
        assert longest == starts.diff().max()
        rows = (each.transpose(0, 1) for each in (query, key, value))
        return text_by_text(*rows, starts, scale, window).transpose(0, 1).contiguous()

    @flash.register_fake
    def _(query, *others):
        return torch.empty_like(query)

    def of_torch(query, key, value, starts, starts_k, longest, *others, scale, window_size_left, window_size_right):
        return [flash(query, key, value, starts, longest, scale, window_size_left)]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", of_torch)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("bert", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("modernbert", 3), ("norbert4", 2)))],
)
def test_one_graph_for_each_kind_of_layer_serves_packed_texts_of_any_number_and_length(
    tmp_path, monkeypatch, flash_on_cpus, family, kinds
):
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 5)
    compiled, plain = models(tmp_path, family)
    counter = CompileCounter()
    for model in (compiled, plain):
        set_attention(transformers_of(model)[0], VARLEN)
    says = compile_networks(compiled, None, backend=counter)
    long = " ".join(DOCUMENTS)
    for texts in (DOCUMENTS, DOCUMENTS[:3], [*DOCUMENTS, long], [long, "Å"], [*DOCUMENTS, *DOCUMENTS]):
        found, expected = (
            model.train()(model.preprocess(texts, task="document"), task="document")["sentence_embedding"]
            for model in (compiled, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == kinds
    assert says.endswith(" layers, for packed texts of any length")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
@pytest.mark.parametrize("family", ["bert", "modernbert", "norbert4"])
def test_on_a_gpu_compiled_layers_have_the_vectors_and_gradients_of_plain_ones(tmp_path, family, attention):
    compiled, plain = models(tmp_path, family, "cuda")
    if attention == VARLEN:
        set_attention(transformers_of(compiled)[0], VARLEN)
    compile_networks(compiled, None if attention == VARLEN else LENGTHS)

    def vectors_and_gradients(model, texts, half):
        model.train().zero_grad()
        features = batch_to_device(model.preprocess(texts, task="document"), "cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            found = model(features, task="document")["sentence_embedding"]
        (found * torch.linspace(-1, 1, found.numel(), device="cuda").view_as(found)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return found.detach().flatten(), gradients

    for texts in (DOCUMENTS, [*DOCUMENTS, " ".join(DOCUMENTS)]):
        exact = vectors_and_gradients(plain, texts, False)
        rounded = vectors_and_gradients(plain, texts, True)
        ours = vectors_and_gradients(compiled, texts, True)
        for one, other, right in zip(ours, rounded, exact, strict=True):
            assert (one - right).norm() <= 1.5 * (other - right).norm()


def test_layers_are_what_the_outermost_lists_hold():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    blocks = nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer()])])
    network = nn.ModuleDict({"blocks": blocks, "last": nn.ModuleList([Layer()]), "none": nn.ModuleList()})
    assert layers_of(network) == [*blocks[0], *blocks[1], network["last"][0]]
    with pytest.raises(ConfigError, match=r"Linear has no list of layers to compile. Set it to false"):
        layers_of(nn.Linear(2, 2))


def test_gradients_are_those_of_the_plain_network(tmp_path):
    compiled, plain = models(tmp_path, "bert")
    compile_networks(compiled, LENGTHS, backend="aot_eager")
    for model in (compiled, plain):
        vectors_of(model, DOCUMENTS, LENGTHS[-1]).square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in compiled.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_scoring_is_not_compiled_and_a_saved_model_knows_nothing_of_it(tmp_path):
    compiled, plain = models(tmp_path, "bert")
    counter = CompileCounter()
    compile_networks(compiled, LENGTHS, backend=counter)
    assert torch.equal(dense_vectors(compiled, DOCUMENTS), dense_vectors(plain, DOCUMENTS))
    assert counter.frame_count == 0
    for model in (compiled, plain):  # both: a tokenizer is saved with how it padded last
        vectors_of(model, DOCUMENTS, LENGTHS[0])
    assert counter.frame_count == 1
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for model, name in ((compiled, "compiled"), (plain, "plain")):
        model.save_pretrained(str(tmp_path / name))
    files = [file.relative_to(tmp_path / "plain") for file in (tmp_path / "plain").rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "compiled" / file).read_bytes(), file


@pytest.mark.slow
def test_a_training_compiles_the_lengths_of_its_batches_and_nothing_else(tiny, monkeypatch):
    counter, lines = CompileCounter(), []
    monkeypatch.setattr(trainer.training.prepare, "compile_networks", partial(compile_networks, backend=counter))
    loaded = load_config(tiny, ["training.torch_compile=true", "training.max_steps=4"])
    trainer.training.train.train(loaded, Run.create(loaded), echo=lines.append)
    (says,) = (line for line in lines if line.startswith("compile "))
    lengths = [int(length) for length in re.findall(r"\d+", says)]
    assert 1 <= counter.frame_count <= len(lengths)
