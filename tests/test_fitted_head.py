"""A head fitted to an encoder without one: own words are active, the dims are as asked for, the model is a stock one."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
)
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from tests.checkpoints import DOCUMENTS, SHAPE, write_bert, write_dense, write_modernbert, write_roberta
from tests.standins import COMMIT, write_norbert
from tests.test_models import config_of, dense_vectors
from trainer.config import ConfigError
from trainer.encoding.fuse import fuse, transformers_of
from trainer.encoding.stock import encode_both
from trainer.models import fitted_head as module
from trainer.models.build import build_model, fetch_base_model, save_model, static_embedding
from trainer.models.fitted_head import head_fit
from trainer.publish.publish import encode_in_a_fresh_process, largest_difference
from trainer.training.describe import head_lines

WORDS = " ".join(DOCUMENTS).replace(".", "").replace(",", "").split()
TEXTS = [" ".join(random.Random(number).sample(WORDS, 12)) for number in range(80)]
HEAD = ("model.head=fit", "model.head_dims=30")


def bare(folder, whole):
    """The encoder of a masked language model, saved without its head."""
    quiet(AutoModelForMaskedLM.from_pretrained(whole).base_model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def quiet(network):
    """Random layers whose states still say which token they are of, as those of a trained encoder do."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2 and "embeddings" not in name:
                weight.mul_(0.2)
    return network


def small(kind, config, **shape):
    """A family whose settings have names of their own, with BERT's tokenizer."""

    def write(folder):
        tokenizer = AutoTokenizer.from_pretrained(write_bert(folder / "words"))
        torch.manual_seed(1)
        network = kind(config(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=0, **shape))
        quiet(network).save_pretrained(folder / "encoder")
        tokenizer.save_pretrained(folder / "encoder")
        return folder / "encoder"

    return write


ENCODERS = {
    "bert": lambda folder: bare(folder / "encoder", write_bert(folder / "whole")),
    "roberta": lambda folder: bare(folder / "encoder", write_roberta(folder / "whole")),
    "modernbert": lambda folder: bare(folder / "encoder", write_modernbert(folder / "whole")),
    "distilbert": small(
        DistilBertModel, DistilBertConfig, dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.3
    ),
    "electra, narrower words": small(ElectraModel, ElectraConfig, embedding_size=16, **SHAPE),
    "mpnet": small(MPNetModel, MPNetConfig, **SHAPE),
    "a sentence-transformers model": write_dense,
}


def build(folder, base, *overrides, texts=TEXTS, architecture="inference-free-splade"):
    config = config_of(folder, base, architecture, *HEAD, *overrides)
    return build_model(config, fetch_base_model(config), texts[:4], texts, "cpu")


def active_dims(model, texts=TEXTS):
    return (dense_vectors(model, texts) > 0).sum(1).float().mean().item()


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_without_a_head_becomes_a_sparse_one_that_stock_libraries_open(tmp_path, family):
    model = build(tmp_path, ENCODERS[family](tmp_path))
    fit = head_fit(model)
    assert fit.own > 0.1  # these encoders are random; by chance it would be 0.003
    assert fit.own_active > 0.4  # and this 0.08
    assert fit.active_dims == pytest.approx(30, abs=0.5)
    assert active_dims(model) == pytest.approx(30, rel=0.25)
    save_model(model, tmp_path / "saved")
    again = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(dense_vectors(again, TEXTS), dense_vectors(model, TEXTS))
    fuse(model)
    assert torch.allclose(dense_vectors(model, TEXTS), dense_vectors(again, TEXTS), atol=1e-4)


@pytest.mark.slow
def test_a_saved_model_gives_the_same_vectors_in_a_fresh_process(tmp_path):
    model = build(tmp_path, ENCODERS["bert"](tmp_path), architecture="splade")
    save_model(model, tmp_path / "saved")
    queries = documents = TEXTS[:3]
    there = encode_in_a_fresh_process(tmp_path / "saved", {"query": queries, "document": documents})
    assert largest_difference(encode_both(model, {"query": queries, "document": documents}), there) == 0


def test_the_projection_is_the_weighted_ridge_regression(tmp_path, monkeypatch):
    """Against numpy's least squares, with the ridge as rows of data."""
    monkeypatch.setattr(module, "RIDGES", (1e-2,))
    generator = torch.Generator().manual_seed(0)
    states, words = torch.randn(200, 6, generator=generator), torch.randn(9, 5, generator=generator)
    tokens = torch.randint(0, 9, (200,), generator=generator)
    _, found = module._best_projection(states, tokens, words, (states, tokens), True)
    inputs = np.hstack([states.numpy(), np.ones((200, 1))]).astype(np.float64)
    weights = np.bincount(tokens, minlength=9)[tokens].astype(np.float64) ** -0.5
    ridge = 1e-2 * np.mean(np.sum(weights[:, None] * inputs**2, axis=0))
    rows = np.vstack([np.sqrt(weights)[:, None] * inputs, np.sqrt(ridge) * np.eye(7)])
    targets = np.vstack([np.sqrt(weights)[:, None] * words.numpy()[tokens], np.zeros((7, 5))])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
    expected *= module.PROJECTED / np.sqrt(np.mean((inputs @ expected) ** 2))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_a_word_is_cut_off_by_its_own_tokens_and_by_the_mean_of_all(tmp_path):
    """Two words: 3 tokens of logit 1, none of the other; 3 tokens of the mean are added to each."""
    projected, words = torch.tensor([[1.0, 0.0]] * 3), torch.eye(2)
    level = module._own_level(projected, torch.zeros(3, dtype=torch.long), words)
    assert level.tolist() == pytest.approx([1.0, 1.0])
    level = module._own_level(torch.tensor([[1.0, 0.0], [0.0, 0.4]]), torch.tensor([0, 1]), words)
    assert level.tolist() == pytest.approx([(1 + 3 * 0.7) / 4, (0.4 + 3 * 0.7) / 4])


def test_the_same_texts_give_the_same_head(tmp_path):
    base = ENCODERS["bert"](tmp_path)
    one, two = build(tmp_path, base), build(tmp_path, base)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_documents_start_at_the_dims_that_are_asked_for(tmp_path):
    base = ENCODERS["bert"](tmp_path)
    few, many = build(tmp_path, base, "model.head_dims=15"), build(tmp_path, base, "model.head_dims=60")
    assert active_dims(few) == pytest.approx(15, rel=0.25)
    assert active_dims(many) == pytest.approx(60, rel=0.25)


def test_prompts_stand_in_front_of_the_texts_that_are_fitted_to(tmp_path, monkeypatch):
    read = []
    fit = module.Head.states
    monkeypatch.setattr(module.Head, "states", lambda head, texts: read.extend(texts) or fit(head, texts))
    build(tmp_path, ENCODERS["bert"](tmp_path), 'model.prompts.document="et: "')
    assert read
    assert all(text.startswith("et: ") for text in read)


def test_a_cut_vocabulary_is_fitted_to(tmp_path):
    model = build(tmp_path, ENCODERS["roberta"](tmp_path), "model.vocabulary=texts")
    decoder = transformers_of(model)[0].model.get_output_embeddings()
    assert decoder.out_features == len(model.tokenizer) == len(decoder.bias) < 400
    assert head_fit(model).own > 0.1


def test_norbert4_has_a_head_of_its_own_and_can_be_given_a_fitted_one(tmp_path):
    base = write_norbert(tmp_path / "norbert", "norbert4")
    trusted = ("model.trust_remote_code=true", f"model.revision={COMMIT}")
    model = build(tmp_path, base, *trusted)
    assert head_fit(model).own > 0.1
    assert active_dims(model) == pytest.approx(30, rel=0.3)


def test_the_plan_says_what_was_fitted(tmp_path):
    first, second = head_lines(build(tmp_path, ENCODERS["bert"](tmp_path)))
    assert first.startswith("head      fitted to ")
    assert " tokens of 80 texts. Of texts that were held out:" in first
    assert "30 active dims, " in second


# ---------------------------------------------------------------------------------- refused before training
def test_an_encoder_without_a_head_is_told_of_fit(tmp_path):
    base = ENCODERS["bert"](tmp_path)
    config = config_of(tmp_path, base, "splade")
    with pytest.raises(ConfigError, match=r"Name a model .* with its head, or set model.head=fit to fit one"):
        build_model(config, fetch_base_model(config), TEXTS[:4], TEXTS, "cpu")


def test_an_encoder_that_lacks_a_layer_is_refused_with_fit_too(tmp_path):
    base = ENCODERS["bert"](tmp_path)
    network = AutoModel.from_pretrained(base)
    weights = {name: value for name, value in network.state_dict().items() if "layer.1.output.dense" not in name}
    network.save_pretrained(base, state_dict=weights)
    with pytest.raises(ConfigError, match=r"lacks weights of .*layer\.1\.output\.dense") as caught:
        build(tmp_path, base)
    assert "model.head=fit" not in caught.value.format_message()


def test_too_few_texts_are_refused_with_the_number_that_is_needed(tmp_path):
    base = ENCODERS["bert"](tmp_path)
    with pytest.raises(ConfigError, match=r"model.head: fit needs 128 tokens of text, 4 for each of the 32 dimensions"):
        build(tmp_path, base, texts=TEXTS[:4])


@pytest.mark.parametrize("dims", [100_000, 157])
def test_as_many_dims_as_there_are_words_are_refused(tmp_path, dims):
    with pytest.raises(
        ConfigError, match=rf"model.head_dims: {dims:,} is not fewer than the \d+ words of .*\. Lower it"
    ):
        build(tmp_path, ENCODERS["bert"](tmp_path), f"model.head_dims={dims}")


def test_dims_so_few_that_no_own_word_is_active_are_refused():
    words, hidden = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[[2**0.5, 0.0]]])
    batch = hidden, torch.tensor([[0]]), torch.tensor([[True]])
    network = SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[]))
    head = SimpleNamespace(transformer=network, projected=lambda _: [batch])
    with pytest.raises(ConfigError, match=r"model.head_dims: at 1 active dims, no word of a text is active in its own"):
        module._set_decoder(head, words, torch.zeros(3), [""], 1)


def test_states_that_are_all_alike_are_refused(tmp_path):
    base = ENCODERS["bert"](tmp_path)
    network = AutoModel.from_pretrained(base)
    last = network.encoder.layer[-1].output.LayerNorm
    torch.nn.init.zeros_(last.weight)
    network.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"model.head: the tokens of .* cannot be told apart by their last hidden"):
        build(tmp_path, base)


def test_a_head_with_a_further_layer_is_refused(tmp_path, monkeypatch):
    """The layer would keep its random numbers."""
    init = BertPredictionHeadTransform.__init__

    def with_another(head, config):
        init(head, config)
        head.dense = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))

    monkeypatch.setattr(BertPredictionHeadTransform, "__init__", with_another)
    with pytest.raises(ConfigError, match=r"norm in front of a decoder with a bias, and nothing else"):
        build(tmp_path, ENCODERS["bert"](tmp_path))


def test_an_activation_that_is_no_line_is_refused(tmp_path):
    base = write_bert(tmp_path / "relu")
    settings = (base / "config.json").read_text()
    (base / "config.json").write_text(settings.replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    with pytest.raises(ConfigError, match=r"BertForMaskedLM\) cannot be fitted: its activation is no line around 0"):
        build(tmp_path, base)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.head=own", "model.head_dims=200"), "'model.head_dims' is of a fitted head"),
        (("model.base_model=from-scratch",), "'model.head' fits a head to the states of a trained encoder"),
    ],
)
def test_a_head_that_cannot_be_fitted_is_refused_when_the_config_is_read(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, "org/encoder", "splade", "model.revision=main", *HEAD, *overrides)


def test_csr_has_no_head_to_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"'model.head' is for SPLADE; csr has no head over a vocabulary"):
        config_of(tmp_path, "org/encoder", "csr", "model.revision=main", *HEAD)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_splade_starts_with_words_whose_product_is_their_idf(tmp_path, family):
    """Without query weights, a word weighs the root of its IDF on both sides. What is active stays so."""
    base = ENCODERS[family](tmp_path)
    plain, weighed = build(tmp_path, base), build(tmp_path, base, architecture="splade")
    idf = static_embedding(plain).weight.detach().double().numpy()
    before, after = (dense_vectors(model, TEXTS[:8]).double().numpy() for model in (plain, weighed))
    assert ((before > 0) == (after > 0)).all()
    factor = np.expm1(np.sqrt(idf * np.log(4))) / 3  # the median logit of a text's own words is 3: log1p(3) in a vector
    np.testing.assert_allclose(after, np.log1p(np.expm1(before) * factor), rtol=1e-4, atol=1e-5)
