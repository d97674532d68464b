import json
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.sparse_encoder import SparseEncoderTrainer

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense, write_modernbert, write_roberta
from tests.standins import COMMIT, SHAPES, write_norbert
from tests.test_models import config_of
from trainer.config import ConfigError, load_config
from trainer.data import tokens as module
from trainer.data.batches import text_ids
from trainer.data.forward_passes import ForwardPasses
from trainer.data.loading import load_data
from trainer.data.roles import side_of
from trainer.data.token_file import TEXTS_PER_PART, TokenFile
from trainer.data.tokens import TokenCollator, Tokeniser
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.models.build import build_model, fetch_base_model, load_model, save_model
from trainer.runs.run import Run
from trainer.system.progress_bar import ProgressReport
from trainer.training.arguments import build_arguments, routes_of

ROLES = ("anchor", "positive", "negative")
LONG = " ".join(DOCUMENTS)  # longer than max_seq_length
TEXTS = [*DOCUMENTS, LONG, "Å", "x " * 40]


def triplets():
    """Rows in which texts repeat, within and between columns."""
    count = 3 * len(TEXTS)
    return Dataset.from_dict(
        {
            "anchor": [QUERIES[n % len(QUERIES)] for n in range(count)],
            "positive": [TEXTS[n % len(TEXTS)] for n in range(count)],
            "negative": [TEXTS[(n + 2) % len(TEXTS)] for n in range(count)],
        }
    )


def without_token_types(folder):
    """A RoBERTa whose tokenizer gives no token types."""
    file = write_roberta(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps(settings))
    return folder


BASES = {
    "WordPiece": write_bert,
    "byte-level with token types": write_roberta,
    "byte-level without": without_token_types,
    "padded vocabulary": write_modernbert,
}


def built(tmp_path, base, architecture, *overrides):
    config = config_of(tmp_path, base, architecture, *overrides)
    return config, build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")


def stock_collator(tmp_path, config, model):
    """The collator that the library's trainer makes for itself."""
    loss = build_loss(config, model, BatchStatistics())
    arguments = build_arguments(config, Run(tmp_path / "run"), model, loss, "cpu", best_metric=None)
    rows = DatasetDict({"a": triplets()})
    collator = SparseEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).data_collator
    collator.prompts = {role: model.prompts[side_of(role)] for role in ROLES}
    return collator


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if torch.is_tensor(value):
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value


# ------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
@pytest.mark.parametrize("base", BASES)
def test_features_are_those_of_the_library(tmp_path, base, architecture):
    config, model = built(tmp_path, BASES[base](tmp_path / "base"), architecture)
    check_features(tmp_path, config, model)


@pytest.mark.parametrize("shape", SHAPES)
def test_features_of_norbert_are_those_of_the_library(tmp_path, shape):
    pinned = (f"model.revision={COMMIT}", "model.trust_remote_code=true")
    config, model = built(tmp_path, write_norbert(tmp_path / "base", shape), "inference-free-splade", *pinned)
    check_features(tmp_path, config, model)


def test_features_of_a_dense_base_are_those_of_the_library(tmp_path):
    config, model = built(tmp_path, write_dense(tmp_path / "base"), "csr")
    check_features(tmp_path, config, model)


@pytest.mark.parametrize("base,architecture", [(write_bert, "splade"), (write_dense, "csr")])
def test_features_behind_prompts_are_those_of_the_library(tmp_path, base, architecture):
    prompts = ("model.prompts.query='hva er: '", "model.prompts.document='tekst: '")
    config, model = built(tmp_path, base(tmp_path / "base"), architecture, *prompts)
    check_features(tmp_path, config, model)


def test_padding_on_the_left_is_kept_there(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "splade")
    model.tokenizer.padding_side = "left"
    check_features(tmp_path, config, model)


def check_features(tmp_path, config, model):
    rows = triplets()
    tokens = Tokeniser(model, routes_of(config), print).rows("a", rows, text_ids(rows), "content")
    collate, theirs = TokenCollator([tokens, tokens]), stock_collator(tmp_path, config, model)
    for numbers in ([0], [3, 1, 2], list(range(len(rows)))):
        expected = theirs([rows[number] for number in numbers])
        assert_same(collate(numbers), expected)
        assert_same(collate([number + len(rows) for number in numbers]), expected)  # the second set's rows
    batch = collate(list(range(len(rows))))
    types = [name for name in batch if name.endswith("token_type_ids")]
    assert bool(types) == ("token_type_ids" in model.tokenizer.model_input_names)
    assert batch["positive_attention_mask"].sum(1).max() == config.training.max_seq_length
    lengths = tokens.lengths()
    assert lengths.shape == (len(rows), 2 if config.model.architecture == "inference-free-splade" else 3)
    assert np.array_equal(lengths[:, -1], batch["negative_attention_mask"].sum(1).numpy())


def test_texts_are_padded_to_few_lengths_where_asked(tmp_path):
    _, model = built(tmp_path, write_bert(tmp_path / "base"), "splade")
    rows = triplets()
    tokens = Tokeniser(model, {}, print).rows("a", rows, text_ids(rows), "content")
    collate, shapes = TokenCollator([tokens], ForwardPasses(lengths=[8, 16, 32])), set()
    for number in range(len(rows)):
        wide, narrow = collate([number]), TokenCollator([tokens])([number])
        for role in rows.column_names:
            length = narrow[f"{role}_input_ids"].shape[1]
            shapes.add(wide[f"{role}_input_ids"].shape[1])
            assert torch.equal(wide[f"{role}_input_ids"][:, :length], narrow[f"{role}_input_ids"])
            assert wide[f"{role}_attention_mask"].sum() == length
    assert shapes <= {8, 16, 32}
    assert len(shapes) > 1


def test_a_model_that_reads_something_else_is_refused(tmp_path, monkeypatch):
    _, model = built(tmp_path, write_bert(tmp_path / "base"), "splade")
    preprocess = model.preprocess
    monkeypatch.setattr(
        model, "preprocess", lambda texts, **kwargs: preprocess(texts, **kwargs) | {"entity_ids": torch.ones(2)}
    )
    rows = triplets()
    with pytest.raises(ConfigError, match="its 'entity_ids' of the anchor in a is not token ids padded at one end"):
        Tokeniser(model, {}, print).rows("a", rows, text_ids(rows), "content")


# ------------------------------------------------------------------------------------------- kept on disk
@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep the ids of sets however small, in a folder of this test."""
    monkeypatch.setattr(module, "MIN_TEXTS_ON_DISK", 1)
    monkeypatch.setattr(module, "folder_of", lambda kind: tmp_path / kind)
    _, model = built(tmp_path, write_bert(tmp_path / "base"), "splade")
    return model, tmp_path / "tokens"


def make(model, content="content", echo=print):
    rows = triplets()
    tokeniser = Tokeniser(model, {}, echo)
    return tokeniser.rows("a", rows, text_ids(rows), content), tokeniser


def test_ids_are_found_again(kept):
    model, folder = kept
    first, made = make(model)
    again, found = make(model)
    assert (made.texts_found, found.texts_found) == (0, made.texts)
    assert [file.suffix for file in folder.iterdir()] == [".arrow"]
    assert made.bytes == found.bytes == next(folder.iterdir()).stat().st_size
    assert_same(again.features([0, 5, 9]), first.features([0, 5, 9]))


def test_other_texts_another_length_or_another_tokenizer_are_tokenised_anew(kept, tmp_path):
    model, folder = kept
    make(model)
    assert make(model, "other content")[1].texts_found == 0
    model.max_seq_length = 9
    rows, tokeniser = make(model)
    assert tokeniser.texts_found == 0
    assert rows.lengths().max() == 9
    _, other = built(tmp_path, BASES["byte-level without"](tmp_path / "other"), "splade")
    assert make(other)[1].texts_found == 0
    assert len(list(folder.iterdir())) == 4


def test_texts_behind_another_prompt_are_tokenised_anew_and_no_others(kept):
    model, _ = kept
    model.prompts = {"query": "hva er: ", "document": "tekst: "}
    make(model)
    model.prompts = {"query": "hva er: ", "document": "avsnitt: "}
    assert make(model)[1].texts_found == len(QUERIES)


def test_the_key_does_not_depend_on_what_was_tokenised_before(kept):
    model, _ = kept
    before = module.key_of(model[0], None, "content")
    model.encode(["a text", "another, longer text"])
    assert module.key_of(model[0], None, "content") == before


@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_finds_the_ids_of_the_run_it_goes_on_with(tmp_path, base, architecture):
    config, model = built(tmp_path, BASES[base](tmp_path / "base"), architecture)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", config, "cpu")
    for task in set(routes_of(config).values()) or {None}:
        inputs = [module.input_module(each, task) for each in (model, again)]
        assert module.key_of(inputs[0], task, "content") == module.key_of(inputs[1], task, "content")


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "garbage"])
def test_a_damaged_file_is_made_anew(kept, damage):
    model, folder = kept
    first, _ = make(model)
    file = next(folder.iterdir())
    whole = file.read_bytes()
    ids = first.columns[1].file[3].astype(np.uint16).tobytes()
    place = whole.index(ids)
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "flipped": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        "garbage": b"\0" * len(whole),
    }[damage]
    file.unlink()  # not in place: the first rows still map it
    file.write_bytes(damaged)
    said = []
    again, tokeniser = make(model, echo=said.append)
    assert tokeniser.texts_found == 0
    assert len(said) == 1
    assert "is damaged, and is made anew" in said[0]
    assert_same(again.features([0, 5, 9]), first.features([0, 5, 9]))
    assert make(model)[1].texts_found == tokeniser.texts


def test_a_half_written_file_is_never_there(tmp_path):
    def parts():
        yield pa.array([[1, 2, 3]], pa.list_(pa.uint16()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenFile.write(tmp_path / "ids.arrow", pa.uint16(), parts())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(kept):
    model, folder = kept
    folder.write_text("in the way")
    with pytest.raises(ConfigError, match=r"token ids cannot be written to .*: .*Set HF_HOME"):
        make(model)


def test_a_file_of_many_parts_holds_every_text(tmp_path):
    texts = [np.arange(n % 7, dtype=np.uint16) for n in range(2 * TEXTS_PER_PART + 3)]
    parts = (
        pa.array(texts[n : n + TEXTS_PER_PART], pa.list_(pa.uint16())) for n in range(0, len(texts), TEXTS_PER_PART)
    )
    file = TokenFile.write(tmp_path / "ids.arrow", pa.uint16(), parts)
    assert len(file) == len(texts)
    for number in (0, 6, TEXTS_PER_PART - 1, TEXTS_PER_PART, TEXTS_PER_PART + 1, 2 * TEXTS_PER_PART + 2):
        assert np.array_equal(file[number], texts[number])
    assert file.lengths().tolist() == list(map(len, texts))
    sent = ForkingPickler.dumps(file)  # as to a loader worker
    assert len(sent) < 1000  # its path, not its ids
    assert np.array_equal(ForkingPickler.loads(sent)[TEXTS_PER_PART], texts[TEXTS_PER_PART])


def test_ids_in_memory_are_pickled_whole():
    file = TokenFile(pa.table({"ids": pa.array([[70_000, 1], [2]], pa.list_(pa.int32()))}))
    assert ForkingPickler.loads(ForkingPickler.dumps(file))[0].tolist() == [70_000, 1]


# ------------------------------------------------------------------------------------------- all sets of a run
def test_every_set_is_tokenised_and_a_text_once(tiny):
    config = load_config(tiny).config
    data = load_data(config)
    model = build_model(config, None, data.queries(), data.passages(), "cpu")
    seen = []
    preprocess = model.preprocess
    model.preprocess = lambda texts, **kwargs: seen.append((kwargs["task"], texts)) or preprocess(texts, **kwargs)
    data.tokenise(Tokeniser(model, routes_of(config), print))
    assert data.tokens.keys() == data.train.keys()
    assert data.eval_tokens.keys() == data.eval.keys()
    # calls with fewer texts are those that compare a few rows with the library's
    called = [text for task, texts in seen if task == "query" and len(texts) > module.CHECKED_ROWS for text in texts]
    sets = [*data.train.values(), *data.eval.values()]
    anchors = [text for rows in sets if len(rows) > module.CHECKED_ROWS for text in set(rows["anchor"])]
    assert len(anchors) > 400
    assert sorted(called) == sorted(anchors)


def test_tokenising_knows_how_far_it_is(monkeypatch):
    monkeypatch.setattr(module, "TEXTS_PER_PART", 10)
    monkeypatch.setattr(module, "TEXTS_PER_CALL", 4)

    def preprocess(texts):
        return {
            "input_ids": torch.ones(len(texts), 2, dtype=int),
            "attention_mask": torch.ones(len(texts), 2, dtype=int),
        }

    progress = ProgressReport()
    seen = [progress.n for _ in module.tokenised(pa.chunked_array([["a"] * 25]), preprocess, pa.uint16(), progress)]
    assert seen == [10, 20, 25]
