import math

import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseAutoEncoder, SpladePooling

from tests.checkpoints import DOCUMENTS, QUERIES, nfd, write_bert, write_dense, write_modernbert, write_roberta
from tests.conftest import TINY
from trainer.config import ConfigError, load_config, render
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.models.build import build_model, fetch_base_model, static_embedding


def config_of(folder, base, architecture, *overrides):
    text = TINY.replace("base_model: from-scratch", f"base_model: {base}")
    text = "\n".join(line for line in text.splitlines() if "from_scratch" not in line)
    if architecture == "csr":
        text = text.replace("loss: {type: splade, document_regularizer_weight: 1e-3}", "loss: {type: csr}")
        overrides = ("model.csr_hidden_dim=64", "model.csr_k=8", "model.csr_k_aux=8", *overrides)
    if architecture == "splade":
        overrides = ("loss.query_regularizer_weight=1e-3", *overrides)
    if architecture != "inference-free-splade":
        text = text.replace("  query_learning_rate: 1e-2\n", "")
    file = folder / "config.yaml"
    file.write_text(text.replace("inference-free-splade", architecture))
    loaded = load_config(file, overrides)
    file.write_text(render(loaded))  # the whole config in one file, for tests that run the command line
    return loaded.config


def build(folder, base, architecture, *overrides):
    return build_from(config_of(folder, base, architecture, *overrides))


def build_from(config):
    return build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")


def dense_vectors(model, texts, route="document"):
    encode = {"document": model.encode_document, "query": model.encode_query}[route]
    return encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"))


# ---------------------------------------------------------------------------------- inference-free SPLADE
def test_a_query_of_an_inference_free_model_is_its_words_with_their_idf(tmp_path, bert):
    model = build(tmp_path, bert, "inference-free-splade")
    assert isinstance(model[0], Router)
    tokenizer = model.tokenizer
    query = "mjøsa ligger"
    expected = torch.zeros(len(tokenizer))
    for token in tokenizer(query, add_special_tokens=False)["input_ids"]:
        containing = sum(token in tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS)
        expected[token] = math.log(1 + (len(DOCUMENTS) - containing + 0.5) / (containing + 0.5))
    torch.testing.assert_close(dense_vectors(model, [query], "query")[0], expected)


def test_query_init_ones_gives_every_word_the_same_weight(tmp_path, bert):
    model = build(tmp_path, bert, "inference-free-splade", "model.query_init=ones")
    assert set(dense_vectors(model, ["mjøsa ligger"], "query")[0].tolist()) == {0.0, 1.0}


def test_a_frozen_static_embedding_is_not_trained_and_stays_frozen_when_saved(tmp_path, bert):
    free = build(tmp_path, bert, "inference-free-splade")
    assert static_embedding(free).weight.requires_grad
    frozen = ["model.freeze_static_embedding=true", "training.query_learning_rate=null"]
    config = load_config(tmp_path / "config.yaml", frozen).config
    model = build_from(config)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not static_embedding(model).weight.requires_grad
    assert not static_embedding(SparseEncoder(str(tmp_path / "saved"), device="cpu")).weight.requires_grad


def test_documents_are_log1p_of_the_largest_positive_logit_of_each_word(tmp_path, bert):
    model = build(tmp_path, bert, "inference-free-splade")
    transformer = model[0].sub_modules["document"][0]
    features = transformer.tokenizer(DOCUMENTS[:2], padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        logits = transformer.model.eval()(**features).logits
    logits = logits.masked_fill(features["attention_mask"].unsqueeze(2) == 0, -torch.inf)
    expected = torch.log1p(torch.relu(logits.max(dim=1).values))
    torch.testing.assert_close(dense_vectors(model, DOCUMENTS[:2]), expected)


# ---------------------------------------------------------------------------------- special tokens, dense models
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_special_tokens_are_never_active_in_queries_or_documents(tmp_path, architecture):
    base = write_bert(tmp_path / "base", bias=3.0)  # nearly every word is active, so special tokens would be too
    with torch.no_grad():
        model = build(tmp_path, base, architecture)
    special = model.tokenizer.all_special_ids
    texts = ["[CLS] [UNK] mjøsa 漢字 [SEP]", DOCUMENTS[0]]
    for route in ("query", "document"):
        vectors = dense_vectors(model, texts, route)
        assert (vectors[:, special] == 0).all()
        assert (vectors > 0).any()
    raw = SparseEncoder(str(base), device="cpu")
    assert (dense_vectors(raw, texts)[:, special] > 0).any()  # the opposite: stock, they are active


def test_a_base_model_without_negative_logits_is_refused_with_the_reason(tmp_path):
    base = write_bert(tmp_path / "base", bias=50.0)
    with pytest.raises(
        ConfigError, match="is dense at start: every logit of every token is positive on 4 training texts"
    ):
        build(tmp_path, base, "splade")


def test_a_base_model_that_is_merely_dense_can_become_sparse_and_is_accepted(tmp_path):
    base = write_bert(tmp_path / "base", bias=3.0)
    model = build(tmp_path, base, "splade")
    assert (dense_vectors(model, DOCUMENTS) > 0).float().mean() > 0.9


# ---------------------------------------------------------------------------------- SPLADE and CSR
def test_regular_splade_sends_queries_and_documents_through_the_same_modules(tmp_path, bert):
    model = build(tmp_path, bert, "splade", "model.activation_function=log1p_relu")
    assert isinstance(model[1], SpladePooling)
    assert model[1].activation_function == "log1p_relu"
    torch.testing.assert_close(dense_vectors(model, DOCUMENTS, "query"), dense_vectors(model, DOCUMENTS))


def test_csr_keeps_the_dense_models_own_vectors_underneath_and_k_active_dims(tmp_path, dense):
    model = build(tmp_path, dense, "csr")
    assert isinstance(model[-1], SparseAutoEncoder)
    vectors = dense_vectors(model, DOCUMENTS)
    assert vectors.shape == (4, 64)
    assert ((vectors > 0).sum(1) <= 8).all()
    assert model.similarity_fn_name == "cosine"
    expected = SentenceTransformer(str(dense), device="cpu").encode(DOCUMENTS, convert_to_tensor=True)
    features = model.preprocess(DOCUMENTS)
    with torch.no_grad():
        for module in list(model.children())[:-1]:
            features = module.eval()(features)
    torch.testing.assert_close(features["sentence_embedding"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train_base", [False, True])
def test_csr_trains_the_dense_model_only_when_asked(tmp_path, dense, train_base):
    model = build(tmp_path, dense, "csr", f"model.csr_train_base={str(train_base).lower()}")
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({"0", "2"} if train_base else {"2"})


# ---------------------------------------------------------------------------------- other families of base models
FAMILIES = {"bert": write_bert, "roberta": write_roberta, "modernbert": write_modernbert}


@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade", "csr"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_step_saves_and_reloads_in_every_architecture(tmp_path, family, architecture):
    base = FAMILIES[family](tmp_path / "base")
    config = config_of(tmp_path, base, architecture)
    model = build_from(config)
    loss = build_loss(config, model, BatchStatistics())
    route = {"task": "query"}, {"task": "document"}
    features = [model.preprocess(texts, **to) | to for texts, to in zip((QUERIES, DOCUMENTS), route, strict=True)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sum(loss(features).values()).backward()
    optimizer.step()
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model.eval()
    model.save_pretrained(str(tmp_path / "saved"))
    again = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    for way in ("query", "document"):
        vectors = dense_vectors(model, QUERIES + DOCUMENTS, way)
        for texts in (QUERIES + DOCUMENTS, nfd(QUERIES + DOCUMENTS)):  # the second as a Mac types them
            torch.testing.assert_close(dense_vectors(again, texts, way), vectors, atol=1e-5, rtol=1e-5)
        if architecture != "csr":
            assert (vectors[:, model.tokenizer.all_special_ids] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_word_of_a_query_has_the_dimension_it_has_in_a_document(tmp_path, family):
    model = build(tmp_path, FAMILIES[family](tmp_path / "base"), "inference-free-splade", "model.query_init=ones")
    model.save_pretrained(str(tmp_path / "saved"))
    for encoder in (model, SparseEncoder(str(tmp_path / "saved"), device="cpu")):
        first, later = dense_vectors(encoder, ["innsjø", "Norges innsjø"], "query")
        assert first.any()
        assert (later[first > 0] > 0).all()
    # the opposite: the byte-level tokenizers as they come give the first word other tokens
    tokenizer = model[0].sub_modules["document"][0].tokenizer
    alone, within = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("innsjø", "Norges innsjø"))
    assert (set(alone) <= set(within)) == (family == "bert")


def test_texts_longer_than_the_base_model_can_read_are_refused(tmp_path):
    for family, positions in (("bert", 64), ("roberta", 64), ("modernbert", 64)):
        base = FAMILIES[family](tmp_path / family)
        build(tmp_path, base, "splade", f"training.max_seq_length={positions}")
        with pytest.raises(
            ConfigError, match=rf"training.max_seq_length: 65 tokens are more than .* can read \({positions}\)"
        ):
            build(tmp_path, base, "splade", "training.max_seq_length=65")


# ---------------------------------------------------------------------------------- from scratch
def test_a_model_from_scratch_starts_as_a_word_matcher(tmp_path):
    config = load_config(write_tiny(tmp_path)).config
    model = build_from(config)
    scores = dense_vectors(model, QUERIES, "query") @ dense_vectors(model, DOCUMENTS).T
    assert (dense_vectors(model, nfd(QUERIES), "query") @ dense_vectors(model, nfd(DOCUMENTS)).T).equal(scores)
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]
    tokenizer = model.tokenizer
    for text, vector in zip(DOCUMENTS, dense_vectors(model, DOCUMENTS), strict=True):
        own = set(tokenizer(text, add_special_tokens=False)["input_ids"])
        active = set((vector > 0).nonzero().ravel().tolist())
        assert len(own & active) >= 0.9 * len(own)
        assert len(active - own) <= len(own)


def test_a_bias_nearer_to_0_leaves_more_words_active_at_the_start(tmp_path):
    active = []
    for bias in (-4.0, -2.0):
        torch.manual_seed(5)
        config = load_config(write_tiny(tmp_path), [f"model.from_scratch.lexical_bias={bias}"]).config
        active.append(dense_vectors(build_from(config), DOCUMENTS) > 0)
    assert (active[1] | ~active[0]).all()
    assert active[1].sum() > 2 * active[0].sum()


def test_the_same_seed_builds_the_same_model_from_scratch(tmp_path):
    config = load_config(write_tiny(tmp_path)).config
    vectors = []
    for _ in range(2):
        torch.manual_seed(5)
        vectors.append(dense_vectors(build_from(config), DOCUMENTS))
    assert torch.equal(*vectors)


def test_the_tokenizer_from_scratch_keeps_nordic_letters_apart(tmp_path):
    config = load_config(write_tiny(tmp_path)).config
    tokenizer = build_model(config, None, ["far får fær før"] * 2, DOCUMENTS, "cpu").tokenizer
    assert len({tuple(tokenizer.tokenize(word)) for word in ("far", "får", "fær", "før")}) == 4
    assert tokenizer.tokenize("Får") == tokenizer.tokenize("får")


def write_tiny(folder):
    file = folder / "tiny.yaml"
    file.write_text(TINY)
    return file


# ---------------------------------------------------------------------------------- bad input
def test_a_tokenizer_without_a_pad_token_is_named(tmp_path):
    base = write_bert(tmp_path / "base", pad_token=False)
    for architecture in ("splade", "csr"):
        with pytest.raises(ConfigError, match=r"the tokenizer of .* has no pad token"):
            build(tmp_path, base, architecture)


def test_a_base_model_with_code_of_its_own_needs_trust(tmp_path, bert):
    settings = (bert / "config.json").read_text()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(settings.replace("{", '{"auto_map": {"AutoModel": "x.X"},', 1))
    with pytest.raises(ConfigError, match="comes with Python code of its own"):
        build(tmp_path, tmp_path / "base", "splade")


def test_a_base_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model.base_model: there is no file or folder ./nothing \(the base model\)"):
        build(tmp_path, "./nothing", "splade")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model.base_model: .*empty cannot be loaded"):
        build(tmp_path, tmp_path / "empty", "splade")


def test_max_seq_length_cuts_documents(tmp_path, bert):
    model = build(tmp_path, bert, "splade", "training.max_seq_length=8")
    assert model.preprocess([DOCUMENTS[0] * 3])["input_ids"].shape == (1, 8)
