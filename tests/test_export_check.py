"""An export that would rank differently is refused, and does not look finished afterwards."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

import trainer.export.documents
from tests.test_export import corpus, run_export  # noqa: F401, corpus is a fixture
from trainer.config import ConfigError
from trainer.export.check import Vectors, allowed_by, compare, largest_gap
from trainer.export.corpus import Shard


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


def vectors(queries, documents):
    return Vectors(sp.csr_matrix(np.array(queries, float)), sp.csr_matrix(np.array(documents, float)))


def compare_vectors(exact, exported, errors):
    return compare(exact.scores(), exported.scores(), allowed_by(exact, errors))


def test_scores_may_differ_by_what_the_stated_errors_add_up_to_and_no_more():
    exact = vectors([[1, 2]], [[3, 0], [0, 4]])  # scores 3 and 8
    errors = vectors([[0, 0]], [[0.1, 0], [0, 0.1]])  # hence up to 0.1 and 0.2
    figures = compare_vectors(exact, vectors([[1, 2]], [[3.1, 0], [0, 3.9]]), errors)
    assert figures["largest_difference"] == pytest.approx(0.2)
    assert figures["largest_allowed"] == pytest.approx(0.2, abs=1e-3)
    with pytest.raises(
        ConfigError, match=r"query 1 and document 2 have 7\.6000 instead of 8\.0000, where .* explains 0\.20"
    ):
        compare_vectors(exact, vectors([[1, 2]], [[3, 0], [0, 3.8]]), errors)
    with pytest.raises(ConfigError, match="score differently"):
        compare_vectors(exact, vectors([[1, 2]], [[3, 0], [0, np.nan]]), errors)


def test_an_order_that_changes_is_refused_except_among_near_ties():
    exact, errors = vectors([[1.0]], [[1.0], [0.9]]), vectors([[0]], [[0.1], [0.1]])
    with pytest.raises(ConfigError, match=r"the order of the best 10 changes: for query 1, .* 10\.0% apart"):
        compare_vectors(exact, vectors([[1.0]], [[0.9], [1.0]]), errors)
    near = vectors([[1.0]], [[1.0], [0.996]])
    figures = compare_vectors(near, vectors([[1.0]], [[0.99], [0.996]]), errors)
    assert (figures["top_10_unchanged"], figures["top_10_near_ties_swapped"]) == (0, 1)
    assert figures["largest_gap_swapped"] == pytest.approx(0.004)


def test_only_the_first_ten_places_count():
    wanted = np.arange(20, 0, -1.0)
    found = wanted.copy()
    found[[15, 16]] = found[[16, 15]]
    assert largest_gap(wanted, found) == 0
    found[[9, 10]] = found[[10, 9]]
    assert largest_gap(wanted, found) == pytest.approx(1 / 20)


def test_too_coarse_a_quantisation_is_refused(trained, corpus):  # noqa: F811
    with pytest.raises(ConfigError, match=r"the order of the best 10 changes: .* Quantise less: ARGS=.--scale 10."):
        run_export("lucene", corpus, scale=1)
    folder = trained / "models/tiny/export/lucene"
    assert [file.name for file in folder.iterdir() if not file.name.startswith("check-queries")] == [
        "documents-1-of-1.jsonl.refused"
    ]
    run_export("lucene", corpus, scale=1000)  # as the message says, and in the same folder
    assert (folder / "documents-1-of-1.jsonl").exists()
    assert not list(folder.glob("*.refused"))


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
