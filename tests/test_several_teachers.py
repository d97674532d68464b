"""Lists of negatives, scores in the data, several teachers, and teachers that compare all passages of a batch."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import CrossEncoder, SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense
from tests.conftest import TINY, run_trainer
from tests.test_data import load, write_lines
from tests.test_models import build, config_of
from tests.test_teachers import own_cache, write_cross_encoder  # noqa: F401  a fixture
from tests.test_training import manifest
from trainer.config import ConfigError, load_config
from trainer.config.schema import OneOfTeachers, TeacherConfig, TeacherModels
from trainer.data.bm25 import BM25Index
from trainer.data.further_queries import SharedPassages
from trainer.data.teacher_scores import mean_scores
from trainer.losses import teacher_models
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.losses.teacher_vectors import Texts, batch_scores, bm25_vectors
from trainer.losses.teachers import add_teacher_scores
from trainer.models.build import save_model
from trainer.runs.run import Run
from trainer.training.prepare import Decisions, check, decide_teacher
from trainer.training.train import train

ROLES = ["positive", "negative", "negative2", "negative3"]


def rows(width=3):
    """Each query with one document, and the next ones as negatives."""
    columns = {role: DOCUMENTS[place:] + DOCUMENTS[:place] for place, role in enumerate(ROLES[: width + 1])}
    return Dataset.from_dict({"anchor": QUERIES, **columns})


def scored(teacher, sets, languages=None):
    return add_teacher_scores({"set": sets}, teacher, "cpu", lambda line: None, None, languages)


def several(**teachers):
    """TeacherModels of keyword arguments."""
    return TeacherModels(**{name: OneOfTeachers(**settings) for name, settings in teachers.items()})


# ------------------------------------------------------------------------------------------- scores
def test_a_row_has_a_score_for_each_of_its_passages(tmp_path):
    folder = write_cross_encoder(tmp_path / "cross")
    sets, found = scored(TeacherConfig(model=str(folder), kind="cross-encoder"), DatasetDict({"a": rows()}))
    model = CrossEncoder(str(folder), device="cpu")
    expected = [
        model.predict(
            list(zip(QUERIES, rows()[role], strict=True)), activation_fn=nn.Identity(), show_progress_bar=False
        )
        for role in ROLES
    ]
    np.testing.assert_allclose(sets["a"]["label"], np.stack(expected, axis=1), atol=1e-5)
    assert (found["rows"], found["pairs_scored"]) == (4, 16)


def test_normalized_scores_are_a_weighted_mean_of_shares_of_each_querys_range():
    one = np.array([[10.0, 5.0, 0.0], [3.0, 3.0, 3.0]])
    other = np.array([[0.2, 0.4, 0.3], [0.1, 0.2, 0.0]])
    expected = [[(3 * 1 + 0) / 4, (3 * 0.5 + 1) / 4, (0 + 0.5) / 4], [0.5 / 4, 1 / 4, 0]]
    np.testing.assert_allclose(mean_scores([one, other], [3.0, 1.0], normalize=True), expected, atol=1e-6)
    np.testing.assert_allclose(mean_scores([one, other], [1.0, 1.0], normalize=False), (one + other) / 2, atol=1e-6)


def test_scores_in_the_data_teach_without_a_model_and_with_others(tmp_path):
    labels = [[4.0, 2.0, 0.0, 1.0], None, [1.0, 0.0, 3.0, 2.0], [1.0, 1.0, 1.0, 0.0]]
    sets, found = scored(TeacherConfig(kind="data"), DatasetDict({"a": rows().add_column("label", labels)}))
    assert sets["a"]["label"] == labels
    assert (found["rows"], found["pairs_scored"], found["teachers"]) == (3, 0, [{"kind": "data"}])
    both = TeacherConfig(models=several(given={"kind": "data", "weight": 2.0}, words={"kind": "bm25"}))
    sets, found = scored(both, DatasetDict({"a": rows().add_column("label", labels)}), {"a": ["no"] * 4})
    words, _ = scored(TeacherConfig(kind="bm25", normalize=True), DatasetDict({"a": rows()}), {"a": ["no"] * 4})
    expected = (2 * np.array([1, 0.5, 0, 0.25]) + np.array(words["a"]["label"][0])) / 3
    np.testing.assert_allclose(sets["a"]["label"][0], expected, atol=1e-6)
    assert sets["a"]["label"][1] is None
    assert found["rows"] == 3
    with pytest.raises(ConfigError, match=r"no row with negatives has scores. Name their column"):
        scored(TeacherConfig(kind="data"), DatasetDict({"a": rows()}))


def test_scores_in_the_data_that_nothing_learns_from_are_said(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"anchor": f"q{i}", "positive": f"p{i}", "negative": f"n{i}",
                                                 "scores": [2, 1]} for i in range(4)])  # fmt: skip
    columns = "{anchor: anchor, positive: positive, negative: negative, scores: scores}"
    data = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 0, columns: {columns}}}")
    assert data.train["mine"]["label"] == [[2, 1]] * 4
    bert = write_bert(tmp_path / "bert")
    said = []
    assert decide_teacher(config_of(tmp_path, bert, "splade"), data, "cpu", Decisions(said.append), score=True) is None
    assert said == ["teacher   mine: its scores are not used, for no teacher is of kind data"]
    assert "label" not in data.train["mine"].column_names


def test_bm25_scores_are_those_of_the_index_of_the_whole_set_and_none_between_languages():
    subsets = {"triplets": rows(1).select([0, 1]), "pairs": rows(0).select([2, 3])}
    texts = Texts.of(subsets)
    vectors = bm25_vectors(texts, {subset: ["no", "no"] for subset in subsets})
    index = BM25Index(texts.different_passages, "no", without_stop_words=True)
    expected = np.stack([index.scores_of(words) for words in index.words_of(texts.different_queries)])
    assert expected.max() > 0.1
    np.testing.assert_allclose((vectors.queries @ vectors.passages.T).toarray(), expected, atol=1e-6)
    assert [texts.different_passages[number] for number in texts.passages["pairs"][:, 0]] == DOCUMENTS[2:]
    vectors = bm25_vectors(texts, {"triplets": ["no", "no"], "pairs": ["sv", "sv"]})
    found = (vectors.queries @ vectors.passages.T).toarray()
    of_norwegian = set(texts.passages["triplets"].ravel().tolist())
    assert found[:2].any()
    for passage in range(len(texts.different_passages)):
        if passage not in of_norwegian:
            assert not found[:2, passage].any()


def saved_sparse(tmp_path):
    model = build(tmp_path, write_bert(tmp_path / "bert"), "inference-free-splade").eval()
    save_model(model, tmp_path / "sparse")
    return tmp_path / "sparse", model


def test_scores_in_batches_are_the_models_similarities_and_are_kept(tmp_path, monkeypatch):
    sparse, sparse_model = saved_sparse(tmp_path)
    dense = write_dense(tmp_path / "dense")
    config = config_of(tmp_path, tmp_path / "bert", "splade")
    dense_model = SentenceTransformer(str(dense), device="cpu")
    teacher = {"objective": "kl", "passages": "batch", "normalize": False}
    asking, picked = np.array([1, 2, 0]), np.array([1, 2])
    passages = [rows(1)[int(row)][role] for role in ("positive", "negative") for row in picked]
    for kind, folder, model in (("dense", dense, dense_model), ("sparse", sparse, sparse_model)):
        settings = TeacherConfig(kind=kind, model=str(folder), **teacher)
        said = []

        def found(settings=settings, said=said):
            scores, record = batch_scores({"a": {"a": rows(1)}}, settings, "cpu", said.append, config.model, {})
            assert record["rows"] == 4
            return scores["a"].of(asking, picked)

        expected = model.similarity(model.encode_query([QUERIES[n] for n in asking]), model.encode_document(passages))
        np.testing.assert_allclose(
            found(), expected.to_dense() if expected.is_sparse else expected, rtol=1e-4, atol=1e-4
        )
        assert len(said) == 2
        with monkeypatch.context() as patched:
            patched.setattr(teacher_models.TeacherFiles, "load_encoder", lambda *_: pytest.fail("encoded again"))
            np.testing.assert_allclose(
                found(), expected.to_dense() if expected.is_sparse else expected, rtol=1e-4, atol=1e-4
            )
        assert len(said) == 2


# ------------------------------------------------------------------------------------------- the loss
LABELS = torch.tensor([[3.0, 1.0, 0.5, 2.0], [2.0, -1.0, 0.0, 0.0], [0.5, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 2.0]])


def losses_of(tmp_path, labels, *overrides, shared=None):
    """Loss components of four rows with three negatives, and the scaled dot products [queries, passages]."""
    bert = write_bert(tmp_path / "bert")
    config = config_of(tmp_path, bert, "inference-free-splade", "loss.scale=0.5", "loss.teacher.kind=bm25", *overrides)
    model = build(tmp_path, bert, "inference-free-splade").eval()
    columns = [(QUERIES, "query"), *((rows()[role], "document") for role in ROLES)]
    vectors = [
        model(model.preprocess(texts, task=task) | {"task": task})["sentence_embedding"] for texts, task in columns
    ]
    loss = build_loss(config, model, BatchStatistics()).loss
    queries = vectors[0] if shared is None else torch.cat([vectors[0], vectors[0][:1]])
    found = loss.compute_loss_from_embeddings([queries, *vectors[1:]], labels, shared)
    return found, 0.5 * queries @ torch.cat(vectors[1:]).T


def of_rows(scores):
    """[rows, passages of a row] of scores of all with all, counted column by column."""
    return torch.stack([scores[row, row::4] for row in range(4)])


def test_margin_mse_compares_the_positive_with_each_negative(tmp_path):
    found, scores = losses_of(tmp_path, LABELS)
    own = of_rows(scores)
    expected = (own[:, :1] - own[:, 1:] - (LABELS[:, :1] - LABELS[:, 1:])).square().mean()
    assert found["distillation_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_kl_compares_all_passages_of_a_row_and_rows_without_scores_teach_nothing(tmp_path):
    kl = "loss.teacher.objective=kl"
    found, scores = losses_of(tmp_path, LABELS, kl)
    teacher, student = LABELS.softmax(1), of_rows(scores).softmax(1)
    per_row = (teacher * (teacher.log() - student.log())).sum(1)
    assert found["distillation_loss"].item() == pytest.approx(per_row.mean().item(), rel=1e-4)
    some = LABELS.clone()
    some[1] = torch.nan
    found, _ = losses_of(tmp_path, some, kl)
    assert found["distillation_loss"].item() == pytest.approx((per_row.sum() - per_row[1]).item() / 4, rel=1e-4)
    found, _ = losses_of(tmp_path, torch.full_like(LABELS, torch.nan), kl)
    assert found["distillation_loss"].item() == 0


@pytest.mark.parametrize("further", [False, True])
def test_over_a_batch_kl_compares_all_passages_for_every_query(tmp_path, further):
    shared = None
    if further:  # the first query once more, for another passage
        texts = torch.arange(16)
        shared = SharedPassages(4, torch.tensor([0, 1, 2, 3, 5]), torch.full((5, 1), -1), texts)
    labels = torch.randn(4 + further, 16, generator=torch.Generator().manual_seed(1))
    found, scores = losses_of(tmp_path, labels, "loss.teacher.objective=kl", "loss.teacher.passages=batch",
                              "loss.teacher.score_scale=3.0", "loss.teacher.temperature=2.0", shared=shared)  # fmt: skip
    teacher, student = (3 * labels / 2).softmax(1), (scores / 2).softmax(1)
    expected = 4 * (teacher * (teacher.log() - student.log())).sum(1).mean()
    assert found["distillation_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------- runs
@pytest.mark.slow
@pytest.mark.parametrize("settings", ["", "objective: kl"])
def test_a_run_learns_from_scores_that_some_rows_have(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    given = [
        {"anchor": f"hva er {n}", "positive": f"svaret er {n}", "scores": [3, 1, 0] if n % 2 else None}
        | {f"negative_{place}": f"ikke {n} men {place}" for place in (1, 2)}
        for n in range(80)
    ]
    source = write_lines(tmp_path / "a.jsonl", given)
    columns = "{anchor: anchor, positive: positive, negative: negative, scores: scores}"
    text = TINY.replace("quickstart: {}", f"mine: {{source: {source}, columns: {columns}}}")
    teacher = f"teacher: {{kind: data{', ' if settings else ''}{settings}}}"
    (tmp_path / "tiny.yaml").write_text(text.replace("1e-3}\ndatasets", f"1e-3, {teacher}}}\ndatasets"))
    loaded = load_config(tmp_path / "tiny.yaml", ["training.max_steps=2"])
    said = []
    check(loaded, Decisions(said.append))
    assert any("rows with negatives have scores to teach" in line for line in said)
    train(loaded, run := Run.create(loaded), echo=said.append)
    assert run.manifest["teacher"]["rows"] in (36, 37)  # of 72 or 73 that are trained on


def test_a_teacher_of_a_csr_model_has_the_weight_that_is_said_whatever_gamma(tmp_path):
    dense = write_dense(tmp_path / "dense")
    parts = []
    for gamma in (0.5, 2.0):
        config = config_of(
            tmp_path, dense, "csr", "loss.teacher.kind=bm25", "loss.teacher.weight=0.3", f"loss.gamma={gamma}"
        )
        loss = build_loss(config, build(tmp_path, dense, "csr"), BatchStatistics())
        parts.append(loss.loss.teacher_weight * gamma)
    assert parts == pytest.approx([0.3, 0.3])
    with pytest.raises(ConfigError, match=r"loss.teacher' has no effect with loss.gamma 0"):
        config_of(tmp_path, dense, "csr", "loss.teacher.kind=bm25", "loss.gamma=0.0")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["inference-free-splade", "csr"])
@pytest.mark.parametrize("passages", ["row", "batch"])
def test_a_run_learns_from_several_teachers(tmp_path, monkeypatch, passages, architecture):
    monkeypatch.chdir(tmp_path)
    base = write_dense(tmp_path / "dense")
    teachers = f"{{words: {{kind: bm25}}, dense: {{kind: dense, model: {base}, weight: 2.0, cache: kept}}}}"
    teacher = f"{{models: {teachers}, objective: kl, passages: {passages}, score_scale: 5.0}}"
    text = TINY.replace("1e-3}\ndatasets", f"1e-3, teacher: {teacher}}}\ndatasets")
    settings = ["training.max_steps=2", "training.eval_steps=2"]
    if architecture == "csr":
        settings += ["model.architecture=csr", f"model.base_model={base}", "model.csr_k=8", "model.csr_hidden_dim=64",
                     "model.csr_k_aux=8", "model.from_scratch=null", "loss.type=csr",
                     "loss.document_regularizer_weight=null", "training.query_learning_rate=null"]  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(text)
    options = [word for setting in settings for word in ("--set", setting)]
    result = run_trainer(tmp_path, "check", "tiny.yaml", *options)
    assert result.returncode == 0, result.stderr
    assert f"teacher   bm25 × 1, {base} × 2, on " in result.stdout
    result = run_trainer(tmp_path, "train", "tiny.yaml", *options)
    assert result.returncode == 0, result.stderr
    assert "each teacher's normalized per query" in result.stdout
    events = EventAccumulator(str(tmp_path / "models/tiny/logs"))
    events.Reload()
    assert max(event.value for event in events.Scalars("loss/distillation_loss")) > 0
    assert [one["kind"] for one in manifest(tmp_path)["teacher"]["teachers"]] == ["bm25", "dense"]
    assert list((tmp_path / "kept").rglob("*.parquet"))
