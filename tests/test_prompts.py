import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SparseEncoder

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense
from tests.test_models import build, config_of
from trainer.config import ConfigError, load_config
from trainer.data.batches import text_ids
from trainer.data.tokens import Tokeniser
from trainer.encoding.encode import encode
from trainer.models.build import build_model, document_idf, fetch_base_model, load_model, save_model
from trainer.models.prompts import SETTINGS, own_prompts, prompt_lines
from trainer.runs.run import Run
from trainer.training.arguments import routes_of
from trainer.training.train import train

PROMPTS = {"query": "hva er: ", "document": "tekst: "}
GIVEN = [f"model.prompts.{side}='{text}'" for side, text in PROMPTS.items()]
BEFORE = {"query": [PROMPTS["query"] + text for text in QUERIES], "document": [f"tekst: {text}" for text in DOCUMENTS]}
PLAIN = {"query": QUERIES, "document": DOCUMENTS}


def with_prompts(folder, default=None, **prompts):
    """A saved model whose settings name these prompts."""
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | {"prompts": prompts, "default_prompt_name": default}))
    return folder


def given(architecture):
    return GIVEN[1:] if architecture == "inference-free-splade" else GIVEN


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "base")


# ------------------------------------------------------------------------------------------- whose they are
@pytest.mark.parametrize(
    "saved,query,document",
    [
        ({"query": "q: ", "document": "d: "}, "q: ", "d: "),
        ({"query": "q: ", "passage": "p: "}, "q: ", "p: "),
        ({"query": "q: ", "document": "", "corpus": "c: "}, "q: ", "c: "),
        ({"query": "", "document": "d: ", "passage": "p: "}, "", "d: "),
        ({"STS": "s: "}, "", ""),
    ],
)
def test_a_saved_models_prompts_are_found_under_every_name_the_library_knows(tmp_path, saved, query, document):
    (tmp_path / SETTINGS).write_text("{}")
    assert own_prompts(with_prompts(tmp_path, **saved)) == {"query": query, "document": document}


def test_a_csr_model_has_the_prompts_of_its_dense_model_and_its_vectors_underneath(tmp_path, dense):
    own = SentenceTransformer(str(with_prompts(dense, query="hva er: ", document="tekst: ")), device="cpu")
    model = build(tmp_path, dense, "csr")
    assert model.prompts == PROMPTS
    layer = model[-1]
    for side, encode_own in (("query", own.encode_query), ("document", own.encode_document)):
        expected = layer({"sentence_embedding": encode_own(PLAIN[side], convert_to_tensor=True)})["sentence_embedding"]
        np.testing.assert_allclose(encode(model, PLAIN[side], side, 2).toarray(), expected.detach(), atol=1e-5)


@pytest.mark.parametrize(
    "prompts,expected",
    [({"query": "", "document": ""}, []), ({"query": "a: "}, ['query "a: "', 'document "tekst: "'])],
)
def test_the_config_says_otherwise_and_the_plan_says_who_said_it(tmp_path, dense, prompts, expected):
    with_prompts(dense, "STS", **PROMPTS, STS="lik: ")
    overrides = [f"model.prompts.{side}='{text}'" for side, text in prompts.items()]
    config = config_of(tmp_path, dense, "csr", *overrides)
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")
    first, *rest = prompt_lines(config.model, dense, model.prompts)
    assert all(word in first for word in expected)
    assert first.startswith("prompts   none") == (not expected)
    assert 'query "hva er: "' in rest[0]
    assert rest[-1].endswith("neither a query's nor a document's: default \"lik: \"")


def test_nothing_is_said_where_there_is_no_prompt(tmp_path, bert):
    config = config_of(tmp_path, bert, "splade")
    assert list(prompt_lines(config.model, bert, {"query": "", "document": ""})) == []


def test_looked_up_queries_have_no_prompt_and_that_is_said(tmp_path, bert):
    (tmp_path / "base").mkdir()
    base = write_bert(tmp_path / "base")
    (base / SETTINGS).write_text(json.dumps({"prompts": PROMPTS}))
    config = config_of(tmp_path, base, "inference-free-splade")
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")
    assert model.prompts == {"query": "", "document": "tekst: "}
    said = list(prompt_lines(config.model, base, model.prompts))
    assert said == [
        'prompts   document "tekst: " (the base model\'s own)',
        '          not used, though the base model has it: query "hva er: " (its queries are only looked up)',
    ]


@pytest.mark.parametrize(
    "architecture,override,says",
    [
        ("inference-free-splade", GIVEN[0], "the same words, with the same weights, into every query"),
        ("splade", "model.prompts.document='  '", "'model.prompts.document' is blank"),
        ("splade", "model.prompts.passage=a", "unknown key 'model.prompts.passage'"),
    ],
)
def test_prompts_that_cannot_work_are_one_line(tmp_path, bert, architecture, override, says):
    with pytest.raises(ConfigError, match=says):
        config_of(tmp_path, bert, architecture, override)


def test_a_prompt_that_fills_the_whole_length_is_one_line(tmp_path, bert):
    with pytest.raises(ConfigError, match="8 tokens leave none for the text: the document prompt alone has"):
        build(tmp_path, bert, "splade", "training.max_seq_length=8", f"model.prompts.document='{'mjøsa ' * 9}'")


def test_a_prompt_survives_the_runs_own_config_file(tmp_path, bert):
    config_of(tmp_path, bert, "splade", *GIVEN)
    assert load_config(tmp_path / "config.yaml").config.model.prompts.model_dump() == PROMPTS


# ------------------------------------------------------------------------------------------- what they do
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_vectors_are_those_of_texts_with_the_prompt_written_in_front(tmp_path, bert, architecture):
    plain = build(tmp_path, bert, architecture, "model.query_init=ones")
    model = build(tmp_path, bert, architecture, "model.query_init=ones", *given(architecture))
    for side in PROMPTS:
        read = PLAIN if architecture == "inference-free-splade" and side == "query" else BEFORE
        expected = encode(plain, read[side], side, 2).toarray()
        assert np.array_equal(encode(model, PLAIN[side], side, 2).toarray(), expected)
        assert np.array_equal(encode(plain, PLAIN[side], side, 2).toarray(), expected) == (read is PLAIN)


def test_stock_sentence_transformers_and_a_checkpoint_keep_them(tmp_path, bert):
    config = config_of(tmp_path, bert, "splade", *GIVEN)
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")
    save_model(model, tmp_path / "saved")
    stock = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    expected = torch.tensor(encode(model, DOCUMENTS, "document", 4).toarray())
    torch.testing.assert_close(stock.encode_document(DOCUMENTS, convert_to_sparse_tensor=False), expected)
    assert load_model(tmp_path / "saved", config, "cpu").prompts == PROMPTS


@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_token_ids_are_those_of_texts_with_the_prompt_written_in_front(tmp_path, bert, architecture):
    config = config_of(tmp_path, bert, architecture, *given(architecture))
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")

    def tokens(queries, documents):
        rows = Dataset.from_dict({"anchor": queries, "positive": documents, "negative": documents[::-1]})
        made = Tokeniser(model, routes_of(config), print, keep=False).rows("a", rows, text_ids(rows), "content")
        return [[text.tolist() for text in column.texts(range(4))] for column in made.columns]

    long = [f"{text} {text} {text}" for text in DOCUMENTS]  # longer than max_seq_length, prompt included
    found = tokens(QUERIES, long)
    model.prompts = {"query": "", "document": ""}
    queries = BEFORE["query"] if architecture == "splade" else QUERIES
    assert found == tokens(queries, [f"tekst: {text}" for text in long])
    assert found != tokens(QUERIES, long)
    assert max(map(len, found[1])) == config.training.max_seq_length


def test_idf_is_counted_on_documents_as_the_model_reads_them(tmp_path, bert):
    settings = ["loss.regularizer=idf-flops", "loss.query_regularizer_weight=null"]
    config = config_of(tmp_path, bert, "inference-free-splade", *settings)
    plain = build_model(config, fetch_base_model(config), QUERIES, BEFORE["document"], "cpu")
    expected = document_idf(config, plain, lambda: BEFORE["document"])
    config = config_of(tmp_path, bert, "inference-free-splade", *settings, GIVEN[1])
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")
    assert torch.equal(document_idf(config, model, lambda: DOCUMENTS), expected)
    assert torch.equal(model[0].sub_modules["query"][0].weight, plain[0].sub_modules["query"][0].weight)


# ------------------------------------------------------------------------------------------- whole runs
def write_texts(folder, queries, documents):
    """Rows to train on and a search, of the same texts."""
    (folder / "search").mkdir(parents=True)
    rows = [
        json.dumps({"anchor": query, "positive": document}) for query, document in zip(queries, documents, strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows * 8))
    for name, texts in (("corpus", documents), ("queries.dev", queries)):
        lines = [json.dumps({"_id": str(number), "text": text}) for number, text in enumerate(texts)]
        (folder / "search" / f"{name}.jsonl").write_text("\n".join(lines))
    qrels = "".join(f"{number}\t{number}\t1\n" for number in range(len(queries)))
    (folder / "search" / "qrels.dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["splade", "csr"])
def test_a_run_with_prompts_is_the_run_whose_texts_have_them_written_in_front(tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    base = (write_dense if architecture == "csr" else write_bert)(tmp_path / "base")
    weights, scores, said = {}, {}, []
    runs = {"prompts": (PLAIN, GIVEN), "written": (BEFORE, []), "without": (PLAIN, [])}
    for name, (texts, overrides) in runs.items():
        write_texts(tmp_path / name, texts["query"], texts["document"])
        config_of(tmp_path, base, architecture, "training.max_steps=2", "training.per_device_train_batch_size=4",
                  f"evaluation.search=[{name}/search]", "datasets.quickstart.enabled=false",
                  f"datasets.own.source={name}/rows.jsonl", *overrides)  # fmt: skip
        run = Run.create(load_config(tmp_path / "config.yaml"), name)
        train(load_config(tmp_path / "config.yaml"), run, echo=said.append if name == "prompts" else lambda line: None)
        files = [load_file(file) for file in sorted(run.final.rglob("*.safetensors"))]
        weights[name] = torch.cat([tensor.flatten().float() for tensors in files for tensor in tensors.values()])
        scores[name] = run.manifest["before"], run.manifest["after"]
    # a frozen model encodes queries and documents with prompts apart, so sums are rounded otherwise in the last digit
    tolerance = 1e-5 if architecture == "csr" else 0.0
    torch.testing.assert_close(weights["prompts"], weights["written"], rtol=0.0, atol=tolerance)
    assert (weights["prompts"] - weights["without"]).abs().max() > 10 * tolerance
    assert scores["prompts"] == scores["written"]
    assert 'prompts   query "hva er: ", document "tekst: " (model.prompts)' in said
    assert json.loads((tmp_path / "models/prompts/run.json").read_text())["prompts"] == PROMPTS


# ------------------------------------------------------------------------------------------- other models' own
def test_a_dense_teacher_reads_its_own_prompts_and_is_known_by_them(tmp_path, dense, monkeypatch):
    from trainer.config.schema import ModelConfig, PromptsConfig, TeacherConfig
    from trainer.losses.teachers import add_teacher_scores

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    teacher = TeacherConfig(model=str(dense), kind="dense")
    with_prompts(dense)
    model = SentenceTransformer(str(dense), device="cpu")
    expected = model.similarity_pairwise(*(model.encode(BEFORE[side]) for side in PROMPTS))

    def scores(base=None):
        rows = DatasetDict({"a": Dataset.from_dict({"anchor": QUERIES, "positive": DOCUMENTS, "negative": DOCUMENTS})})
        scored, _ = add_teacher_scores({"a": rows}, teacher, "cpu", lambda line: None, base)
        return np.array(scored["a"]["label"])[:, 0]

    without = scores()
    base = ModelConfig(base_model=str(dense), architecture="csr", prompts=PromptsConfig(**PROMPTS))
    of_the_config = scores(base)  # the same model, which the config says reads prompts
    np.testing.assert_allclose(of_the_config, expected, atol=1e-5)
    assert not np.allclose(without, expected, atol=1e-5)
    with_prompts(dense, query=PROMPTS["query"], passage=PROMPTS["document"])  # which the library alone would not read
    np.testing.assert_allclose(scores(), expected, atol=1e-5)


def test_a_mining_model_reads_its_own_prompts(dense):
    from trainer.data.mining import load_dense
    from trainer.hub.download import Snapshot
    from trainer.models.prompts import prompts_of

    with_prompts(dense, query=PROMPTS["query"], passage=PROMPTS["document"])
    snapshot = Snapshot(str(dense), dense, None)
    model = load_dense(snapshot, "key", prompts_of(str(dense), dense, None), "cpu")
    np.testing.assert_allclose(model.encode_document(DOCUMENTS), model.encode(BEFORE["document"]), atol=1e-5)
    np.testing.assert_allclose(model.encode_query(QUERIES), model.encode(BEFORE["query"]), atol=1e-5)
