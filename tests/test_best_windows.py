"""With long_documents: windows, a row trains on the part of a long passage that shares most with its query."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict

from tests.checkpoints import write_bert, write_modernbert
from tests.standins import COMMIT, write_norbert
from tests.test_models import build
from trainer.config import ConfigError
from trainer.data.best_windows import BestWindows
from trainer.data.training_data import SetSummary, TrainingData
from trainer.encoding.windows import Splitter
from trainer.models.build import set_dropout

FILLER = "havet er et land som ligger på et dokument"  # 9 words of the tests' vocabulary
ANSWER = "Mjøsa er Norges største innsjø"
LONG = " ".join([FILLER] * 4 + [ANSWER] + [FILLER] * 4)
QUERY = "hvor ligger mjøsa"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """It reads 32 tokens."""
    base = write_bert(tmp_path_factory.mktemp("bert") / "base")
    return build(tmp_path_factory.mktemp("model"), base, "inference-free-splade")


def texts_of(model, **columns):
    return BestWindows(model).rows(Dataset.from_dict(columns)).to_dict()


def test_a_row_reads_the_window_in_which_the_querys_rare_word_stands(model):
    positive = texts_of(model, anchor=[QUERY], positive=[LONG])["positive"][0]
    assert "Mjøsa" in positive
    assert positive in Splitter(model).split([LONG])[0]
    assert "Mjøsa" not in Splitter(model).split([LONG])[0][0]


def test_a_negative_is_read_where_it_is_most_like_the_query_too(model):
    rows = texts_of(model, anchor=[QUERY], positive=[ANSWER], negative=[LONG])
    assert rows["positive"] == [ANSWER]
    assert "Mjøsa" in rows["negative"][0]


def test_without_a_shared_word_the_first_window_is_read(model):
    text = " ".join([FILLER] * 8)
    assert texts_of(model, anchor=["Vänern"], positive=[text])["positive"] == [Splitter(model).split([text])[0][0]]


def test_rare_tokens_count_more_than_many_common_ones(model):
    """Every window has the common words; one has the rare word, and fewer of the others."""
    query = "havet er et land som ligger på Vänern"
    text = " ".join([FILLER] * 6 + ["Vänern"] + [FILLER] * 2)
    assert "Vänern" in texts_of(model, anchor=[query], positive=[text])["positive"][0]


def test_rows_without_a_long_passage_are_the_same_object(model):
    rows = Dataset.from_dict({"anchor": [QUERY], "positive": [ANSWER]})
    assert BestWindows(model).rows(rows) is rows


def test_two_windows_of_one_passage_keep_its_number_so_that_no_batch_holds_both(model):
    anchors = [QUERY, "hva er et dokument"]
    rows = Dataset.from_dict({"anchor": anchors, "positive": [LONG, LONG]})
    summary = SetSummary("mine", 2, 0, 2, 0, {}, {}, {}, {}, "content")
    data = TrainingData(DatasetDict(mine=rows), DatasetDict(), {"mine": ["mine"]}, {"mine": summary})
    seen = []

    class Tokeniser:
        def rows(self, name, rows, ids, content=None):
            seen.append((rows["positive"], ids[:, 1].tolist(), content))

    data.tokenise(Tokeniser(), BestWindows(model))
    (windows, read_as, content) = seen[0]
    assert windows[0] != windows[1]
    assert read_as[0] != read_as[1]
    assert content != "content"
    assert data.text_ids("mine")[0, 1] == data.text_ids("mine")[1, 1]


# ---------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("family", ["bert", "modernbert", "norbert3", "norbert4"])
def test_dropout_of_a_base_model_is_what_the_config_says(tmp_path, family):
    """Without it a model in training gives the same vector twice; with it, it does not."""
    pinned = ()
    if family.startswith("norbert"):
        base = write_norbert(tmp_path / "base", family)
        pinned = ("model.trust_remote_code=true", f"model.revision={COMMIT}")
    else:
        base = {"bert": write_bert, "modernbert": write_modernbert}[family](tmp_path / "base")

    def differs(model):
        features = model.train().preprocess([ANSWER], task="document")
        one, two = (model(dict(features), task="document")["sentence_embedding"] for _ in range(2))
        return not one.equal(two)

    without = build(tmp_path, base, "inference-free-splade", "model.dropout=0.0", *pinned)
    assert not differs(without)
    set_dropout(without, 0.5)
    assert differs(without)


def test_a_frozen_dense_model_adds_no_noise_where_its_layers_keep_dropout_as_a_number(tmp_path):
    base = write_modernbert(tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))

    def vectors(*overrides):
        model = build(tmp_path, base, "csr", *overrides).train()
        features = model.preprocess([ANSWER], task="document")
        return [model[1](model[0](dict(features)))["sentence_embedding"] for _ in range(2)]

    frozen, trained = vectors(), vectors("model.csr_train_base=true")
    assert torch.equal(*frozen)
    assert not torch.equal(*trained)
    with pytest.raises(ConfigError, match=r"'model.dropout' has no effect on a frozen base model"):
        build(tmp_path, base, "csr", "model.dropout=0.1")


def test_a_dropout_of_zero_that_is_an_int_is_replaced_too_and_a_network_without_any_is_told():
    attention = torch.nn.Module()
    attention.attention_dropout = 0
    assert set_dropout(torch.nn.Sequential(attention, torch.nn.Dropout(0.1)), 0.5) == 2
    assert attention.attention_dropout == 0.5
    assert set_dropout(torch.nn.Linear(2, 2), 0.5) == 0
