"""Parquet holds the model's vectors bit for bit, in whole files alone, whenever the export was killed."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import trainer.export.parquet
from tests.checkpoints import QUERIES, write_dense
from tests.conftest import ROOT
from tests.test_export import TEXTS, corpus, put_model, run_export  # noqa: F401, corpus is a fixture
from trainer.config import ConfigError
from trainer.export.corpus import Passage, Shard
from trainer.export.documents import write_documents
from trainer.export.parquet import Parquet, ParquetParts
from trainer.export.vectors import Encoder

FOLDER = "models/tiny/export/parquet"


def rows_of(files):
    return pyarrow.dataset.dataset(sorted(map(str, files))).to_table().to_pylist()


def test_vectors_are_those_of_the_model_to_the_last_bit(trained, corpus, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer.export.parquet, "PART", 30)
    queries = trained / "queries.jsonl"
    queries.write_text("".join(json.dumps({"_id": f"q{n}", "text": text}) + "\n" for n, text in enumerate(QUERIES)))
    lines = run_export("parquet", corpus, queries=queries)
    folder = trained / FOLDER
    files = sorted(folder.glob("documents-*.parquet"))
    assert [file.name for file in files] == [f"documents-1-of-1-{n:05d}.parquet" for n in (1, 2, 3)]
    assert [pq.read_metadata(file).num_rows for file in files] == [30, 30, 24]
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 64)
    for name, wanted, count in (
        ("documents", encoder.documents(TEXTS * 12), 84),
        ("queries", encoder.queries(QUERIES), 4),
    ):
        rows = rows_of(folder.glob(f"{name}-*.parquet"))
        assert [row["id"] for row in rows] == [f"{name[0]}{n}" for n in range(count)]
        for row, exact in zip(rows, wanted, strict=True):
            assert row["indices"] == sorted(row["indices"])
            found = np.zeros(800, dtype=np.float32)
            found[row["indices"]] = row["values"]
            assert (found == exact.toarray()[0]).all()
    words = pq.read_table(folder / "vocabulary.parquet").to_pylist()
    assert [row["index"] for row in words] == list(range(800))
    assert [row["token"] for row in words] == encoder.terms
    figures = json.loads((folder / "check-1-of-1.json").read_text())
    assert (figures["quantisation"], figures["top_10_unchanged"]) == ("float32", figures["queries"])
    assert lines[-1] == f"exported  84 documents to {FOLDER}/documents-1-of-1-*.parquet"


def test_the_example_of_the_export_page_reads_an_export(trained, corpus):  # noqa: F811
    run_export("parquet", corpus)
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
        if "pyarrow" in block
    ]
    names = {}
    exec(example.replace("models/quickstart", "models/tiny"), names)  # noqa: S102, the page's own lines
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 64)
    assert abs(names["documents"] - encoder.documents(TEXTS * 12)).max() == 0
    assert list(names["words"]) == encoder.terms


def test_dimensions_of_a_csr_model_are_their_numbers(trained, corpus):  # noqa: F811
    model = put_model(trained, write_dense(trained), "csr")
    run_export("parquet", corpus)
    words = pq.read_table(trained / FOLDER / "vocabulary.parquet")["token"].to_pylist()
    assert words == [str(number) for number in range(model.get_embedding_dimension())]
    rows = rows_of((trained / FOLDER).glob("documents-*.parquet"))
    assert [sum(v * v for v in row["values"]) for row in rows[:4]] == pytest.approx([1] * 4, abs=1e-5)


def test_a_changed_part_is_refused_and_set_aside(trained, corpus):  # noqa: F811
    run_export("parquet", corpus)
    file = trained / FOLDER / "documents-1-of-1-00001.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.take(list(range(len(rows)))[::-1]), file)
    with pytest.raises(ConfigError, match="does not hold the documents of the corpus in their order"):
        run_export("parquet", corpus)
    assert [path.name for path in (trained / FOLDER).iterdir()] == ["documents-1-of-1-00001.parquet.refused"]


# ---------------------------------------------------------------------------------- parts
class OneWord:
    """An encoder that gives text n the weight n in dimension n % 5."""

    terms = tuple("01234")

    def documents(self, texts, progress=None):
        numbers = np.array([int(text) for text in texts])
        return sp.csr_matrix((numbers.astype(np.float32), (np.arange(len(texts)), numbers % 5)), shape=(len(texts), 5))


def write(stem, count, echo=print):
    passages = (Passage(f"d{n}", str(n)) for n in range(1, count + 1))
    return write_documents(OneWord(), Parquet(), passages, ParquetParts(stem), echo)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A finished shard of 2,000 rows in parts of 512, of which what a kill leaves is made."""
    monkeypatch.setattr(trainer.export.parquet, "PART", 512)
    monkeypatch.setattr(trainer.export.parquet, "ROW_GROUP_WEIGHTS", 120)
    (tmp_path / "parts").mkdir()
    assert write(tmp_path / "parts/documents-1-of-1", 2000) == 2000
    return tmp_path / "parts"


def test_a_finished_shard_is_left_as_it_is(parts):
    before = contents(parts)
    assert len(before) == 4
    said = []
    assert write(parts / "documents-1-of-1", 2000, said.append) == 2000
    assert contents(parts) == before
    assert said == [f"resuming  {parts}/documents-1-of-1-*.parquet holds 2,000 documents"]


@pytest.mark.parametrize("cut", [1, 100, 0.5, 4, 0.9999])
def test_a_torn_part_is_never_taken_for_a_whole_one(parts, cut):
    before = contents(parts)
    second = parts / "documents-1-of-1-00002.parquet"
    size = second.stat().st_size
    os.truncate(second, size - cut if isinstance(cut, int) else int(size * cut))
    other = parts / "documents-1-of-10-00001.parquet.unfinished"  # another shard's
    other.write_bytes(b"PAR1")
    said = []
    assert write(parts / "documents-1-of-1", 2000, said.append) == 2000
    assert said[0].endswith("holds 512 documents")
    assert other.read_bytes() == b"PAR1"
    other.unlink()
    assert contents(parts) == before


def test_a_missing_part_and_an_unfinished_one_are_written_again(parts):
    before = contents(parts)
    (parts / "documents-1-of-1-00003.parquet").unlink()
    (parts / "documents-1-of-1-00004.parquet").rename(parts / "documents-1-of-1-00004.parquet.unfinished")
    assert write(parts / "documents-1-of-1", 2000) == 2000
    assert contents(parts) == before


@given(st.lists(st.integers(0, 700), max_size=6))
def test_parts_and_row_groups_hold_every_row_once_however_they_are_appended(tmp_path_factory, sizes):
    stem = tmp_path_factory.mktemp("parts") / "documents"
    store, rows = ParquetParts(stem), []
    for size in sizes:
        piece = [{"id": f"{len(rows) + n}", "indices": [n], "values": [0.5]} for n in range(size)]
        store.append(iter(piece))
        rows += piece
    store.close()
    assert ParquetParts(stem).recover() == len(rows)
    assert ParquetParts(stem).first(10**6) == rows


KILLED = """
import sys, time
sys.path[:0] = [{root!r}]
import trainer.export.parquet
from tests.test_export_parquet import OneWord, write
trainer.export.parquet.PART = 512
original = OneWord.documents
def slowly(self, texts, progress):
    print(texts[0], flush=True)
    time.sleep(0.05)
    return original(self, texts, progress)
OneWord.documents = slowly
from pathlib import Path
write(Path(sys.argv[1]), 5000)
"""


@pytest.mark.slow
def test_an_export_that_is_killed_goes_on_and_gives_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.export.parquet, "PART", 512)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole/documents-1-of-1", 5000)
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT)), str(tmp_path / "killed/documents-1-of-1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < 1500:
            pass
        process.send_signal(signal.SIGKILL)
    left = sorted((tmp_path / "killed").iterdir())
    assert 2 < len(left) < 10
    assert all(pq.read_metadata(file).num_rows == 512 for file in left if file.suffix == ".parquet")
    said = []
    assert write(tmp_path / "killed/documents-1-of-1", 5000, said.append) == 5000
    assert re.search(r"holds (1,024|1,536|2,048) documents", said[0])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "documents-00001.parquet.unfinished").symlink_to("/dev/full")
    store = ParquetParts(tmp_path / "documents")
    with pytest.raises(ConfigError, match=r"unfinished cannot be written: .*No space left.*To go on from there"):
        store.append([{"id": str(n), "indices": [1], "values": [0.5]} for n in range(9000)])
        store.close()


def test_shards_in_one_folder_are_read_as_one_data_set(trained, corpus):  # noqa: F811
    for number in (2, 1):
        run_export("parquet", corpus, shard=Shard(number, 2))
    rows = rows_of((trained / FOLDER).glob("documents-*.parquet"))
    assert sorted(row["id"] for row in rows) == sorted(f"d{n}" for n in range(84))
