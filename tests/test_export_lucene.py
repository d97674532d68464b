"""Lucene itself, where Debian's liblucene8-java and a JDK are: it ranks what was exported as the model does."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.test_export import run_export
from trainer.data.sources import QUICKSTART
from trainer.export.bulk import Elasticsearch, OpenSearch, kept_bits
from trainer.export.check import compare_top_10, scores_of
from trainer.export.corpus import read_passages
from trainer.export.vectors import Encoder

CORPUS, QUERIES = QUICKSTART / "search/corpus.jsonl", QUICKSTART / "search/queries.dev.jsonl"
SEARCH = ROOT / "tests/lucene/Search.java"


@pytest.fixture(scope="module")
def jars():
    """The class path of Lucene."""
    found = [
        *Path("/usr/share/java").glob("lucene-core-*.jar"),
        *Path("/usr/share/java").glob("lucene-analyzers-common-*"),
    ]
    if len(found) < 2 or not shutil.which("javac"):
        pytest.skip("NOT RUN HERE: Lucene itself. On Debian: apt install liblucene8-java openjdk-17-jdk-headless")
    return ":".join(map(str, found))


def write_rows(file, rows):
    """id, and terms in base64 with their weights, after tabs."""
    file.write_text(
        "".join(
            "\t".join([name, *(str(x) for t, w in vector.items() for x in (base64.b64encode(t.encode()).decode(), w))])
            + "\n"
            for name, vector in rows
        )
    )


def search(jars, kind, folder, documents, queries):
    """Lucene's scores of every document for every query, and the ids of the ten best as it ranks them."""
    write_rows(folder / "documents.tsv", documents)
    write_rows(folder / "queries.tsv", queries)
    command = ["java", "-cp", jars, str(SEARCH), kind, "documents.tsv", "queries.tsv", str(len(documents))]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    number = {name: place for place, (name, _) in enumerate(documents)}
    scores, best = np.zeros((len(queries), len(documents))), []
    for row, line in enumerate(found.stdout.splitlines()):
        names, values = line.split("\t")[::2], line.split("\t")[1::2]
        scores[row, [number[name] for name in names]] = [float(value) for value in values]
        best.append([number[name] for name in names[:10]])
    assert len(best) == len(queries)
    return scores, best


@pytest.fixture
def exact(trained):
    """The model's own scores: [queries, documents]."""
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 64)
    queries = encoder.queries([passage.text for passage in read_passages(QUERIES)])
    documents = encoder.documents([passage.text for passage in read_passages(CORPUS)])
    return scores_of((queries.maximum(0), documents))[0]


def lines_of(trained, to, name):
    return [json.loads(line) for line in (trained / f"models/tiny/export/{to}/{name}").read_text().splitlines()]


def test_lucene_finds_the_top_ten_of_the_model_in_whole_numbers(trained, jars, exact):
    run_export("lucene", CORPUS, queries=QUERIES)
    scale = json.loads((trained / "models/tiny/export/lucene/export.json").read_text())["scale"]
    documents = [(row["id"], row["vector"]) for row in lines_of(trained, "lucene", "documents-1-of-1.jsonl")]
    queries = [(row["id"], row["vector"]) for row in lines_of(trained, "lucene", "queries.jsonl")]
    scores, best = search(jars, "impact", trained, documents, queries)
    assert (len(documents), len(queries)) == (256, 72)
    np.testing.assert_allclose(scores / scale**2, exact, atol=0.1 * 100 / scale)
    assert compare_top_10(exact, scores)["top_10_unchanged"] == 72
    top = [np.argsort(-row, kind="stable")[:10].tolist() for row in exact]
    same = sum(found == model for found, model in zip(best, top, strict=True))
    assert same >= 70  # in the others two scores are nearer than float32 tells apart
    # a scale that the check refuses does change what Lucene finds
    coarse = [[(name, {t: round(w / scale) for t, w in v.items() if round(w / scale)}) for name, v in rows]
              for rows in (documents, queries)]  # fmt: skip
    scores, _ = search(jars, "impact", trained, *coarse)
    assert compare_top_10(exact, scores)["top_10_unchanged"] < 36


@pytest.mark.parametrize("to,form", [("opensearch", OpenSearch()), ("elasticsearch", Elasticsearch())])
def test_a_feature_field_ranks_as_the_check_says_it_will(trained, jars, exact, to, form):
    run_export(to, CORPUS, queries=QUERIES)
    lines = lines_of(trained, to, "documents-1-of-1.ndjson")
    documents = [(a["index"]["_id"], d["vector"]) for a, d in zip(lines[::2], lines[1::2], strict=True)]
    queries = [(row["id"], form.read_query(json.dumps(row))) for row in lines_of(trained, to, "queries.jsonl")]
    scores, _ = search(jars, "feature", trained, documents, queries)
    # what Lucene keeps of a weight is what the check takes it to keep
    kept = [dict(zip(vector, kept_bits(list(vector.values())), strict=True)) for _, vector in documents]
    by_hand = np.array([[sum(w * d.get(t, 0.0) for t, w in query.items()) for d in kept] for _, query in queries])
    np.testing.assert_allclose(scores, by_hand, rtol=1e-5, atol=1e-5)
    # and no score is further off than the stated rounding adds up to
    assert scores.shape == (72, 256)
    np.testing.assert_allclose(scores, exact, rtol=form.document_rounding.share, atol=1e-5 * exact.max())
