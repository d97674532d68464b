"""Points for Qdrant: its local mode finds what exact scoring finds."""

import json
import uuid

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from tests.checkpoints import QUERIES
from tests.test_export import TEXTS, corpus, run_export  # noqa: F401, corpus is a fixture
from trainer.config import ConfigError
from trainer.export.qdrant import Qdrant, point_id, upsert
from trainer.export.vectors import Encoder

FOLDER = "models/tiny/export/qdrant"


def search(client, vector):
    query = models.SparseVector(indices=vector.nonzero()[0].tolist(), values=vector[vector != 0].tolist())
    points = client.query_points("tiny", query=query, using="text", limit=10).points
    return [(point.payload["id"], point.score) for point in points]


def test_the_local_mode_ranks_as_exact_scores_do_and_uploading_twice_changes_nothing(trained, corpus):  # noqa: F811
    run_export("qdrant", corpus)
    for _ in range(2):
        assert upsert(trained / FOLDER, str(trained / "engine"), "tiny", print) == len(TEXTS) * 12
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    queries, documents = encoder.queries(QUERIES).toarray(), encoder.documents(TEXTS).toarray()
    client = QdrantClient(path=str(trained / "engine"))
    assert client.count("tiny").count == len(TEXTS) * 12
    for query in queries:
        scores = documents @ query
        best = search(client, query)
        assert [score for _, score in best] == pytest.approx(sorted(np.repeat(scores, 12), reverse=True)[:10], rel=1e-4)
        for name, score in best:
            assert scores[int(name[1:]) % len(TEXTS)] == pytest.approx(score, rel=1e-4)
    client.close()


def test_a_point_has_a_stable_uuid_sorted_dimensions_and_its_document_as_payload():
    form = Qdrant()
    assert form.terms(["a", "."]) == ["0", "1"]
    point = json.loads(form.document("side/7", "Å", {"10": 0.5, "9": 1.23456789}))
    assert point["vector"]["text"] == {"indices": [9, 10], "values": [1.23456789, 0.5]}
    assert point["payload"] == {"id": "side/7", "text": "Å"}
    assert uuid.UUID(point["id"]) == uuid.UUID(point_id("side/7")) != uuid.UUID(point_id("side/8"))


def test_a_query_word_with_a_negative_weight_keeps_it():
    form = Qdrant()
    line = form.query("1", "hvor", {"3": 2.0, "1": -0.5})
    assert json.loads(line)["query"]["query"] == {"indices": [1, 3], "values": [-0.5, 2.0]}
    assert form.read_query(line) == {"3": 2.0, "1": -0.5}


def test_a_server_that_does_not_answer_is_one_line(trained, corpus):  # noqa: F811
    run_export("qdrant", corpus)
    with pytest.raises(
        ConfigError, match=r"^Qdrant at http://127\.0\.0\.1:9 does not take the points: .*\. Run the command"
    ):
        upsert(trained / FOLDER, "http://127.0.0.1:9", "tiny", print)
