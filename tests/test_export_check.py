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
from trainer.export.check import Rule, Weights, compare, explained, swapped
from trainer.export.corpus import Shard
from trainer.export.lines import Lucene, OpenSearch, kept_bits
from trainer.export.sample import Sample, choose_scale
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
    with pytest.raises(ConfigError, match=r"the exported files score differently: .* The export is not to be used"):
        run_export("lucene", corpus)


def same_order(queries, documents):
    """Nothing may change the order."""
    return Rule(queries, documents)


def rounded_by_engine(queries, documents, **settings):
    """The engine may."""
    return Rule(queries, documents, engine="it rounds", **settings)


def weights(rows, lower=0.0, higher=0.0):
    rows = np.array(rows, float)
    return Weights(rows, np.broadcast_to(lower, rows.shape), np.broadcast_to(higher, rows.shape))


def test_scores_may_differ_by_what_the_stated_rounding_adds_up_to_and_no_more():
    queries, documents = weights([[1, 2]]), weights([[3, 0], [0, 4]], 0.1, 0.1)  # scores 3 and 8, 0.3 lower or higher
    figures = compare(queries, documents, np.array([[3.3, 7.7]]), same_order(queries, documents))
    assert figures["largest_difference"] == pytest.approx(0.3)
    assert figures["largest_allowed"] == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(
        ConfigError, match=r"query 1 and document 2 have 7\.6000 instead of 8\.0000, where .* explains 0\.30"
    ):
        compare(queries, documents, np.array([[3, 7.6]]), same_order(queries, documents))
    with pytest.raises(ConfigError, match="score differently"):
        compare(queries, documents, np.array([[3, np.nan]]), same_order(queries, documents))


def test_where_the_precision_is_ours_no_order_changes_but_that_which_float32_does_not_know():
    query, near = weights([[1.0]]), weights([[1.0], [0.999999]], 0.1, 0.1)
    assert compare(query, near, np.array([[0.98, 0.99]]), same_order(query, near))["top_10_unchanged"] == 1
    apart = weights([[1.0], [0.9999]], 0.1, 0.1)
    with pytest.raises(
        ConfigError, match=r"query 1, documents change places whose scores are 0\.0100% of the best apart"
    ):
        compare(query, apart, np.array([[0.98, 0.99]]), same_order(query, apart))


def test_where_the_engine_rounds_only_two_documents_whose_own_rounding_explains_it_change_places():
    # by hand: the better one's first word may be stored as low as 1.9; the worse one is stored as it is
    query, documents = weights([[1.0, 1.0]]), weights([[2.0, 1.0], [0.0, 2.91]], [[0.1, 0.0], [0.0, 0.0]])
    figures = compare(query, documents, np.array([[2.9, 2.91]]), rounded_by_engine(query, documents))
    assert (figures["top_10_unchanged"], figures["pairs_swapped"]) == (0, 1)
    assert figures["largest_gap_swapped"] == pytest.approx(0.03)
    assert figures["largest_share_of_what_is_explained"] == pytest.approx(0.9, abs=1e-3)
    # scores of 11.6 and 10.9, as low as 10.6 and 9.9: but 10 is never stored below what 9.5 is, which leaves 0.5 to lose
    documents = weights([[10.0, 1.6], [9.5, 1.4]], [[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ConfigError, match=r"6\.0345% of the best apart; the engine explains 4\.31% for these two"):
        compare(query, documents, np.array([[10.6, 10.9]]), rounded_by_engine(query, documents))


def test_a_word_that_weighs_the_same_to_both_documents_explains_nothing_that_a_lighter_one_does_not():
    # a heavy shared word rounds by 1 in either document, but never so that the lighter becomes the heavier
    documents = weights([[10.0, 1.0], [9.0, 1.5]], [[1.0, 0.0], [1.0, 0.0]], 0.0)
    queries = weights([[1.0, 1.0]])
    assert explained(rounded_by_engine(queries, documents), 0, 0, 1) == pytest.approx(1.0, abs=1e-3)
    more = weights([[10.0, 1.0], [9.5, 1.4]], [[1.0, 0.0], [1.0, 0.0]], 0.0)  # 0.5 of which are all there is to lose
    assert explained(rounded_by_engine(queries, more), 0, 0, 1) == pytest.approx(0.5, abs=1e-3)
    assert explained(rounded_by_engine(queries, more, monotone=False), 0, 0, 1) == pytest.approx(1.0, abs=1e-3)


@given(st.integers(0, 10**6))
def test_whatever_nine_bits_do_to_an_order_is_explained(seed):
    random = np.random.default_rng(seed)
    form = OpenSearch()
    rows = random.gamma(1.0, 1.0, (20, 4)) * (random.random((20, 4)) < 0.7)
    documents = Weights.of(rows, form.document_rounding)
    stored = np.array([kept_bits(row) for row in rows.tolist()])
    queries = weights(random.gamma(1.0, 1.0, (3, 4)))
    figures = compare(queries, documents, queries.exact @ stored.T, rounded_by_engine(queries, documents))
    assert figures["largest_share_of_what_is_explained"] <= 1
    assert (rows - documents.lower <= stored).all() and (stored <= rows + 1e-6).all()


def test_only_the_first_ten_places_count():
    wanted = np.arange(20, 0, -1.0)[None]
    found = wanted.copy()
    found[0, [15, 16]] = found[0, [16, 15]]
    assert list(swapped(wanted, found)) == []
    found[0, [9, 10]] = found[0, [10, 9]]
    assert list(swapped(wanted, found)) == [(0, 9, 10)]
    # one that falls from the first place to the last has changed places with the ten that are seen
    found = wanted.copy()
    found[0, 0] = 0
    assert list(swapped(wanted, found)) == [(0, 0, worse) for worse in range(1, 11)]


def test_a_scale_given_by_hand_that_changes_the_order_is_refused_and_the_one_chosen_does_not(trained, corpus):  # noqa: F811
    with pytest.raises(ConfigError, match=r"the order of the best 10 changes: .* Quantise less, ARGS=.--scale 10., or"):
        run_export("lucene", corpus, scale=1)
    folder = trained / "models/tiny/export/lucene"
    assert [file.name for file in folder.iterdir() if not file.name.startswith("check-queries")] == [
        "documents-1-of-1.jsonl.refused"
    ]
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


def test_a_query_word_below_0_that_an_engine_does_not_take_explains_an_order_and_no_scale_is_chosen_for_it():
    queries, encoder = sp.csr_matrix([[1.0, -0.5]]), Encoder(None, ["a", "b"], 1)
    sample = Sample([], [""], sp.csr_matrix([[2.0, 0.0], [2.1, 1.0]]), queries)  # 2 and 1.6: without b, 2 and 2.1
    assert sample.stays_in_order(Lucene(10), encoder.terms)
    figures = sample.compare(Lucene(10), encoder.terms, [{"a": 1.0}], [{"a": 2.0}, {"a": 2.1, "b": 1.0}])
    assert figures["pairs_swapped"] == 1
    assert figures["largest_share_of_what_is_explained"] == pytest.approx(0.4 / 0.5, abs=1e-3)
    assert "(query weights below 0 are left out)" in figures["rule"]


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
    left = {file.name for file in folder.iterdir()}
    assert left == {"documents-1-of-1.ndjson.refused", "check-queries-1-of-1.jsonl"}
    assert left & finished == {"check-queries-1-of-1.jsonl"}


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
