"""Compiled networks: few compilations, the numbers of the plain ones, and nothing of it in what is saved."""

import re
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import trainer.train
from tests.checkpoints import DOCUMENTS, write_bert, write_modernbert
from tests.standins import write_norbert
from tests.test_models import build_from, config_of, dense_vectors
from tests.test_remote_code import PINNED
from trainer.config import load_config
from trainer.data.buckets import bucket_lengths
from trainer.fused.model import fuse
from trainer.models.compiled import compile_networks
from trainer.run import Run

LENGTHS = bucket_lengths(32, 3)


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


def models(tmp_path, family):
    """One to compile and one to compare with, without dropout."""
    if family == "norbert4":
        base, pinned = write_norbert(tmp_path / "base", "norbert4", bias=0.0), PINNED
    else:
        base, pinned = {"bert": write_bert, "modernbert": write_modernbert}[family](tmp_path / "base"), ()
    pair = [build_from(config_of(tmp_path, base, "inference-free-splade", *pinned)) for _ in range(2)]
    for model in pair:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("dropout_prob", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        fuse(model)
    return pair


@pytest.mark.parametrize("family", ["bert", "modernbert", "norbert4"])
def test_there_is_at_most_one_compilation_per_length_whatever_the_number_of_texts(tmp_path, family):
    compiled, plain = models(tmp_path, family)
    counter = CompileCounter()
    compile_networks(compiled, LENGTHS, backend=counter)
    for _ in range(2):
        for length in LENGTHS:
            for texts in (DOCUMENTS, DOCUMENTS[:3], [*DOCUMENTS, *DOCUMENTS]):
                found, expected = vectors_of(compiled, texts, length), vectors_of(plain, texts, length)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert 1 <= counter.frame_count <= len(LENGTHS)


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


def test_a_training_compiles_the_lengths_of_its_batches_and_nothing_else(tiny, monkeypatch):
    counter, lines = CompileCounter(), []
    monkeypatch.setattr(trainer.train, "compile_networks", partial(compile_networks, backend=counter))
    loaded = load_config(tiny, ["training.torch_compile=true", "training.max_steps=4"])
    trainer.train.train(loaded, Run.create(loaded), say=lines.append)
    (says,) = (line for line in lines if line.startswith("compile "))
    lengths = [int(length) for length in re.findall(r"\d+", says)]
    assert 1 <= counter.frame_count <= len(lengths)
