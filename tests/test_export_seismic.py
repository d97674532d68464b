"""Documents for Seismic: the index that it builds from them finds what exact scoring finds."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

from tests.test_export import run_export
from trainer.data.sources import QUICKSTART
from trainer.export.seismic import MAX_TERM, Seismic
from trainer.export.vectors import Encoder

FOLDER = "models/tiny/export/seismic"
# Every posting is kept and every block looked into: the search is exact but for the weights' 11 bits.
EXACT_INDEX = {
    "n_postings": 10**6,
    "max_fraction": 1e6,
    "centroid_fraction": 1.0,
    "min_cluster_size": 1,
    "doc_cut": 10**6,
}
EXACT_SEARCH = {"k": 10, "query_cut": 10**6, "heap_factor": 1.0}


def search(seismic, index, vector, **settings):
    """(document, score) of the ten best."""
    terms = np.array(list(vector), dtype=seismic.get_seismic_string())
    weights = np.array(list(vector.values()), dtype=np.float32)
    return [(name, score) for _, score, name in index.search("q", terms, weights, **(EXACT_SEARCH | settings))]


def test_the_engine_finds_the_top_ten_of_exact_scores_in_the_exported_files(trained):
    seismic = pytest.importorskip("seismic", reason="its wheel is for Linux on x86-64")
    given = [json.loads(line) for line in (QUICKSTART / "search/corpus.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (QUICKSTART / "search/queries.dev.jsonl").read_text().splitlines()]
    run_export("seismic", QUICKSTART / "search/corpus.jsonl", queries=QUICKSTART / "search/queries.dev.jsonl")
    file = trained / FOLDER / "documents-1-of-1.jsonl"
    index = seismic.SeismicIndex.build(str(file), summary_energy=1.0, **EXACT_INDEX)
    assert index.len == len(given) == 256
    written = [json.loads(line) for line in (trained / FOLDER / "queries.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [query["_id"] for query in asked]
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    texts = [" ".join(filter(None, (row.get("title"), row["text"]))) for row in given]
    scores = (encoder.queries([query["text"] for query in asked]) @ encoder.documents(texts).T).toarray()
    number = {row["_id"]: place for place, row in enumerate(given)}
    same, same_by_one_word = 0, 0
    for query, exact in zip(written, scores, strict=True):
        best = search(seismic, index, query["vector"])
        wanted = np.argsort(-exact, kind="stable")[:10]
        assert [score for _, score in best] == pytest.approx(exact[wanted].tolist(), rel=1e-3)
        # what rounding can put in another place has the same score but for that
        assert [exact[number[name]] for name, _ in best] == pytest.approx(exact[wanted].tolist(), rel=1e-3)
        names = {given[place]["_id"] for place in wanted}
        same += {name for name, _ in best} == names
        same_by_one_word += {name for name, _ in search(seismic, index, query["vector"], query_cut=1)} == names
    assert same >= 0.9 * len(asked)  # what is missing are ties at the tenth place
    assert same_by_one_word < 0.5 * len(asked)


def test_a_line_has_the_documents_id_its_text_and_every_digit_of_a_float():
    form = Seismic()
    line = form.document("side/7", "Å\nja", {"ja": 1.23456789, ".": 0.1})
    assert json.loads(line) == {"id": "side/7", "content": "Å\nja", "vector": {"ja": 1.23456789, ".": 0.1}}
    assert line.count("\n") == 1
    name, vector = form.read_document(line)
    assert name == "side/7"
    assert vector == {"ja": 1264 / 1024, ".": 1638 / 2**14}  # the nearest numbers with 11 significant bits


def test_the_stated_rounding_covers_what_float16_does_to_any_weight():
    form = Seismic()
    weights = np.float32(10.0) ** np.linspace(-9, 4, 500, dtype=np.float32)
    vector = {str(number): float(weight) for number, weight in enumerate(weights)}
    _, kept = form.read_document(form.document("d", "", vector))
    difference, stated = (
        np.abs(np.array(list(kept.values())) - weights),
        form.document_rounding.of(sp.csr_matrix(weights)).toarray()[0],
    )
    assert (difference <= stated).all()
    assert (difference > 0.9 * stated).any()  # no more than that is stated


def test_words_longer_than_the_engine_compares_have_a_name_of_their_own():
    tokens = ["a", "x" * MAX_TERM, "x" * (MAX_TERM + 1), "x" * (MAX_TERM + 2)]
    assert Seismic().terms(tokens) == ["a", "x" * MAX_TERM, "%2;", "%3;"]
