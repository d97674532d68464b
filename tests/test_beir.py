"""Folders in BEIR layout, as BEIR's downloads have them and as they are found elsewhere."""

import gzip
import json

import pytest

from trainer.config import ConfigError
from trainer.data.beir import files_beside, has_split, is_beir, read_corpus, read_search_set
from trainer.data.texts import Reading

CORPUS = [{"_id": "d1", "title": "Mjøsa", "text": "En innsjø."}, {"_id": "d2", "title": "", "text": "En elv."}]
QUERIES = [{"_id": "q1", "text": "hvilken innsjø"}, {"_id": "q2", "text": "hvilken elv"}]
HEADER = "query-id\tcorpus-id\tscore\n"
JUDGEMENTS = "q1\td1\t2\nq2\td2\t1\n"


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder, **files):
    """A folder with these files, in place of or beside the usual ones; '__' stands for a slash."""
    usual = {"corpus.jsonl": lines(CORPUS), "queries.jsonl": lines(QUERIES), "qrels/train.tsv": HEADER + JUDGEMENTS}
    for name, text in (usual | files).items():
        if text is not None:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def refusal(folder, split="train"):
    with pytest.raises(ConfigError) as caught:
        read_search_set(folder, split, "mine")
    return caught.value.format_message().replace(f"{folder}/", "").replace(str(folder), "folder")


def test_beirs_own_layout_reads_as_ours_does(tmp_path):
    own = write(tmp_path / "own")
    ours = {"queries.jsonl": None, "qrels/train.tsv": None}
    ours |= {"queries.train.jsonl": lines(QUERIES), "qrels.train.tsv": HEADER + JUDGEMENTS}
    expected = {"q1": {"d1": 2}, "q2": {"d2": 1}}
    for folder in (own, write(tmp_path / "ours", **ours)):
        found = read_search_set(folder, "train", "mine")
        assert is_beir(folder) and has_split(folder, "train") and not has_split(folder, "dev")
        assert (found.queries, found.relevant) == ({"q1": "hvilken innsjø", "q2": "hvilken elv"}, expected)
        assert found.corpus == {"d1": "Mjøsa En innsjø.", "d2": "En elv."}
        assert list(found.reading.lines()) == []


@pytest.mark.parametrize(
    "text",
    [
        JUDGEMENTS,
        "q\td\tgrade\n" + JUDGEMENTS,
        HEADER.replace("\n", "\r\n") + JUDGEMENTS.replace("\n", "\r\n"),
        "\n" + HEADER + JUDGEMENTS,
        "\ufeff" + JUDGEMENTS,
        "\ufeff" + HEADER + JUDGEMENTS,
        "q1 0 d1 2\nq2 0 d2 1\n",
        "q1\tQ0\td1\t2\n\nq2\tQ0\td2\t1\n",
        "q1\td1\t2.0\nq2\td2\t1.0\n",
    ],
)
def test_no_judgement_is_lost_whatever_form_they_have(tmp_path, text):
    folder = write(tmp_path, **{"qrels/train.tsv": text})
    assert read_search_set(folder, "train", "mine").relevant == {"q1": {"d1": 2}, "q2": {"d2": 1}}


def test_compressed_files_ids_that_are_numbers_and_other_names_of_ids_are_read(tmp_path):
    files = {
        "corpus.jsonl.gz": gzip.compress(lines([{"id": 1, "text": "\u00e5"}, {"_id": "2", "text": "b"}]).encode()),
        "queries.jsonl.gz": gzip.compress(("\ufeff" + lines([{"_id": 7, "text": "a"}])).encode()),
        "qrels/test.tsv.gz": gzip.compress(b"7\t1\t1\n"),
    }
    folder = write(tmp_path, **files, **{"corpus.jsonl": None, "queries.jsonl": None})
    found = read_search_set(folder, "test", "mine")
    assert (found.corpus, found.queries, found.relevant) == ({"1": "å", "2": "b"}, {"7": "a"}, {"7": {"1": 1}})
    assert files_beside(folder, "test") == ["qrels/train.tsv"]


def test_of_queries_that_splits_share_those_that_a_split_judges_are_its_own(tmp_path):
    folder = write(tmp_path, **{"qrels/dev.tsv": "q2\td1\t0\nq2\td2\t1\nq1\td2\t0\n"})
    found = read_search_set(folder, "dev", "mine")
    assert found.queries == {"q2": "hvilken elv"}
    assert list(found.reading.lines()) == ["not read: 1 queries without a relevant passage"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"queries.train.jsonl": ""}, "folder has queries.train.jsonl and queries.jsonl, which stand for the same"),
        ({"corpus.jsonl.gz": ""}, "folder has corpus.jsonl and corpus.jsonl.gz, which stand for the same"),
        ({"qrels/train.tsv": None, "qrels/dev.tsv": ""}, "has no qrels/train.tsv or qrels.train.tsv. "
            "It holds: corpus.jsonl, qrels/dev.tsv, queries.jsonl"),
        ({"qrels/train.tsv": "q1\td1\tx\n" + JUDGEMENTS}, "qrels/train.tsv:1: expected query-id, corpus-id and"),
        ({"qrels/train.tsv": "q1 d1 1\n"}, "qrels/train.tsv:1: expected query-id, corpus-id and a whole number"),
        ({"qrels/train.tsv": "q1\td1\t0.5\n"}, "qrels/train.tsv:1: expected query-id"),
        ({"qrels/train.tsv": b"q1\td1\t1\n\xff\n"}, "qrels/train.tsv:2: not text in UTF-8 (byte 0)"),
        ({"qrels/train.tsv": HEADER + "q1\td1\t1\nq2\td2\t1\nq1\td1\t2\n"},
            "qrels/train.tsv:4: passage 'd1' has grade 2 for query 'q1', and 1 in qrels/train.tsv:2"),
        ({"corpus.jsonl": lines([*CORPUS, {"_id": "d1", "text": "x"}])},
            "corpus.jsonl:3: the id 'd1' is also that of corpus.jsonl:1"),
        ({"corpus.jsonl": lines([{"_id": 1, "text": "x"}, {"_id": "1", "text": "y"}])},
            "corpus.jsonl:2: the id '1' is also that of corpus.jsonl:1"),
        ({"queries.jsonl": "\n" + lines([*QUERIES, QUERIES[1]])},
            "queries.jsonl:4: the id 'q2' is also that of queries.jsonl:3"),
        ({"corpus.jsonl": '{"_id": null, "text": "x"}'}, "corpus.jsonl:1: there is no '_id'"),
        ({"corpus.jsonl": '{"_id": 1.0, "text": "x"}'}, "corpus.jsonl:1: '_id' holds 1.0. An id is text or a whole"),
        ({"corpus.jsonl": '{"_id": true, "text": "x"}'}, "corpus.jsonl:1: '_id' holds true. An id is text or a whole"),
        ({"corpus.jsonl": '{"_id": "\\ud800", "text": "x"}'}, "corpus.jsonl:1: column '_id' holds half a character"),
        ({"corpus.jsonl": '{"_id": "d1", "text": ["x"]}'}, "corpus.jsonl:1: column 'text' holds [\"x\"], not text"),
        ({"corpus.jsonl": None, "corpus.jsonl.gz": gzip.compress(lines(CORPUS).encode())[:30]},
            "corpus.jsonl.gz: cannot be read: Compressed file ended"),
        ({"corpus.jsonl": None, "corpus.jsonl.gz": b"no gzip"}, "corpus.jsonl.gz: cannot be read: Not a gzipped file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, files, says):
    assert says in refusal(write(tmp_path, **files))


def test_a_judgement_that_stands_twice_counts_once_and_is_said(tmp_path):
    found = read_search_set(write(tmp_path, **{"qrels/train.tsv": JUDGEMENTS * 2}), "train", "mine")
    assert found.relevant == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    assert list(found.reading.lines()) == ["not read: 2 judgements that stand there twice"]


def test_texts_in_which_nothing_is_to_be_seen_stay_and_are_counted(tmp_path):
    corpus = [
        *CORPUS,
        {"_id": "d3", "text": None},
        {"_id": "d4", "text": "\u200b "},
        {"_id": "d5", "title": "e", "text": ""},
    ]
    queries = [QUERIES[0], {"_id": "q2", "text": ""}]
    folder = write(tmp_path, **{"corpus.jsonl": lines(corpus), "queries.jsonl": lines(queries)})
    found = read_search_set(folder, "train", "mine")
    assert (len(found.corpus), found.queries["q2"]) == (5, "")
    line = "3 passages or queries are without text, and stay in the search, where they find nothing"
    assert list(found.reading.lines()) == [line]


def test_texts_come_in_nfc_and_ids_as_they_are(tmp_path):
    corpus = [{"_id": "a\u030a", "text": "pa\u030a ga\u030arden", "url": "x"}, {"_id": "\u00e5", "text": "på gården"}]
    folder = write(tmp_path, **{"corpus.jsonl": lines(corpus)})
    assert read_corpus(folder, Reading()) == {"a\u030a": "på gården", "\u00e5": "på gården"}
