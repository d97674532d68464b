"""An export that would rank differently is refused, and does not look finished afterwards."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import trainer.export.documents
from tests.test_export import corpus, run_export  # noqa: F401, corpus is a fixture
from trainer.config import ConfigError
from trainer.export.bulk import OpenSearch, kept_bits
from trainer.export.check import Rounding, compare_scores, compare_top_10, require_same_vectors, write_figures
from trainer.export.corpus import Shard
from trainer.export.lucene import Lucene
from trainer.export.sample import Sample, choose_scale
from trainer.export.seismic import Seismic
from trainer.export.vectors import Encoder


def test_documents_that_were_changed_by_hand_are_noticed(trained, corpus):  # noqa: F811
    run_export("lucene", corpus)
    file = trained / "models/tiny/export/lucene/documents-1-of-1.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ConfigError, match="does not hold the documents of the corpus in their order"):
        run_export("lucene", corpus)
    row = json.loads(lines[0])
    row["vector"] = {term: weight + 50 for term, weight in row["vector"].items()}
    file.write_text("".join([json.dumps(row) + "\n", *lines[1:]]))
    with pytest.raises(ConfigError, match=r"the files give another vector than the model for '.*': off by \d"):
        run_export("lucene", corpus)


def test_a_weight_may_be_off_by_what_float32_does_to_sums_and_no_more():
    texts, exact = ["a", "b"], sp.csr_matrix([[3.0, 0.0], [0.0, 4.0]])
    near = sp.csr_matrix([[3.0, 0.0], [0.00002, 4.0]])
    assert require_same_vectors("x gives", texts, near, exact) == pytest.approx(2e-5)
    for wrong in (4.1, np.nan):
        found = sp.csr_matrix([[3.0, 0.0], [0.0, wrong]])
        with pytest.raises(ConfigError, match=r"^x gives another vector than the model for 'b': off by (0\.1|nan)$"):
            require_same_vectors("x gives", texts, found, exact)


def test_where_the_precision_is_ours_no_order_changes_but_that_which_float32_does_not_know():
    found = np.array([[0.98, 0.99]])
    figures = compare_scores(np.array([[1, 0.999999]]), found)
    assert (figures["top_10_unchanged"], figures["largest_difference"]) == (1, pytest.approx(0.02))
    apart = np.array([[1, 0.9999]])
    with pytest.raises(
        ConfigError, match=r"the top 10 changes for 1 of 1 queries, by 0\.01% of the best score at most"
    ):
        compare_scores(apart, found)
    assert compare_scores(apart, found, "the engine rounds")["top_10_unchanged"] == 0


@given(st.integers(0, 10**6), st.sampled_from(["nine bits", "float16", "whole numbers"]))
def test_what_storing_does_to_any_weight_is_within_the_stated_rounding(seed, kind):
    random = np.random.default_rng(seed)
    form, store = {
        "nine bits": (OpenSearch(), lambda rows: np.array([kept_bits(row) for row in rows.tolist()])),
        "float16": (Seismic(), lambda rows: rows.astype(np.float16).astype(float)),
        "whole numbers": (Lucene(7), lambda rows: np.round(rows * 7) / 7),
    }[kind]
    weights = random.gamma(1.0, 1.0, (20, 4)) * (random.random((20, 4)) < 0.7)
    exact, stored = sp.csr_matrix(weights), sp.csr_matrix(store(weights))
    texts, stated = ["text"] * 20, form.document_rounding
    require_same_vectors("x gives", texts, stored, exact, rounding=stated)
    with pytest.raises(ConfigError, match="another vector"):  # and not much more than that is stated
        require_same_vectors("x gives", texts, stored, exact, rounding=Rounding(stated.share / 10, stated.step / 10))


def test_only_the_first_ten_places_count():
    wanted = np.arange(20, 0, -1.0)[None]
    # of scores 20, 19, … 1: the tenth is 11 and becomes 10; the first is 20 and becomes 1
    for places, change in {(15, 16): 0, (9, 10): 1 / 20, (0, 19): 19 / 20}.items():
        found = wanted.copy()
        found[0, list(places)] = found[0, list(places[::-1])]
        figures = compare_top_10(wanted, found)
        assert (figures["top_10_unchanged"], figures["largest_change"]) == (change == 0, pytest.approx(change)), places


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.randoms())
def test_a_top_ten_is_the_same_when_no_two_documents_of_different_scores_change_places(scores, random):
    found = [score + random.choice([0, 0, 0, 0.5, 1.5]) for score in scores]
    order = sorted(range(len(scores)), key=lambda place: -found[place])
    swapped = [1 for n, first in enumerate(order[:10]) for later in order[n + 1 :] if scores[later] > scores[first]]
    figures = compare_top_10(np.array([scores], float), np.array([found]))
    assert figures["top_10_unchanged"] == (not swapped)


def test_a_scale_given_by_hand_that_changes_the_order_is_refused_and_the_one_chosen_does_not(trained, corpus):  # noqa: F811
    with pytest.raises(ConfigError, match=r"the top 10 changes for .* Quantise less, ARGS=.--scale 10., or"):
        run_export("lucene", corpus, scale=1)
    folder = trained / "models/tiny/export/lucene"
    assert [file.name for file in folder.iterdir()] == ["documents-1-of-1.jsonl.refused"]
    (said,) = [line for line in run_export("lucene", corpus) if line.startswith("scale")]  # and in the same folder
    scale = json.loads((folder / "export.json").read_text())["scale"]
    assert said.startswith(f"scale     {scale:,} (of 100, 200, 500, … the first that keeps the top 10 of all ")
    figures = json.loads((folder / "check-1-of-1.json").read_text())
    assert figures["top_10_unchanged"] == figures["queries"]
    assert f"weights times {scale}, rounded" in figures["quantisation"]
    assert not list(folder.glob("*.refused"))


def test_the_scale_is_the_first_that_keeps_the_order_by_hand():
    # 1.004 and 1.002 are 100 hundredths each, and 201 and 200 of 1/200: the first in the order of the model
    documents, queries = sp.csr_matrix([[1.002], [1.004]]), sp.csr_matrix([[1.0]])
    encoder, said = Encoder(None, ["a"], 1), []
    assert choose_scale(Lucene, encoder, [Sample([], [""], documents, queries)], said.append) == 200
    also = Sample([], [""], sp.csr_matrix([[1.0020], [1.0021]]), queries)  # 10020 and 10021 of 1/10,000; 5010 twice
    assert choose_scale(Lucene, encoder, [Sample([], [""], documents, queries), also], said.append) == 10_000
    assert said[1] == (
        "scale     10,000 (of 100, 200, 500, … the first that keeps the top 10 of all 2 checked queries in order)"
    )


def test_a_query_word_below_0_that_an_engine_does_not_take_explains_an_order_and_no_scale_is_chosen_for_it(
    tmp_path,
):
    queries, encoder = sp.csr_matrix([[1.0, -0.5]]), Encoder(None, ["a", "b"], 1)
    sample = Sample([], [""], sp.csr_matrix([[2.0, 0.0], [2.1, 1.0]]), queries)  # 2 and 1.6: without b, 2 and 2.1
    assert sample.keeps_top_10(Lucene(10), encoder.terms)
    figures = sample.compare(Lucene(10), encoder.terms, [{"a": 2.0}, {"a": 2.1, "b": 1.0}])
    assert figures["top_10_unchanged"] == 0
    said = []
    write_figures(tmp_path / "check.json", figures, said.append)
    assert said == [
        "checked   top 10 the same for 0 of 1 queries over 2 documents, as read back from the files",
        "          fine: the others swap documents within 20% of the best score (query weights below 0 are left out)",
    ]
    # but not by anything else
    with pytest.raises(ConfigError, match="the top 10 changes for 1 of 1 queries"):
        sample.compare(Lucene(1), encoder.terms, [{"a": 2.1}, {"a": 2.0, "b": 1.0}])


def test_a_scale_for_an_engine_that_takes_weights_as_they_are_is_refused(trained, corpus):  # noqa: F811
    with pytest.raises(ConfigError, match=r"^--scale is for whole numbers; qdrant takes weights as they are"):
        run_export("qdrant", corpus, scale=100)


def test_nothing_of_a_refused_export_is_left_under_the_name_of_a_finished_one(trained, corpus, monkeypatch):  # noqa: F811
    queries = trained / "queries.jsonl"
    queries.write_text('{"_id": "q", "text": "hvor"}\n')
    run_export("opensearch", corpus, queries=queries)
    folder = trained / "models/tiny/export/opensearch"
    finished = {file.name for file in folder.iterdir()}
    assert finished > {"documents-1-of-1.ndjson", "queries.jsonl", "check-1-of-1.json", "query", "document-model.zip"}

    def refuse(*arguments):
        raise ConfigError("not the same")

    monkeypatch.setattr(trainer.export.documents, "require_same_queries", refuse)
    with pytest.raises(ConfigError, match=r"^not the same\. The documents are set aside as .*1-of-1\.ndjson\.refused$"):
        run_export("opensearch", corpus, queries=queries)
    assert [file.name for file in folder.iterdir()] == ["documents-1-of-1.ndjson.refused"]


def test_a_refused_shard_leaves_the_others_as_they_are(trained, corpus):  # noqa: F811
    run_export("lucene", corpus, shard=Shard(1, 2))
    folder = trained / "models/tiny/export/lucene"
    file = folder / "documents-2-of-2.jsonl"
    file.write_text('{"id": "d9", "contents": "", "vector": {}}\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path != file}
    with pytest.raises(ConfigError, match="does not hold the documents of the corpus in their order"):
        run_export("lucene", corpus, shard=Shard(2, 2))
    assert not file.exists()
    assert {name: (folder / name).read_bytes() for name in before} == before
