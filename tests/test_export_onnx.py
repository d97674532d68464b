"""The exported graph gives the model's vectors with onnxruntime alone, in every architecture."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import scipy.sparse as sp
from sentence_transformers import SparseEncoder

from tests.checkpoints import DOCUMENTS, QUERIES, nfd, write_dense, write_roberta
from tests.standins import COMMIT, SHAPES, write_norbert
from tests.test_export import put_model, run_export
from trainer.config import ConfigError
from trainer.export.onnx import Graph, compare_vectors, require_pooled_prompts

FOLDER = "models/tiny/export/onnx"
PROMPTS = ("model.prompts.query='hva er: '", "model.prompts.document='tekst: '")
LENGTHS = [DOCUMENTS[0], "kort", " ".join(DOCUMENTS) * 3, "", "😀"]  # one of them longer than the model reads

ALONE = """
import json, sys
from pathlib import Path
from example import Encoder
texts = json.loads(sys.argv[2])
encoder = Encoder(Path("."), sys.argv[1])
print(json.dumps([encoder.queries(texts).tolist(), encoder.documents(texts).tolist()]))
assert not {"torch", "transformers", "sentence_transformers", "trainer"} & set(sys.modules)
"""


def by_onnxruntime_alone(folder, texts, model="model.onnx"):
    """Vectors from the example, in a process that has nothing else."""
    script = folder / "alone.py"
    script.write_text(ALONE)
    found = subprocess.run(
        [sys.executable, script.name, model, json.dumps(texts)], cwd=folder, capture_output=True, text=True, check=True
    )
    return (np.array(vectors) for vectors in json.loads(found.stdout))


def build_other(trained, name):
    if name == "csr":
        put_model(trained, write_dense(trained), "csr", *PROMPTS)
    elif name == "roberta":
        put_model(trained, write_roberta(trained / "roberta"), "splade", *PROMPTS)
    elif name in SHAPES:
        pinned = ("model.trust_remote_code=true", f"model.revision='{COMMIT}'")
        put_model(trained, write_norbert(trained / "norbert", name), "inference-free-splade", *pinned)


@pytest.mark.parametrize(
    "name", ["tiny", "csr", "roberta", pytest.param("norbert3", marks=pytest.mark.slow), "norbert4"]
)
def test_queries_and_documents_of_any_length_have_the_models_vectors(trained, name):
    build_other(trained, name)
    run_export("onnx", None)
    model = SparseEncoder(str(trained / "models/tiny/final"), device="cpu", trust_remote_code=name in SHAPES)
    texts = [*QUERIES, *LENGTHS]
    found = by_onnxruntime_alone(trained / FOLDER, [*texts, *nfd(texts)])
    composed, decomposed = zip(*(np.split(vectors, 2) for vectors in found), strict=True)
    encode = {"convert_to_sparse_tensor": False, "show_progress_bar": False}
    expected = [model.encode_query(texts, **encode).numpy(), model.encode_document(texts, **encode).numpy()]
    if name == "csr":  # whose similarity is the cosine: the graph gives vectors of length 1
        expected = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in expected]
    assert (expected[1] > 0).sum() > 20
    for queries, documents in (composed, decomposed):
        np.testing.assert_allclose(queries, expected[0], atol=1e-4)
        np.testing.assert_allclose(documents, expected[1], atol=1e-4)


def test_a_model_whose_mean_leaves_the_prompt_out_is_refused(trained):
    model = put_model(trained, write_dense(trained), "csr", *PROMPTS)
    model[1].include_prompt = False
    with pytest.raises(ConfigError, match=r"^onnx: the dense model's pooling leaves the prompt's tokens out"):
        require_pooled_prompts(model)


def test_what_leaves_the_graph_is_one_weight_per_dimension_and_no_logits(trained):
    run_export("onnx", None)
    graph = onnx.load(trained / FOLDER / "model.onnx").graph
    onnx.checker.check_model(trained / FOLDER / "model.onnx")
    (output,) = graph.output
    assert [(d.dim_param or d.dim_value) for d in output.type.tensor_type.shape.dim] == ["texts", 800]
    assert [node.name for node in graph.input] == ["input_ids", "attention_mask"]
    figures = json.loads((trained / FOLDER / "check-model.json").read_text())
    assert (figures["queries"], figures["documents"], figures["top_10_unchanged"]) == (72, 256, 72)
    assert figures["largest_difference"] < 1e-3
    small, large = ((trained / FOLDER / name).stat().st_size for name in ("model_int8.onnx", "model.onnx"))
    assert small < large


def test_an_int8_graph_that_is_not_near_enough_is_left_out_and_a_float_graph_stops_the_export(trained, monkeypatch):
    exact = Graph("model.onnx", 1e-4, "float32", is_exact=True)
    int8 = Graph("model_int8.onnx", 1e-7, "int8", is_exact=False)
    monkeypatch.setattr("trainer.export.onnx.GRAPHS", (exact, int8))
    lines = run_export("onnx", None)
    assert any(line.startswith("left out  model_int8.onnx: a weight of model_int8.onnx is off by") for line in lines)
    assert not (trained / FOLDER / "model_int8.onnx").exists()
    monkeypatch.setattr("trainer.export.onnx.GRAPHS", (exact._replace(share=-1.0), int8))
    with pytest.raises(
        ConfigError, match=r"a weight of model\.onnx is off by .* of its text's largest, where -100 % is"
    ):
        run_export("onnx", None)
    assert not [file.name for file in (trained / FOLDER).iterdir() if file.suffix == ".onnx" or "check" in file.name]


def test_int8_may_change_an_order_within_its_stated_rounding_and_float32_may_not():
    queries, int8 = sp.csr_matrix([[1.0, 0.0]]), Graph("model_int8.onnx", 0.05, "int8", is_exact=False)
    exact, found = sp.csr_matrix([[1.0, 2.0], [0.95, 2.0]]), sp.csr_matrix([[0.96, 2.0], [0.97, 2.0]])
    figures = compare_vectors(int8, (queries, exact), (queries, found), looked_up=True)
    assert (figures["top_10_unchanged"], figures["engine"]) == (0, "int8")
    assert figures["largest_difference"] == pytest.approx(0.04)
    with pytest.raises(ConfigError, match=r"the top 10 changes for 1 of 1 queries, by 5% of the best score"):
        compare_vectors(int8._replace(is_exact=True), (queries, exact), (queries, found), looked_up=True)
    with pytest.raises(ConfigError, match=r"a weight of model_int8\.onnx is off by 2 % of .*, where 1 % is stated"):
        compare_vectors(int8._replace(share=0.01), (queries, exact), (queries, found), looked_up=True)


def test_a_corpus_is_not_taken_and_left_unread(trained):
    with pytest.raises(ConfigError, match=r"^onnx is the model itself: it takes no CORPUS, QUERIES or SHARD"):
        run_export("onnx", trained / "corpus.jsonl")


def test_the_example_prints_scores_and_words(trained):
    run_export("onnx", None)
    command = [sys.executable, "-I", "example.py", QUERIES[0], *DOCUMENTS]
    found = subprocess.run(command, cwd=trained / FOLDER, capture_output=True, text=True, check=True)
    scores = [float(line.split()[0]) for line in found.stdout.splitlines()]
    assert len(scores) == 4
    model = SparseEncoder(str(trained / "models/tiny/final"), device="cpu")
    wanted = model.similarity(model.encode_query(QUERIES[:1]), model.encode_document(DOCUMENTS))[0]
    assert scores == pytest.approx(wanted.tolist(), abs=2e-3)
