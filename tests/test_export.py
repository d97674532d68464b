"""Exports rank as the model does: read back from their files by hand, resumed, sharded, and refused when they would not."""

import itertools
import json
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SparseEncoder

import trainer.export.documents
from tests.checkpoints import DOCUMENTS, QUERIES, write_dense
from tests.conftest import run_trainer
from tests.test_models import build_from, config_of
from trainer.config import ConfigError
from trainer.export.bulk import Elasticsearch, OpenSearch, kept_bits
from trainer.export.corpus import Passage, Shard, read_passages, survey
from trainer.export.documents import claim, write_documents
from trainer.export.export import export
from trainer.export.formats import LineFile
from trainer.export.lucene import Lucene
from trainer.export.parquet import Parquet
from trainer.export.request import Request
from trainer.export.vectors import Encoder, escaped, matrix_of, require_distinct, vectors_of
from trainer.models.build import save_model
from trainer.runs.run import Run

TEXTS = [*DOCUMENTS, "3.14 er ikke et helt tall. Det vet alle.", "", "😀 på fjellet 100% sikkert"]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"_id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS * 12)))
    return file


def run_export(to, corpus, **settings):
    lines = []
    known = {
        "corpus": corpus,
        "queries": None,
        "output": None,
        "shard": Shard(1, 1),
        "scale": None,
        "echo": lines.append,
    }
    export(to, Request(Run.finished("tiny"), **(known | settings)))
    return lines


def put_model(trained, base, architecture, *overrides):
    """Another model in the place of the run's."""
    (trained / "other").mkdir()
    config = config_of(trained / "other", base, architecture, *overrides)
    (trained / "other/config.yaml").rename(trained / "models/tiny/config.yaml")
    model = build_from(config)
    save_model(model, trained / "models/tiny/final")
    return model


# ---------------------------------------------------------------------------------- whole exports
READ = {  # the vectors of the files, read by hand: documents, and queries
    "lucene": (
        lambda lines: {r["id"]: {t: w / 1000 for t, w in r["vector"].items()} for r in lines},
        lambda line: {t: w / 1000 for t, w in line["vector"].items()},
    ),
    "opensearch": (
        lambda lines: {a["index"]["_id"]: d["vector"] for a, d in zip(lines[::2], lines[1::2], strict=True)},
        lambda line: line["query"]["neural_sparse"]["vector"]["query_tokens"],
    ),
    "elasticsearch": (
        lambda lines: {a["index"]["_id"]: d["vector"] for a, d in zip(lines[::2], lines[1::2], strict=True)},
        lambda line: line["query"]["sparse_vector"]["query_vector"],
    ),
}


@pytest.mark.parametrize("to", READ)
def test_scores_added_up_from_the_files_are_those_of_the_model(trained, corpus, to):
    queries = trained / "queries.jsonl"
    queries.write_text("".join(json.dumps({"_id": f"q{n}", "text": text}) + "\n" for n, text in enumerate(QUERIES)))
    lines = run_export(to, corpus, queries=queries, scale=1000 if to == "lucene" else None)
    folder = trained / f"models/tiny/export/{to}"
    file = next(folder.glob("documents-1-of-1.*"))
    read_documents, read_query = READ[to]
    documents = read_documents([json.loads(line) for line in file.read_text().splitlines()])
    assert list(documents) == [f"d{n}" for n in range(len(TEXTS) * 12)]
    found = [read_query(json.loads(line)) for line in (folder / "queries.jsonl").read_text().splitlines()]
    model = SparseEncoder(str(trained / "models/tiny/final"), device="cpu")
    wanted = model.similarity(model.encode_query(QUERIES), model.encode_document(TEXTS))
    assert wanted.max() > 1
    for query, row in zip(found, wanted.tolist(), strict=True):
        for number, score in enumerate(row):
            vector = documents[f"d{number}"]
            assert sum(w * vector.get(term, 0) for term, w in query.items()) == pytest.approx(score, rel=0.02, abs=0.1)
    figures = json.loads((folder / "check-1-of-1.json").read_text())
    assert figures["documents_written"] == len(TEXTS) * 12
    assert figures["largest_score"] > 1
    assert 0 < figures["largest_difference"] < 2**-8 * figures["largest_score"]
    assert lines[-1] == f"exported  {len(TEXTS) * 12} documents to models/tiny/export/{to}/{file.name}"


def test_no_name_of_a_dimension_has_what_its_engine_does_not_take(trained, corpus):
    for to, forbidden in (("lucene", " \t\n"), ("elasticsearch", ".")):
        run_export(to, corpus)
        file = next((trained / f"models/tiny/export/{to}").glob("documents-*"))
        vectors = [row["vector"] for row in map(json.loads, file.read_text().splitlines()) if "vector" in row]
        names = {name for vector in vectors for name in vector}
        assert len(names) > 20
        assert not [name for name in names if set(name) & set(forbidden)]
        assert all(weight > 0 for vector in vectors for weight in vector.values())
        assert ("%2E;" if to == "elasticsearch" else ".") in names  # the full stop, which the documents have


def test_opensearch_and_elasticsearch_get_an_index_for_their_fields(trained, corpus):
    for to, kind in (("opensearch", "rank_features"), ("elasticsearch", "sparse_vector")):
        run_export(to, corpus)
        index = json.loads((trained / f"models/tiny/export/{to}/index.json").read_text())
        assert index["mappings"]["properties"]["vector"] == {"type": kind}


def test_texts_with_line_separators_of_other_kinds_stay_one_line(trained):
    text = "Mjøsa\u2028er Norges\u0085største\x0c innsjø\r\nog ligger på Østlandet"
    file = trained / "corpus.jsonl"
    file.write_text("".join(json.dumps({"_id": f"d\u2028{n}", "text": text}) + "\n" for n in range(3)))
    run_export("opensearch", file, queries=file)
    lines = (trained / "models/tiny/export/opensearch/documents-1-of-1.ndjson").read_text().split("\n")
    assert [json.loads(line)["index"]["_id"] for line in lines[:-1:2]] == [f"d\u2028{n}" for n in range(3)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line():
    with pytest.raises(ConfigError, match=r"^/dev/full cannot be written: No space left .* run this again"):
        LineFile(Path("/dev/full")).append(["{}\n"])


def test_a_parquet_corpus_gives_the_same_files_as_jsonl(trained, corpus):
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), trained / "corpus.parquet", row_group_size=10)
    run_export("lucene", corpus, output=trained / "one")
    run_export("lucene", trained / "corpus.parquet", output=trained / "two")
    name = "documents-1-of-1.jsonl"
    assert (trained / "one" / name).read_bytes() == (trained / "two" / name).read_bytes()


def test_documents_of_a_cosine_model_have_length_one(trained, corpus):
    model = put_model(trained, write_dense(trained), "csr")
    run_export("elasticsearch", corpus)
    file = trained / "models/tiny/export/elasticsearch/documents-1-of-1.ndjson"
    vectors = [row["vector"] for row in map(json.loads, file.read_text().splitlines()) if "vector" in row]
    assert [sum(w * w for w in vector.values()) for vector in vectors[:4]] == pytest.approx([1] * 4, abs=1e-4)
    assert set(vectors[0]) <= {str(number) for number in range(model.get_embedding_dimension())}


def test_the_command_says_what_it_did(trained, corpus):
    result = run_trainer(trained, "export", "tiny.yaml", "--to", "lucene", "--corpus", "corpus.jsonl")
    assert result.returncode == 0, result.stderr
    assert "exported  84 documents to models/tiny/export/lucene/documents-1-of-1.jsonl" in result.stdout


def test_an_engine_that_is_not_known_and_a_corpus_that_is_not_named_are_one_line(trained, corpus):
    with pytest.raises(ConfigError, match=r"^--to solr: known are lucene, opensearch, elasticsearch"):
        run_export("solr", corpus)
    with pytest.raises(
        ConfigError, match=r"^say which documents to encode for lucene: CORPUS=file\.jsonl \(--corpus\)"
    ):
        run_export("lucene", None)


# ---------------------------------------------------------------------------------- resuming and shards
def test_an_export_that_was_killed_goes_on_where_it_stopped_and_gives_the_same_file(trained, corpus, monkeypatch):
    monkeypatch.setattr(trainer.export.documents, "CHUNK", 10)
    run_export("elasticsearch", corpus, output=trained / "whole")
    encoded = []
    original = Encoder.documents

    def killed_at_the_fourth_chunk(self, texts, *progress):
        encoded.append(len(texts))
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return original(self, texts, *progress)

    monkeypatch.setattr(Encoder, "documents", killed_at_the_fourth_chunk)
    with pytest.raises(KeyboardInterrupt):
        run_export("elasticsearch", corpus, output=trained / "killed")
    file = trained / "killed/documents-1-of-1.ndjson"
    assert file.read_text().count("\n") == 60
    with file.open("a") as torn:
        torn.write('{"index": {"_id": "d30"}}\n{"text": "Mjøsa er No')
    lines = run_export("elasticsearch", corpus, output=trained / "killed")
    assert f"resuming  {file} holds 30 documents" in lines
    assert sum(encoded[4:-1]) == 84 - 30  # the last call is the check's
    assert file.read_bytes() == (trained / "whole/documents-1-of-1.ndjson").read_bytes()


def test_shards_together_hold_every_document_once(trained, corpus):
    said = [run_export("lucene", corpus, shard=Shard(number, 3)) for number in (2, 3, 1)]
    # the one that comes first chooses the scale for all, from what each of them will check
    assert [sum(line.startswith("scale") for line in lines) for lines in said] == [1, 0, 0]
    checked = [json.loads((trained / f"models/tiny/export/lucene/check-{n}-of-3.json").read_text()) for n in (1, 2, 3)]
    assert len({figures["quantisation"] for figures in checked}) == 1
    assert f"of all {sum(figures['queries'] for figures in checked)} checked queries" in " ".join(said[0])
    files = sorted((trained / "models/tiny/export/lucene").glob("documents-*.jsonl"))
    ids = [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in files]
    assert ids[1][:3] == ["d1", "d4", "d7"]
    assert sorted(name for shard in ids for name in shard) == sorted(f"d{n}" for n in range(84))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_written_as_number_and_count(text):
    with pytest.raises(ConfigError, match=f"^--shard {text}: write it as number/of"):
        Shard.parse(text)


@pytest.mark.parametrize("written,whole", [("", 0), ("a\nb\n", 1), ("a\nb\nc\n", 1), ("a\nb\nc\nd", 1), ("a\nb", 0)])
def test_only_whole_documents_stay_of_a_file(tmp_path, written, whole):
    file = tmp_path / "documents"
    file.write_text(written)
    assert LineFile(file, 2).recover() == whole
    assert file.read_text() == "a\nb\n" * whole


def never():
    raise AssertionError("a scale is noted")


@pytest.mark.parametrize("key,value", [("model", "b"), ("scale", 7), ("shards", 2), ("corpus", {"bytes": 3})])
def test_an_export_is_not_continued_with_something_else(tmp_path, key, value):
    made_with = {"model": "a", "shards": 1, "corpus": {"bytes": 2}}
    assert claim(tmp_path / "export", made_with, 100, lambda: 100) == 100
    assert claim(tmp_path / "export", made_with, 100, never) == 100
    changed = (made_with, value) if key == "scale" else (made_with | {key: value}, 100)
    with pytest.raises(ConfigError, match=rf"holds an export with another {key}\. Remove the folder"):
        claim(tmp_path / "export", *changed, never)


def test_the_scale_that_is_noted_first_is_that_of_every_shard(tmp_path):
    made_with, folder = {"model": "a"}, tmp_path / "export"

    def chosen_while_another_shard_notes_its_own():
        claim(folder, made_with, None, lambda: 200)
        return 500

    assert claim(folder, made_with, None, chosen_while_another_shard_notes_its_own) == 200
    assert claim(folder, made_with, None, never) == 200
    assert json.loads((folder / "export.json").read_text()) == {"model": "a", "scale": 200}
    assert [file.name for file in folder.iterdir()] == ["export.json"]


@pytest.mark.slow  # half a million documents
@pytest.mark.parametrize("to", ["lucene", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, to):
    class Constant:
        terms = tuple("01234")

        def documents(self, texts, progress):
            return sp.csr_matrix(np.ones((len(texts), 5), dtype=np.float32))

    form = {"lucene": Lucene(100), "parquet": Parquet()}[to]

    def peak_of(count):
        corpus = tmp_path / f"{count}.jsonl"
        with corpus.open("w") as out:
            out.writelines(f'{{"_id": "{n}", "text": "document {n}"}}\n' for n in range(count))
        tracemalloc.start()
        arrow = pa.total_allocated_bytes()  # not Python's memory: parquet's buffers
        store = form.documents_at(tmp_path / f"out-{count}")
        assert write_documents(Constant(), form, read_passages(corpus), store, print) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pa.total_allocated_bytes() <= arrow + 2**20
        assert len(store.first(300)) == 300
        return peak

    small, large = peak_of(20_000), peak_of(250_000)
    assert large < small + 2 * 230_000  # two bytes for each document more


# ---------------------------------------------------------------------------------- reading a corpus
@pytest.mark.parametrize(
    "line,message",
    [
        ('{"text": "a"}', "corpus.jsonl:1: there is no '_id'. The row has: text"),
        ('{"_id": "1", "body": "a"}', "corpus.jsonl:1: there is no column 'text'. The line has: _id, body"),
        ('{"_id": "", "text": "a"}', "corpus.jsonl:1: '_id' is empty"),
        ('{"_id": "1", "text": 3}', "corpus.jsonl:1: column 'text' holds 3, not text"),
        ("[1]", "corpus.jsonl:1: a line must be an object"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_document_is_named(tmp_path, line, message):
    file = tmp_path / "corpus.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        list(read_passages(file))
    assert message in str(caught.value)


def test_a_title_stands_in_front_of_its_text_and_other_names_are_known(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"_id": 7, "title": "Mjøsa", "text": "en innsjø"}\n{"id": "x", "contents": "to"}\n')
    assert list(read_passages(file)) == [Passage("7", "Mjøsa en innsjø"), Passage("x", "to")]


def write_corpus(file, ids):
    rows = [{"_id": name, "text": "pa\u030a", "url": "x"} for name in ids]
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_id_that_stands_twice_is_named_with_both_places(tmp_path, suffix):
    ids = [f"d{n}" for n in range(3_000)]
    file = write_corpus(tmp_path / f"corpus.{suffix}", ids)
    assert list(survey(file).lines()) == [
        "not read: columns url",
        "3,000 texts were not in Unicode's form NFC, and are now",
    ]
    assert next(read_passages(file)).text == "på"
    write_corpus(file, [*ids, "d7"])
    with pytest.raises(ConfigError, match=rf"corpus.{suffix}:3001: the id 'd7' is also that of \S+{suffix}:8\. Give"):
        survey(file)


def test_reading_a_corpus_to_its_end_shows_how_far_it_has_come(tmp_path, monkeypatch, capfd):
    seconds = itertools.count(1000.0)
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))  # a second passes between two looks at the clock
    survey(write_corpus(tmp_path / "corpus.jsonl", ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]))
    assert re.match(r"reading   corpus.jsonl: [3-7] documents, ", capfd.readouterr().out)


def test_ids_of_one_hash_are_no_ids_that_stand_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.export.corpus.hash", lambda name: 1, raising=False)
    file = write_corpus(tmp_path / "corpus.jsonl", ["a", "b", "c"])
    survey(file)
    with pytest.raises(ConfigError, match="jsonl:4: the id 'b' is also that of"):
        survey(write_corpus(file, ["a", "b", "c", "b"]))


@pytest.mark.parametrize("given", ["corpus", "queries"])
def test_nothing_is_written_when_an_id_stands_twice(trained, corpus, given):
    twice = write_corpus(trained / "twice.jsonl", ["1", "1"])
    with pytest.raises(ConfigError, match=r"twice\.jsonl:2: the id '1' is also that of"):
        run_export("opensearch", **({"corpus": corpus} | {given: twice}))
    assert not list(trained.glob("models/tiny/export/opensearch/documents*"))


# ---------------------------------------------------------------------------------- formats, by hand
def test_lucene_weights_are_rounded_hundredths_and_what_rounds_to_nothing_is_left_out():
    form = Lucene(100)
    line = form.document("7", "Å nei", {"å": 1.236, "nei": 0.0149, "bort": 0.004})
    assert json.loads(line) == {"id": "7", "contents": "Å nei", "vector": {"å": 124, "nei": 1}}
    assert line.endswith("}\n")
    assert form.read_document(line) == ("7", {"å": 1.24, "nei": 0.01})


def test_bulk_lines_are_an_action_and_a_document():
    action, document = Elasticsearch(100).document("7", "a\nb", {"å": 1.23456789}).splitlines()
    assert json.loads(action) == {"index": {"_id": "7"}}
    assert json.loads(document) == {"text": "a\nb", "vector": {"å": 1.23456789}}


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_the_bits_that_lucene_keeps_are_the_upper_seventeen(weight):
    bits = struct.unpack(">I", struct.pack(">f", weight))[0]
    kept = struct.unpack(">f", struct.pack(">I", bits & 0xFFFF8000))[0]
    assert kept_bits([weight]) == [kept]
    assert 0 <= weight - kept < weight * 2**-8


def test_a_query_weight_above_what_lucene_takes_is_refused():
    with pytest.raises(ConfigError, match=r"query 'hvor' has a weight of 64\.5; the engine takes 64 at most"):
        OpenSearch(100).query("1", "hvor", {"hvor": 64.5})


@given(st.lists(st.text(), unique=True))
def test_names_of_dimensions_never_become_one_by_escaping(terms):
    for form in (Lucene(1), Elasticsearch(1)):
        assert len(set(form.terms(terms))) == len(terms)


def test_what_is_escaped_can_be_read():
    def is_dot(character):
        return character == "."

    assert [escaped(term, is_dot) for term in ("a.b", "a_b", "100%", "a%2E;b", "")] == [
        "a%2E;b", "a_b", "100%25;", "a%25;2E;b", "%;",
    ]  # fmt: skip


def test_two_dimensions_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="dimensions 0 and 2 have one name in this engine, 'a'"):
        require_distinct(["a", "b", "a"])


def test_vectors_are_positive_heaviest_first_and_read_back():
    rows = sp.csr_matrix(np.array([[0.5, 0, -1, 2], [0, 0, 0, 0]]))
    vectors = list(vectors_of(rows, ["a", "b", "c", "d"]))
    assert [list(vector.items()) for vector in vectors] == [[("d", 2.0), ("a", 0.5)], []]
    assert matrix_of(vectors, ["a", "b", "c", "d"]).toarray().tolist() == [[0.5, 0, 0, 2], [0, 0, 0, 0]]
    with pytest.raises(ConfigError, match="a term that is no dimension of the model: 'e'"):
        matrix_of([{"e": 1.0}], ["a"])
