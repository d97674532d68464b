"""Models that run inside OpenSearch: the query side as files, and zips for its ml-commons plug-in."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from sentence_transformers import SparseEncoder
from tokenizers import Tokenizer

import trainer.export.ml_commons
from tests.checkpoints import DOCUMENTS, QUERIES, nfd, write_bert, write_dense, write_roberta
from tests.conftest import ROOT
from tests.standins import COMMIT, SHAPES, write_norbert
from tests.test_export import corpus, put_model, run_export  # noqa: F401, corpus is a fixture
from trainer.config import ConfigError
from trainer.export.ml_commons import require_same_documents, traced, write_models
from trainer.export.query_side import queries_by_files, require_same_queries, write_query_tokenizer
from trainer.export.vectors import Encoder
from trainer.models.build import static_embedding

FOLDER = "models/tiny/export/opensearch"
LENGTHS = [*DOCUMENTS, "kort", " ".join(DOCUMENTS) * 3, "", "😀 3.14 ÅÆØ"]  # one of them longer than the model reads

# As its SparseEncodingTranslator does it: one text at a time, its two inputs by name, and words by decoding.
ALONE = """
import json, sys, zipfile, torch
from tokenizers import Tokenizer
zipfile.ZipFile(sys.argv[1]).extractall("unzipped")
model, tokenizer = torch.jit.load("unzipped/model.pt"), Tokenizer.from_file("unzipped/tokenizer.json")
found = []
for text in json.loads(sys.argv[2]):
    encoding = tokenizer.encode(text)
    inputs = {"input_ids": torch.tensor([encoding.ids]), "attention_mask": torch.tensor([encoding.attention_mask])}
    output = model(inputs)
    assert list(output) == ["output"] and output["output"].shape == (1, int(sys.argv[3]))
    weights = output["output"][0]
    numbers = weights.nonzero()[:, 0].tolist()
    found.append({tokenizer.decode([number], skip_special_tokens=True): weights[number].item() for number in numbers})
print(json.dumps(found))
assert not {"transformers", "sentence_transformers", "trainer"} & set(sys.modules)
"""


# ---------------------------------------------------------------------------------- OpenSearch's query side
def opensearch_query(folder, text):
    """As its tokenizer model does it: each different token, decoded alone, special ones left out; unlisted ones weigh 1."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    idf = json.loads((folder / "idf.json").read_text())
    names = {tokenizer.decode([token], skip_special_tokens=True) for token in tokenizer.encode(text).ids}
    return {name: idf.get(name, 1.0) for name in names if name}


def test_a_query_weighed_in_the_cluster_is_the_models_own(trained, corpus):  # noqa: F811
    run_export("opensearch", corpus)
    folder = trained / "models/tiny/export/opensearch/query"
    model = SparseEncoder(str(trained / "models/tiny/final"), device="cpu")
    for text, row in zip(QUERIES, model.encode_query(QUERIES, convert_to_sparse_tensor=False), strict=True):
        wanted = {model.tokenizer.convert_ids_to_tokens(int(i)): float(row[i]) for i in row.nonzero().flatten()}
        for form in (text, *nfd([text])):
            assert opensearch_query(folder, form) == pytest.approx(wanted, rel=1e-5)


def test_words_outside_the_alphabet_keep_their_bytes_apart_in_the_cluster(trained):
    model = put_model(trained, write_roberta(trained / "roberta"), "inference-free-splade")
    encoder = Encoder(model, model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer)))), 8)
    write_query_tokenizer(trained / "query", encoder, for_lucene=True)
    texts = ["😀 på fjellet", "ÅÆØ", " ".join(QUERIES * 9), *QUERIES]  # one of them longer than the model reads
    exact = encoder.queries(texts)
    assert abs(queries_by_files(trained / "query", texts, encoder.terms) - exact).max() < 1e-4
    assert len(opensearch_query(trained / "query", texts[0])) == exact[0].nnz
    # decoded as the tokenizer would by itself, half characters are all the same one
    tokenizer = model.tokenizer.backend_tokenizer
    decoded = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    assert len(set(decoded)) < len(decoded) - 50


def test_a_negative_query_weight_becomes_the_smallest_one_that_the_engine_takes(trained):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    ids = encoder.model.tokenizer("hvor", add_special_tokens=False)["input_ids"]
    static_embedding(encoder.model).weight.data[ids[0]] = -0.5
    write_query_tokenizer(trained / "query", encoder, for_lucene=True)
    idf = json.loads((trained / "query/idf.json").read_text())
    assert idf[encoder.terms[ids[0]]] == 1e-6
    assert min(idf.values()) > 0
    require_same_queries(trained / "query", ["hvor"], encoder.queries(["hvor"]), encoder.terms)


def test_query_files_that_were_changed_are_noticed(trained):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    write_query_tokenizer(trained / "query", encoder, for_lucene=True)
    file = trained / "query/idf.json"
    file.write_text(json.dumps({term: weight * 1.01 for term, weight in json.loads(file.read_text()).items()}))
    with pytest.raises(ConfigError, match="give another vector than the model for 'hvor ligger mjøsa'"):
        require_same_queries(trained / "query", QUERIES[:1], encoder.queries(QUERIES[:1]), encoder.terms)


def test_a_model_whose_queries_need_a_network_has_no_query_files(trained, corpus):  # noqa: F811
    put_model(trained, write_bert(trained / "bert"), "splade")
    run_export("opensearch", corpus)
    assert not (trained / "models/tiny/export/opensearch/query").exists()


# ---------------------------------------------------------------------------------- zips for ml-commons
def by_torch_alone(folder, texts, dimensions):
    """Words and weights of texts, in a process that has torch and tokenizers and nothing else."""
    command = [sys.executable, "-I", "-c", ALONE, "document-model.zip", json.dumps(texts), str(dimensions)]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


def build_other(trained, name):
    if name == "bert":
        put_model(trained, write_bert(trained / "bert"), "splade")
    elif name == "roberta":
        put_model(trained, write_roberta(trained / "roberta"), "inference-free-splade")
    elif name in SHAPES:
        pinned = ("model.trust_remote_code=true", f"model.revision='{COMMIT}'")
        put_model(trained, write_norbert(trained / "norbert", name), "inference-free-splade", *pinned)


@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "roberta", *SHAPES))]
)
def test_the_document_model_gives_the_models_words_and_weights_at_every_length(trained, name):
    build_other(trained, name)
    encoder, lines = Encoder.open(trained / "models/tiny/final", "cpu", 8), []
    write_models(trained, encoder, name, lines.append)
    model = SparseEncoder(str(trained / "models/tiny/final"), device="cpu", trust_remote_code=name in SHAPES)
    names = model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))
    vectors = model.encode_document(LENGTHS, convert_to_sparse_tensor=False)
    found = by_torch_alone(trained, [*LENGTHS, *nfd(LENGTHS)], len(names))
    assert found[len(LENGTHS) :] == found[: len(LENGTHS)]
    assert len(found[0]) > 5
    for words, row in zip(found, vectors, strict=False):
        wanted = {names[i]: float(row[i]) for i in row.nonzero().flatten().tolist()}
        assert {w: v for w, v in words.items() if v > 1e-4} == pytest.approx(
            {w: v for w, v in wanted.items() if v > 1e-4}, abs=1e-4
        )
        assert not set(words) & set(model.tokenizer.all_special_tokens)
    assert lines[-1].startswith("checked   document-model.zip in a process of its own: weights off by ")


@pytest.mark.parametrize("name", ["tiny", "norbert3", "norbert4"])
def test_the_document_model_has_no_operator_that_the_torch_of_opensearch_2_lacks(trained, name):
    build_other(trained, name)
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    config = encoder.model[0].sub_modules["document"][0].auto_model.config
    before = config._attn_implementation
    program = torch.jit.load(io.BytesIO(traced(encoder.model)))
    operators = {node.kind() for node in program.inlined_graph.nodes()}
    assert "aten::softmax" in operators
    assert "aten::scaled_dot_product_attention" not in operators
    assert config._attn_implementation == before == ("eager" if name == "norbert3" else "sdpa")


@pytest.mark.parametrize("digest", ["6343963aceb5024a", "a343963aceb5024a"])
def test_code_in_a_package_named_after_its_hash_is_read_again_whatever_the_hash(trained, monkeypatch, digest):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    own, name = type(encoder.model[0].sub_modules["document"][0].auto_model), f"transformers_modules.{digest}.modeling"
    monkeypatch.setattr(own, "__module__", name)
    torch.jit.load(io.BytesIO(traced(encoder.model)))
    assert own.__module__ == name


def test_no_path_of_this_machine_is_in_the_document_model(trained, monkeypatch):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    places = [str(place).encode() for place in (ROOT, trained, Path(torch.__file__).parents[1], Path.home() / ".")]
    places += [b"site-packages", b"trainer/export"]

    def records_with_a_place(program):
        with ZipFile(io.BytesIO(program)) as archive:
            assert "model/data.pkl" in archive.namelist()
            return [name for name in archive.namelist() if any(place in archive.read(name) for place in places)]

    assert records_with_a_place(traced(encoder.model)) == []
    monkeypatch.setattr(trainer.export.ml_commons, "without_debug_records", Path.read_bytes)
    as_torch_saves_it = records_with_a_place(traced(encoder.model))
    assert as_torch_saves_it and all(name.endswith(".debug_pkl") for name in as_torch_saves_it)


def test_special_tokens_have_no_weight_even_where_the_model_gives_them_one(trained):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    special = encoder.model.tokenizer.all_special_ids
    module = trainer.export.ml_commons.NeuralSparse(encoder.model).eval()
    module.graph.forward = lambda input_ids, attention_mask: torch.ones(1, len(encoder.terms))
    (weights,) = module({"input_ids": None, "attention_mask": None})["output"]
    assert (weights == 0).nonzero().flatten().tolist() == sorted(special)


def test_each_zip_is_registered_with_its_own_hash_and_size(trained, corpus):  # noqa: F811
    lines = run_export("opensearch", corpus)
    folder = trained / FOLDER
    for stem, name, function, files in (
        ("document-model", "tiny-document", "SPARSE_ENCODING", ["model.pt", "tokenizer.json"]),
        ("query-model", "tiny-query", "SPARSE_TOKENIZE", ["tokenizer.json", "idf.json"]),
    ):
        content = (folder / f"{stem}.zip").read_bytes()
        request = json.loads((folder / f"{stem}.json").read_text())
        assert request.pop("description")
        assert request == {
            "name": name,
            "version": "1.0.0",
            "model_format": "TORCH_SCRIPT",
            "function_name": function,
            "model_content_size_in_bytes": len(content),
            "model_content_hash_value": hashlib.sha256(content).hexdigest(),
        }
        with ZipFile(folder / f"{stem}.zip") as zipped:
            assert zipped.namelist() == files
            assert zipped.testzip() is None
        assert any(line.startswith(f"model     {FOLDER}/{stem}.zip (") for line in lines)
    with ZipFile(folder / "query-model.zip") as zipped:
        assert zipped.read("idf.json") == (folder / "query/idf.json").read_bytes()


@pytest.mark.slow
def test_a_document_model_that_gives_other_vectors_is_refused_and_removed(trained, monkeypatch):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    write_models(trained, encoder, "tiny", print)
    decoder = encoder.model[0].sub_modules["document"][0].auto_model.get_output_embeddings()
    with torch.no_grad():
        decoder.bias += 0.01
    with pytest.raises(
        ConfigError, match=r"^document-model\.zip gives another vector than the model for '.*off by 0\.0"
    ):
        require_same_documents(trained / "document-model.zip", encoder)
    monkeypatch.setattr(trainer.export.ml_commons, "TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match="gives another vector"):
        write_models(trained, encoder, "tiny", print)
    assert not list(trained.glob("document-model*"))


def test_a_zip_that_does_not_run_is_one_line(trained):
    encoder = Encoder.open(trained / "models/tiny/final", "cpu", 8)
    with ZipFile(trained / "document-model.zip", "w") as zipped:
        zipped.writestr("model.pt", b"no program")
        zipped.writestr("tokenizer.json", "{}")
    with pytest.raises(ConfigError, match=r"^document-model\.zip does not run in a process of its own: \S+"):
        require_same_documents(trained / "document-model.zip", encoder)


def test_a_model_with_a_prompt_has_documents_with_it_and_no_model_in_the_cluster(trained, corpus):  # noqa: F811
    model = put_model(
        trained, write_bert(trained / "bert"), "inference-free-splade", "model.prompts.document='tekst: '"
    )
    lines = run_export("opensearch", corpus)
    assert any("the document model: OpenSearch cannot put this model's prompt in front" in line for line in lines)
    assert not (trained / FOLDER / "document-model.zip").exists()
    _, first = (trained / FOLDER / "documents-1-of-1.ndjson").read_text().splitlines()[:2]
    text = json.loads(corpus.read_text().splitlines()[0])["text"]
    model.prompts = {}
    expected = model.decode(model.encode_document(f"tekst: {text}"))
    found = json.loads(first)["vector"]
    assert found and found == pytest.approx(dict(expected), abs=1e-4)


def test_a_csr_model_has_documents_and_an_index_and_no_models_in_the_cluster(trained, corpus):  # noqa: F811
    put_model(trained, write_dense(trained), "csr")
    lines = run_export("opensearch", corpus)
    assert [line for line in lines if "left out" in line] == [
        "left out  models to run in OpenSearch: its neural search needs words, and CSR's dimensions are none"
    ]
    names = {file.name for file in (trained / FOLDER).iterdir()}
    assert {"documents-1-of-1.ndjson", "index.json", "check-1-of-1.json"} <= names
    assert not [name for name in names if "model" in name or name == "query"]
