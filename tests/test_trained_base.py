"""A trained inference-free model as the base model: training goes on from its weights, those of queries too."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense
from tests.conftest import run_trainer
from tests.standins import COMMIT, write_norbert
from tests.test_models import build, dense_vectors
from tests.test_training import weights
from trainer.config import ConfigError
from trainer.models.build import save_model, static_embedding

FREE = "inference-free-splade"


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory):
    """An inference-free model whose query weights are no IDF."""
    folder = tmp_path_factory.mktemp("base")
    return save(build(folder, write_bert(folder / "bert"), FREE), folder / "trained")


def save(model, folder):
    with torch.no_grad():
        static_embedding(model).weight.mul_(0.5).add_(0.25)
    save_model(model, folder)
    return folder


def assert_same_vectors(one, two):
    for side, texts in (("query", QUERIES), ("document", DOCUMENTS)):
        assert torch.equal(dense_vectors(one, texts, side), dense_vectors(two, texts, side)), side


def test_it_starts_with_the_very_vectors_it_was_saved_with(tmp_path, trained_base):
    assert_same_vectors(build(tmp_path, trained_base, FREE), SparseEncoder(str(trained_base), device="cpu"))


def test_weights_saved_in_16_bits_are_trained_in_32(tmp_path, trained_base):
    half = SparseEncoder(str(trained_base), device="cpu").to(torch.bfloat16)
    half.save_pretrained(str(tmp_path / "half"))
    model = build(tmp_path, tmp_path / "half", FREE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("shape", ["norbert3", "norbert4"])
def test_one_with_code_of_its_own_too(tmp_path, shape):
    pinned = ("model.trust_remote_code=true", f"model.revision={COMMIT}")
    first = build(tmp_path, write_norbert(tmp_path / "base", shape), FREE, *pinned)
    trained = save(first, tmp_path / "trained")
    again = build(tmp_path, trained, FREE, *pinned)
    assert_same_vectors(again, first)
    save_model(again, tmp_path / "again")
    assert_same_vectors(SparseEncoder(str(tmp_path / "again"), device="cpu", trust_remote_code=True), first)
    with pytest.raises(ConfigError, match="comes with Python code of its own"):
        build(tmp_path, trained, FREE)


def test_a_run_goes_on_from_it_and_the_plan_says_so(trained):
    """Without a rate, `train` gives back the base's weights; with one, they have moved."""
    still = ("--set", "training.learning_rate=1e-30", "--set", "training.query_learning_rate=1e-30")
    base = ("--set", "model.base_model=models/tiny/final", "--set", "model.from_scratch=null")
    before = weights(trained / "models/tiny/final")
    for name, arguments in (("still", still), ("moved", ())):
        result = run_trainer(trained, "train", "tiny.yaml", "--name", name, *base, *arguments)
        assert result.returncode == 0, result.stderr
        assert "queries   with the weights of the base model (model.query_init is not used)" in result.stdout
        after = weights(trained / f"models/{name}/final")
        assert after.keys() == before.keys()
        same = [np.allclose(after[tensor], before[tensor], atol=1e-7) for tensor in before]
        assert all(same) == (name == "still")


@pytest.mark.parametrize("key", ["model.head=fit", "model.vocabulary=texts"])
def test_its_head_and_its_vocabulary_stay(tmp_path, trained_base, key):
    name = key.partition("=")[0]
    with pytest.raises(ConfigError, match=rf'{name}: .* is a trained sparse model.*Add SET="{name}='):
        build(tmp_path, trained_base, FREE, key)


@pytest.mark.parametrize(
    ("key", "trained"), [("pooling_strategy=sum", "max"), ("activation_function=log1p_relu", "relu")]
)
def test_it_is_pooled_as_it_was_trained(tmp_path, trained_base, key, trained):
    name, _, wanted = key.partition("=")
    expected = (
        f"model.{name}: {trained_base} was trained with {trained}, not with {wanted}. Add SET=model.{name}={trained}"
    )
    with pytest.raises(ConfigError) as refused:
        build(tmp_path, trained_base, FREE, f"model.{key}")
    assert refused.value.format_message() == expected


def test_a_router_of_other_modules_is_none(tmp_path, trained_base):
    model = SparseEncoder(str(trained_base), device="cpu")
    model[0].sub_modules["query"] = model[0].sub_modules["document"]
    model.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is no inference-free SPLADE model"):
        build(tmp_path, tmp_path / "other", FREE)


def test_splade_and_csr_refuse_it(tmp_path, trained_base):
    with pytest.raises(ConfigError, match=r"Set model\.architecture: inference-free-splade, or name the masked"):
        build(tmp_path, trained_base, "splade")
    with pytest.raises(ConfigError, match="is a trained sparse model, and csr needs a dense one"):
        build(tmp_path, trained_base, "csr")


@pytest.mark.parametrize("architecture", ["splade", "csr"])
def test_csr_refuses_models_of_the_other_architectures_and_its_own(tmp_path, architecture):
    base = {"splade": write_bert, "csr": write_dense}[architecture](tmp_path / "base")
    save_model(build(tmp_path, base, architecture), tmp_path / "trained")
    with pytest.raises(ConfigError, match="is a trained sparse model, and csr needs a dense one"):
        build(tmp_path, tmp_path / "trained", "csr")


def test_splade_is_trained_further_with_its_head(tmp_path):
    first = build(tmp_path, write_bert(tmp_path / "bert"), "splade")
    save_model(first, tmp_path / "trained")
    assert json.loads((tmp_path / "trained/modules.json").read_text())[0]["path"] == ""
    assert_same_vectors(build(tmp_path, tmp_path / "trained", "splade"), first)
