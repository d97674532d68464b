"""The fused head in whole models: the vectors, gradients and files of the library's own head."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_modernbert, write_roberta
from tests.standins import SHAPES, write_norbert
from tests.test_models import build, build_from, config_of, dense_vectors
from tests.test_remote_code import PINNED
from trainer.encoding.fuse import fuse, transformers_of, unfuse

FUSED = "fused, without logits"
PLAIN = {"bert": write_bert, "roberta": write_roberta, "modernbert": write_modernbert}
ARCHITECTURES = ("splade", "inference-free-splade")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {name: write(tmp_path_factory.mktemp(name) / "base") for name, write in PLAIN.items()}
    # a bias near 0: about half of the words are active, so a logit in a wrong place is seen
    return found | {shape: write_norbert(tmp_path_factory.mktemp(shape), shape, bias=0.0) for shape in SHAPES}


def model_of(folder, bases, family, architecture="splade", *overrides):
    pinned = () if family in PLAIN else PINNED
    return build_from(config_of(folder, bases[family], architecture, *pinned, *overrides))


def gradients(model, texts):
    """What a step would see, without dropout: the vectors' weighted sum, and every parameter's gradient."""
    for module in model.eval().modules():
        if isinstance(module, SpladePooling):
            module.train()  # else the library's works in place, and has no gradients
    model.zero_grad()
    features = model.preprocess(texts, task="document") if hasattr(model[0], "sub_modules") else model.preprocess(texts)
    vectors = model(features)["sentence_embedding"]
    weights = torch.linspace(-1, 1, vectors.numel()).reshape(vectors.shape)
    (vectors * weights).sum().backward()
    return vectors.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [*PLAIN, *SHAPES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_vectors_and_gradients_are_those_of_the_librarys_head(tmp_path, bases, family, architecture, activation):
    model = model_of(tmp_path, bases, family, architecture, f"model.activation_function={activation}")
    texts = [*DOCUMENTS, "og"]  # of unequal length, so that some are padded
    stock_vectors, stock_gradients = gradients(model, texts)
    assert 0.01 < (stock_vectors > 0).float().mean() < 0.99
    assert fuse(model) == FUSED
    vectors, found = gradients(model, texts)
    torch.testing.assert_close(vectors, stock_vectors, rtol=1e-4, atol=1e-5)
    assert found.keys() == stock_gradients.keys()
    for name, gradient in found.items():
        stock = stock_gradients[name]
        least = max(1e-5, 1e-6 * stock.abs().max().item())  # both are 1e-5 of their largest from float64's gradients
        torch.testing.assert_close(gradient, stock, rtol=1e-3, atol=least, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["bert", "norbert3", "norbert4"])
def test_a_fused_model_is_saved_as_it_would_be_without(tmp_path, bases, family):
    model = model_of(tmp_path, bases, family)
    model.encode_document(DOCUMENTS[:1])  # the pooling learns its dimension from its first text
    model.save_pretrained(str(tmp_path / "stock"))
    fuse(model)
    model.save_pretrained(str(tmp_path / "fused"))
    files = {file.relative_to(tmp_path / "stock") for file in (tmp_path / "stock").rglob("*") if file.is_file()}
    assert files == {file.relative_to(tmp_path / "fused") for file in (tmp_path / "fused").rglob("*") if file.is_file()}
    for file in files:
        assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes(), file


def test_taken_out_again_the_model_is_the_librarys_to_the_bit(tmp_path, bases):
    model = model_of(tmp_path, bases, "bert")
    before = dense_vectors(model, DOCUMENTS)
    fuse(model)
    assert "forward" in vars(model[1])
    unfuse(model)
    assert torch.equal(dense_vectors(model, DOCUMENTS), before)
    assert "forward" not in vars(model[1])


def test_a_copy_and_a_pickle_of_a_fused_model_compute_with_their_own_weights(tmp_path, bases):
    model = model_of(tmp_path, bases, "bert")
    fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - its own
        torch.testing.assert_close(dense_vectors(other, DOCUMENTS), dense_vectors(model, DOCUMENTS))
        with torch.no_grad():
            other[0].model.get_output_embeddings().bias.fill_(-1e3)
        assert dense_vectors(other, DOCUMENTS).max() == 0
        assert dense_vectors(model, DOCUMENTS).max() > 0


def test_two_threads_that_encode_with_one_model_each_get_the_vectors_of_their_own_texts(tmp_path, bases):
    """One thread's network runs between the other's network and pooling."""
    model = model_of(tmp_path, bases, "bert")
    fuse(model)
    texts = (DOCUMENTS[:1], DOCUMENTS[1:2])
    alone = [dense_vectors(model, text) for text in texts]
    assert not torch.equal(*alone)
    network, pooling = (torch.no_grad()(module) for module in (model[0], model[1]))
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        between = [
            thread.submit(network, model.preprocess(text)).result()
            for thread, text in zip((first, second), texts, strict=True)
        ]
        found = [
            thread.submit(pooling, features).result()["sentence_embedding"]
            for thread, features in zip((first, second), between, strict=True)
        ]
    for vectors, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(vectors, expected)


# ---------------------------------------------------------------------------------- models that keep their own head
def test_sum_pooling_keeps_the_librarys_head_and_says_why(tmp_path, bases):
    model = model_of(tmp_path, bases, "bert", "splade", "model.pooling_strategy=sum")
    before = dense_vectors(model, DOCUMENTS)
    assert fuse(model) == "as the library computes it: pooling is sum, not max"
    assert torch.equal(dense_vectors(model, DOCUMENTS), before)


def test_a_model_that_does_something_else_with_its_logits_keeps_its_head(tmp_path, bases):
    model = model_of(tmp_path, bases, "bert")
    transformer = model[0].model
    forward = transformer.forward

    def capped(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found

    transformer.forward = capped
    assert fuse(model).startswith("as the library computes it: the model changes its logits after the vocabulary layer")
    assert "forward" not in vars(model[1])


def test_a_vocabulary_layer_of_an_unknown_class_keeps_its_head(tmp_path, bases):
    class Odd(torch.nn.Linear):
        pass

    model = model_of(tmp_path, bases, "bert")
    model[0].model.get_output_embeddings().__class__ = Odd
    assert fuse(model) == "as the library computes it: the vocabulary layer is a Odd"


def test_a_csr_model_has_no_head_to_fuse(tmp_path):
    from tests.checkpoints import write_dense

    model = build(tmp_path, write_dense(tmp_path / "dense"), "csr")
    assert fuse(model) == "none"


def test_on_its_way_to_a_gpu_a_model_keeps_torchs_products(tmp_path, bases):
    model = model_of(tmp_path, bases, "bert")
    fuse(model, "cuda")
    layers = transformers_of(model)[0].model.base_model.modules()
    assert [layer for layer in layers if "forward" in vars(layer)] == []


def test_queries_of_a_shared_transformer_go_through_the_fused_head_too(tmp_path, bases):
    model = model_of(tmp_path, bases, "bert")
    before = dense_vectors(model, QUERIES, "query")
    fuse(model)
    torch.testing.assert_close(dense_vectors(model, QUERIES, "query"), before, rtol=1e-4, atol=1e-5)


def test_a_stock_reload_of_what_a_fused_model_saved_gives_its_vectors(tmp_path, bases):
    model = model_of(tmp_path, bases, "roberta", "inference-free-splade")
    fuse(model)
    model.save_pretrained(str(tmp_path / "saved"))
    stock = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(stock[0].sub_modules["document"][1]) is SpladePooling
    torch.testing.assert_close(dense_vectors(stock, DOCUMENTS), dense_vectors(model, DOCUMENTS), rtol=1e-4, atol=1e-5)
