"""A trained inference-free model as the base model: training goes on from its weights, those of queries too."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import (
    Router,
    SparseAutoEncoder,
    SparseStaticEmbedding,
    SpladePooling,
    Transformer,
)
from transformers import AutoTokenizer

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense, write_modernbert, write_roberta
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


@pytest.fixture(scope="module")
def splade_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splade")
    save_model(build(folder, write_bert(folder / "bert"), "splade"), folder / "trained")
    return folder / "trained"


def stock(base, folder):
    """An inference-free model as stock sentence-transformers makes and saves one: nothing is silenced, or put in front."""
    document = Transformer(str(base), transformer_task="fill-mask")
    query = SparseStaticEmbedding(AutoTokenizer.from_pretrained(base), frozen=True)
    router = Router.for_query_document([query], [document, SpladePooling("max")])
    SparseEncoder(modules=[router], device="cpu").save_pretrained(str(folder))
    return folder


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("architecture", "overrides", "remedy"),
    [
        ("splade", ["model.head=fit"], "model.head=own"),
        (FREE, ["model.head=fit", "model.head_dims=30"], "model.head=own model.head_dims=400"),
        (
            FREE,
            ["model.vocabulary=texts", "model.vocabulary_min_count=2", "model.vocabulary_texts=[a.txt]"],
            "model.vocabulary=keep model.vocabulary_min_count=1 model.vocabulary_texts=[]",
        ),
    ],
)
def test_its_head_and_its_vocabulary_stay(tmp_path, trained_base, splade_base, architecture, overrides, remedy):
    base = trained_base if architecture == FREE else splade_base
    expected = f'model.base_model: {base} is a trained sparse model, with a head and a vocabulary. Add SET="{remedy}"'
    with pytest.raises(ConfigError) as refused:
        build(tmp_path, base, architecture, *overrides)
    assert refused.value.format_message() == expected
    build(tmp_path, base, architecture, *overrides, *remedy.split())  # and the remedy helps


@pytest.mark.parametrize("architecture", [FREE, "splade"])
@pytest.mark.parametrize(
    ("key", "trained"), [("pooling_strategy=sum", "max"), ("activation_function=log1p_relu", "relu")]
)
def test_it_is_pooled_as_it_was_trained(tmp_path, trained_base, splade_base, architecture, key, trained):
    base = trained_base if architecture == FREE else splade_base
    name, _, wanted = key.partition("=")
    expected = f"model.{name}: {base} was trained with {trained}, not with {wanted}. Add SET=model.{name}={trained}"
    with pytest.raises(ConfigError) as refused:
        build(tmp_path, base, architecture, f"model.{key}")
    assert refused.value.format_message() == expected


def test_one_saved_by_the_stock_library_is_mended(tmp_path):
    """Special tokens are active there in every text, and a query's first word has another dim than in a document."""
    base = stock(write_roberta(tmp_path / "roberta"), tmp_path / "stock")
    before, model = SparseEncoder(str(base), device="cpu"), build(tmp_path, base, FREE)
    special = model.tokenizer.all_special_ids
    assert dense_vectors(before, DOCUMENTS)[:, special].gt(0).any()
    for side, texts in (("query", [*QUERIES, "\U0001f9ff"]), ("document", DOCUMENTS)):
        assert not dense_vectors(model, texts, side)[:, special].any(), side
    within = model[0].sub_modules["document"][0].tokenizer(" fjord", add_special_tokens=False)["input_ids"]
    assert dense_vectors(model, ["fjord"], "query")[0].nonzero().flatten().tolist() == sorted(within)
    assert dense_vectors(before, ["fjord"], "query")[0].nonzero().flatten().tolist() != sorted(within)


@pytest.mark.parametrize("frozen", [True, False])
def test_query_weights_are_saved_as_frozen_only_if_the_config_freezes_them(tmp_path, frozen):
    base = stock(write_bert(tmp_path / "bert"), tmp_path / "stock")  # frozen
    settings = ["model.freeze_static_embedding=true", "training.query_learning_rate=null"] if frozen else []
    model = build(tmp_path, base, FREE, *settings)
    save_model(model, tmp_path / "saved")
    again = static_embedding(SparseEncoder(str(tmp_path / "saved"), device="cpu"))
    assert (again.frozen, again.weight.requires_grad) == (frozen, not frozen)


def other_queries(model):
    model[0].sub_modules["query"] = model[0].sub_modules["document"]


def autoencoder_behind(model):
    model.append(SparseAutoEncoder(input_dim=len(static_embedding(model).weight), hidden_dim=16, k=4))


@pytest.mark.parametrize("change", [other_queries, autoencoder_behind])
def test_a_router_of_other_modules_is_none(tmp_path, trained_base, change):
    model = SparseEncoder(str(trained_base), device="cpu")
    change(model)
    model.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is no inference-free SPLADE model"):
        build(tmp_path, tmp_path / "other", FREE)


def test_queries_and_documents_of_different_dimensions_are_refused(tmp_path):
    base = stock(write_modernbert(tmp_path / "padded"), tmp_path / "stock")  # 13 dims have no word
    with pytest.raises(
        ConfigError, match=r"the queries of .* have \d+ dimensions, its documents \d+, and its tokenizers"
    ):
        build(tmp_path, base, FREE)


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


def test_splade_is_trained_further_with_its_head(tmp_path, splade_base):
    assert json.loads((splade_base / "modules.json").read_text())[0]["path"] == ""
    assert_same_vectors(build(tmp_path, splade_base, "splade"), SparseEncoder(str(splade_base), device="cpu"))
