"""Documents longer than a model reads: windows that fit and overlap, and the maximum over their vectors."""

import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SparseEncoder

from evaluate.passage_vectors import PassageVectors
from evaluate.report import model_options
from evaluate.search import SparseSearch
from evaluate.subject import open_subject
from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense, write_roberta
from tests.test_export import run_export
from tests.test_models import build, config_of, dense_vectors
from trainer.config import ConfigError, load_config
from trainer.data.beir import SearchSet
from trainer.data.loading import load_data
from trainer.encoding.encode import document_modules, encode
from trainer.encoding.fuse import fuse
from trainer.encoding.windows import (
    Splitter,
    measure_lengths,
    read_in_windows,
    reads_in_windows,
    texts_read,
    windows_of,
    with_cut_documents,
)
from trainer.export.ml_commons import write_models
from trainer.export.sample import require_maxima
from trainer.export.vectors import Encoder
from trainer.models.build import build_model
from trainer.publish.card import build_model_card
from trainer.runs.run import Run, hash_of_model
from trainer.training.describe import length_lines
from trainer.training.evaluators import GradedSearch

LONG = " ".join(f"{word}{n % 7}" for n, word in enumerate(" ".join(DOCUMENTS * 2).split()))
LIMIT = 32  # of the test config
SCORES = {
    "task_name": "NorQuadRetrieval",
    "mteb_version": "2.26.24",
    "scores": {"test": [{"hf_subset": "default", "ndcg_at_10": 0.25, "languages": ["nob-Latn"]}]},
}
BLANKS = [" ", "\n", "   "]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models that read 32 tokens, fused: WordPiece or byte-level, with and without a prompt."""
    found = {}
    for name, write in (("bert", write_bert), ("roberta", write_roberta)):
        base = write(tmp_path_factory.mktemp(name) / "base")
        for prompt in ("", "et dokument: "):
            prompts = [f'model.prompts={{document: "{prompt}"}}'] if prompt else []
            found[name, bool(prompt)] = build(tmp_path_factory.mktemp(name), base, "inference-free-splade", *prompts)
            fuse(found[name, bool(prompt)])
    return found


@pytest.fixture(params=[(name, prompt) for name in ("bert", "roberta") for prompt in (False, True)])
def model(request, models):
    yield models[request.param]
    vars(models[request.param]).pop("encode_document", None)


@pytest.fixture
def bert(models):
    """One of them."""
    yield models["bert", False]
    vars(models["bert", False]).pop("encode_document", None)


def tokens_read(model, text):
    """How many tokens the library would read of a text without a limit, with the prompt and special tokens."""
    tokenizer = document_modules(model)[0].tokenizer
    return len(tokenizer(model.prompts["document"] + text, truncation=False)["input_ids"])


# ---------------------------------------------------------------------------------- the vectors
@pytest.mark.parametrize("as_sparse", [True, False])
def test_a_document_keeps_the_most_dims_that_are_asked_for_and_not_each_window(bert, as_sparse):
    texts = [LONG, DOCUMENTS[0]]
    read_in_windows(bert)
    vectors = [bert.encode_document(texts, convert_to_sparse_tensor=as_sparse, max_active_dims=k) for k in (None, 9)]
    whole, pruned = (each.to_dense().numpy() if as_sparse else each.numpy() for each in vectors)
    for row, kept in zip(whole, pruned, strict=True):
        expected = np.where(row >= np.sort(row)[-9], row, 0)
        np.testing.assert_array_equal(kept, expected)
        assert (row > 0).sum() > 9


def test_a_text_that_fits_keeps_every_bit(model):
    texts = [text for text in [*DOCUMENTS, "", "og", *QUERIES] if tokens_read(model, text) <= LIMIT]
    assert len(texts) >= 6
    stock, rows = dense_vectors(model, texts), encode(model, texts, "document", 4)
    read_in_windows(model)
    assert torch.equal(dense_vectors(model, texts), stock)
    assert (encode(model, texts, "document", 4) != rows).nnz == 0
    mixed = dense_vectors(model, [texts[0], LONG, *texts[1:]])
    assert torch.equal(mixed[[0, *range(2, len(texts) + 1)]], stock)


def test_a_long_text_is_the_maximum_over_the_librarys_vectors_of_its_windows(model):
    read_in_windows(model)
    texts = [LONG, "og", LONG[: len(LONG) // 2]]
    windows = Splitter(model).split(texts)
    assert [len(each) > 1 for each in windows] == [True, False, True]
    with with_cut_documents(model):
        assert not reads_in_windows(model)
        expected = torch.stack([dense_vectors(model, each).amax(0) for each in windows])
    found = dense_vectors(model, texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rows = encode(model, texts, "document", 2)
    np.testing.assert_allclose(rows.toarray(), expected, rtol=1e-4, atol=1e-5)
    # every form that the library gives
    assert torch.equal(model.encode_document(texts).to_dense(), found)
    assert torch.equal(torch.stack(model.encode_document(texts, convert_to_tensor=False)).to_dense(), found)
    torch.testing.assert_close(model.encode_document(LONG).to_dense(), found[0])


def test_where_words_do_not_depend_on_each_other_windows_give_the_vector_of_the_whole_text(tmp_path):
    model = build(tmp_path, write_bert(tmp_path / "base"), "splade")
    bert = model[0].model.bert
    bert.encoder.layer = torch.nn.ModuleList()
    with torch.no_grad():
        bert.embeddings.position_embeddings.weight.zero_()
    text = " ".join(DOCUMENTS)[:180]
    model[0].max_seq_length = 64
    assert LIMIT < len(model.tokenizer(text)["input_ids"]) <= 64
    whole = dense_vectors(model, [text])
    model[0].max_seq_length = LIMIT
    assert not torch.allclose(dense_vectors(model, [text]), whole)
    read_in_windows(model)
    torch.testing.assert_close(dense_vectors(model, [text]), whole)


def test_the_windows_vectors_are_sparse_and_no_more_than_a_batch_is_dense(bert, monkeypatch):
    model, dense, calls = bert, [], []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda features, **kw: dense.append(len(features["input_ids"])) or forward(features, **kw)
    )
    read_in_windows(model)
    windowed = model.encode_document
    cut = windowed.cut
    windowed.cut = lambda texts, **options: calls.append((len(texts), options)) or cut(texts, **options)
    encode(model, [LONG] * 5, "document", 4)
    assert max(dense) == 4
    assert max(count for count, _ in calls) > 12
    assert all(options["convert_to_sparse_tensor"] for count, options in calls if count > 4)


# ---------------------------------------------------------------------------------- the windows
@pytest.mark.parametrize("blank", BLANKS)
def test_windows_fit_overlap_and_tear_no_word(model, blank):
    words = [f"{word}{n}" for n, word in enumerate(LONG.split())]
    windows = Splitter(model).split([blank.join(words)])[0]
    place = overlaps = 0
    for window in windows:
        of_window = window.split()
        start = words.index(of_window[0])
        assert words[start : start + len(of_window)] == of_window
        assert start <= place
        overlaps += start < place
        place = start + len(of_window)
        longest = max(tokens_read(model, word) for word in words)
        assert LIMIT - longest < tokens_read(model, window) <= LIMIT
    assert (words[0], place) == (windows[0].split()[0], len(words))
    assert overlaps > 0.6 * len(windows)  # between the others, one long word is the whole overlap


def test_windows_are_three_quarters_of_their_length_apart_and_the_last_one_ends_with_the_text():
    places = [(2 * n, 2 * n + 1) for n in range(8)]
    found = list(windows_of("a b c d e f g h", places, 4))
    assert found == [("a b c d", False), (" d e f g", False), (" e f g h", False)]


@pytest.mark.parametrize("words", [30, 31, 53, 54, 100, 101])
def test_the_number_of_windows_is_as_few_as_cover_the_text(bert, words):
    room, stride = 30, 22
    text = " ".join(["er"] * words)
    assert tokens_read(bert, text) == words + 2
    count = 1 + max(0, math.ceil((words - room) / stride))
    assert len(Splitter(bert).split([text])[0]) == count


def test_a_word_longer_than_a_window_is_torn_and_read_to_its_end(model):
    word = "".join(chr(ord("a") + n % 26) + "øæå😀"[n % 4] for n in range(150))
    text = f"er {word} og"
    windows = [window.strip() for window in Splitter(model).split([text])[0]]
    assert all(tokens_read(model, window) <= LIMIT for window in windows)
    reached = 0
    for window in windows:
        start = text.rindex(window, 0, reached + len(window) + 1)
        assert start <= reached or text[reached:start].isspace()
        reached = start + len(window)
    assert reached == len(text)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \nabe😀å"), min_size=20, max_size=300))
def test_windows_of_any_text_fit_and_hold_all_of_it(models, name, text):
    model = models[name, False]
    windows = Splitter(model).split([text])[0]
    assert all(tokens_read(model, window) <= LIMIT for window in windows)
    assert len(windows) > 1 or windows == [text]
    reached = 0
    for window in windows:
        start = max(place for place in range(reached + 1) if text.startswith(window, place))
        reached = max(reached, start + len(window))
    assert reached == len(text)


# ---------------------------------------------------------------------------------- who cannot
def test_what_the_maximum_is_not_the_vector_of_is_refused(tmp_path):
    for architecture, options, says in (
        ("csr", [], "with csr, the maximum"),
        ("splade", ["model.pooling_strategy=sum"], "with pooling_strategy sum, the maximum"),
    ):
        base = write_dense(tmp_path / "dense") if architecture == "csr" else tmp_path / "dense/bert"
        with pytest.raises(ConfigError, match=f"'model.long_documents' is windows, .*{says}"):
            config_of(tmp_path, base, architecture, "model.long_documents=windows", *options)
        model = build(tmp_path, base, architecture, *options)
        with pytest.raises(ConfigError, match=r"^documents cannot be read in windows: .* Set long_documents to cut$"):
            read_in_windows(model)


def test_an_own_prompt_is_not_taken_for_the_models(bert):
    read_in_windows(bert)
    with pytest.raises(ValueError, match="the model's own prompt"):
        bert.encode_document(LONG, prompt="x")


# ---------------------------------------------------------------------------------- what is said
def test_lengths_are_counted_as_the_model_reads_them(bert, monkeypatch):
    model = bert
    texts = ["er " * 30, "er " * 38, "er " * 98, "er"]
    lengths = measure_lengths(model, texts)
    assert (lengths.limit, lengths.documents, lengths.longer) == (LIMIT, 4, 2)
    assert lengths.share_cut == (8 + 68) / (32 + 40 + 100 + 3)
    assert lengths.windows == (2 + 5) / 2
    assert lengths.words(False) == "50.0% of the documents have more than 32 tokens; 43.4% of the text is cut off"
    assert lengths.words(True) == "50.0% of the documents have more than 32 tokens; read in 3.5 windows each"
    assert measure_lengths(model, ["er", *DOCUMENTS[:0]]) is None
    monkeypatch.setattr("trainer.encoding.windows.COUNTED", 2)
    assert measure_lengths(model, texts * 9).words(True).startswith("about ")


def test_the_plan_says_how_training_and_searches_read(tiny):
    config = load_config(tiny, ["training.max_seq_length=12"]).config
    data = load_data(config)
    model = build_model(config, None, data.queries(), data.passages(), "cpu")
    share = r"\d+\.\d% of the documents have more than 12 tokens; "
    cut = share + r"\d+\.\d% of the text is cut off"
    *sets, search = length_lines(data, model)
    assert len(sets) >= 2
    assert all(re.fullmatch(rf"lengths   quickstart_\w+: {cut}", line) for line in sets)
    assert re.fullmatch(f"lengths   search in quickstart: {cut}", search)
    read_in_windows(model)
    *sets, search = length_lines(data, model)
    windows = share + r"read in \d+\.\d windows each"
    which = "; a row trains on the window that shares most with its query"
    assert all(re.fullmatch(rf"lengths   quickstart_\w+: {windows}{which}", line) for line in sets)
    assert re.fullmatch(f"lengths   search in quickstart: {windows}", search)


# ---------------------------------------------------------------------------------- who reads them
def test_a_search_in_training_measures_what_the_windows_give(bert):
    model = bert
    search = SearchSet("mine", {"q": QUERIES[0]}, {"a": LONG, "b": "og"}, {"q": {"a": 1}})

    def active_dims():
        return GradedSearch(search, 2)(model)["mine_corpus_active_dims"]

    cut = active_dims()
    read_in_windows(model)
    assert active_dims() == encode(model, [LONG, "og"], "document", 2).nnz / 2 > cut
    assert texts_read(model, [LONG, "og"]) == len(Splitter(model).split([LONG])[0]) + 1


def test_a_run_is_evaluated_as_its_config_says_unless_the_command_says_otherwise(trained):
    before = open_subject(None, "models/tiny")
    assert before.long_documents == open_subject(None, "models/tiny/final").long_documents == "cut"
    text = (trained / "models/tiny/config.yaml").read_text()
    (trained / "models/tiny/config.yaml").write_text(text.replace("long_documents: cut", "long_documents: windows"))
    subject = open_subject(None, "models/tiny/final")
    assert subject.fingerprint != before.fingerprint
    cut = open_subject(None, "models/tiny", long_documents="cut")
    assert cut.fingerprint == before.fingerprint
    assert model_options(subject) == "--model models/tiny"
    assert model_options(cut) == "--model models/tiny --long-documents cut"  # in the report's commands
    assert open_subject(None, "models/tiny/final", long_documents="windows").long_documents == "windows"
    notes = []
    for each in (before, subject):
        system = SparseSearch(PassageVectors(each.load(), 32), "tiny")
        system.index_texts([LONG, "og"], None)
        notes.append(system.note)
    assert re.fullmatch(r"50\.0% of the documents have more than 32 tokens; \d\d\.\d% of the text is cut off", notes[0])
    assert re.fullmatch(r"50\.0% of the documents have more than 32 tokens; read in \d\d\.\d windows each", notes[1])


def test_scores_of_the_other_way_to_read_are_left_out_of_the_card(trained):
    run = trained / "models/tiny"
    for name, values in (("scores", SCORES), ("per_query", {"ndcg_at_10": {}})):
        file = run / f"eval/{name}/tiny/NorQuadRetrieval.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values | {"made_with": {"system": hash_of_model(run / "final")}}))
    assert "0.2500" in build_model_card(Run.finished("tiny"), "org/model", 800).text
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("long_documents: cut", "long_documents: windows"))
    card = build_model_card(Run.finished("tiny"), "org/model", 800).text
    assert "are those of another model.long_documents, so they are left out" in card
    assert "0.2500" not in card


def test_an_export_holds_the_maximum_over_what_stock_gives_for_each_window(trained):
    corpus = trained / "corpus.jsonl"
    texts = [DOCUMENTS[0], LONG, "", LONG[100:]]
    corpus.write_text("".join(json.dumps({"_id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    run_export("parquet", corpus, long_documents="windows")
    folder = trained / "models/tiny/export/parquet"
    rows = pq.read_table(next(folder.glob("documents-*.parquet"))).to_pylist()
    stock = SparseEncoder(str(trained / "models/tiny/final"), device="cpu")
    for row, windows in zip(rows, Splitter(stock).split(texts), strict=True):
        exact = dense_vectors(stock, windows).amax(0).numpy()
        found = np.zeros_like(exact)
        found[row["indices"]] = row["values"]
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="holds an export with another long_documents"):
        run_export("parquet", corpus)


def test_an_export_whose_windows_are_not_the_maximum_is_refused(trained):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8, in_windows=True)
    found = encoder.documents([LONG, "og"])
    require_maxima(encoder, [LONG, "og"], found)
    with pytest.raises(ConfigError, match=r"^windows give another vector than the model for 'Mjøsa"):
        require_maxima(encoder, [LONG, "og"], found * 1.01)


@pytest.mark.slow  # traces a model, and runs it in a process of its own
def test_a_model_for_opensearch_is_checked_as_it_reads_and_that_it_cuts_is_said(trained):
    encoder, lines = Encoder.open(trained / "models/tiny/final", "cpu", 8, in_windows=True), []
    write_models(trained, encoder, "tiny", lines.append)
    assert lines[-2].startswith("checked   document-model.zip")
    assert lines[-1] == (
        "cuts      document-model.zip reads 32 tokens of a document. Send longer ones with their exported vectors"
    )
