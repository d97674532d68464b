import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import CrossEncoder, SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.checkpoints import DOCUMENTS, QUERIES, SHAPE, SIZE, write_bert, write_dense
from tests.conftest import TINY, run_trainer
from tests.test_models import build, config_of
from tests.test_training import manifest
from trainer.config import ConfigError, load_config
from trainer.config.schema import TeacherConfig
from trainer.hub.download import HubUnreachable
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.losses.teacher_models import TeacherFiles
from trainer.losses.teachers import ScoreStore, add_teacher_scores
from trainer.models.scratch import train_tokenizer


def write_cross_encoder(folder, seed=1, labels=1):
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(SIZE, QUERIES + DOCUMENTS)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=labels, **SHAPE)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cross_encoder(tmp_path):
    return write_cross_encoder(tmp_path / "cross")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


NEGATIVES = [*DOCUMENTS[1:], DOCUMENTS[0]]


def rows():
    triplets = {"anchor": QUERIES, "positive": DOCUMENTS, "negative": NEGATIVES}
    return DatasetDict(
        {"triplets": Dataset.from_dict(triplets), "pairs": Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})}
    )


def teacher_of(folder, kind="cross-encoder", **settings):
    return TeacherConfig(model=str(folder), kind=kind, **settings)


def with_scores(teacher, data=None, said=None):
    data = data or rows()
    scored, found = add_teacher_scores({"set": data}, teacher, "cpu", (said if said is not None else []).append)
    return {**data, **scored}, found


# ------------------------------------------------------------------------------------------- scores
def test_labels_are_the_logits_of_the_cross_encoder(cross_encoder):
    data, found = with_scores(teacher_of(cross_encoder))
    model = CrossEncoder(str(cross_encoder), device="cpu")
    logits = [
        model.predict(list(zip(QUERIES, passages, strict=True)), activation_fn=nn.Identity(), show_progress_bar=False)
        for passages in (DOCUMENTS, NEGATIVES)
    ]
    np.testing.assert_allclose(data["triplets"]["label"], np.stack(logits, axis=1), atol=1e-5)
    assert np.ptp(logits[0]) > 0.01
    assert "label" not in data["pairs"].column_names
    assert (found["rows"], found["pairs_scored"]) == (4, 8)


def test_labels_are_the_similarities_of_the_dense_model(tmp_path):
    folder = write_dense(tmp_path)
    data, _ = with_scores(teacher_of(folder, "dense"))
    model = SentenceTransformer(str(folder), device="cpu")
    query, positive, negative = (
        model.encode(texts, normalize_embeddings=True) for texts in (QUERIES, DOCUMENTS, NEGATIVES)
    )
    expected = np.stack([(query * positive).sum(1), (query * negative).sum(1)], axis=1)
    np.testing.assert_allclose(data["triplets"]["label"], expected, atol=1e-5)


def test_a_pair_is_scored_once_and_known_by_its_content_and_teacher(tmp_path, cross_encoder, monkeypatch):
    teacher, said = teacher_of(cross_encoder), []
    first, _ = with_scores(teacher)
    again, found = with_scores(teacher, said=said)
    assert (found["pairs_scored"], said) == (0, [])
    assert again["triplets"]["label"] == first["triplets"]["label"]
    # other rows that share pairs with known ones: only the new pair is scored
    more = DatasetDict({"other": Dataset.from_dict(
        {"anchor": QUERIES[1:2], "positive": DOCUMENTS[1:2], "negative": ["noe annet"]})})  # fmt: skip
    _, found = with_scores(teacher, more)
    assert found["pairs_scored"] == 1
    # another teacher at the same place has other content, so its scores are its own
    shutil.rmtree(cross_encoder)
    write_cross_encoder(cross_encoder, seed=2)
    other, found = with_scores(teacher)
    assert found["pairs_scored"] == 8
    assert other["triplets"]["label"] != first["triplets"]["label"]


def test_scoring_goes_on_where_it_was_killed(cross_encoder, monkeypatch):
    monkeypatch.setattr("trainer.losses.teachers.PAIRS_PER_PART", 3)
    teacher, calls = teacher_of(cross_encoder), []
    predict = CrossEncoder.predict

    def dies_at_the_second(self, pairs, **options):
        calls.append(len(pairs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, pairs, **options)

    monkeypatch.setattr(CrossEncoder, "predict", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        with_scores(teacher)
    store = ScoreStore(TeacherFiles("loss.teacher", teacher, None))
    assert len(store.read()) == 3
    (store.folder / f".half.parquet.{os.getpid() + 1}").write_bytes(b"PAR1")  # a killed writer's
    data, found = with_scores(teacher)
    assert found["pairs_scored"] == 5
    assert calls == [3, 3, 3, 2]
    assert len(data["triplets"]["label"]) == 4


def test_scores_are_kept_in_the_folder_the_config_names(tmp_path, cross_encoder):
    with_scores(teacher_of(cross_encoder, cache=str(tmp_path / "scores")))
    assert len(list((tmp_path / "scores").rglob("*.parquet"))) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "dense", "model": "nothing-here"}, "loss.teacher.model: there is no file or folder nothing-here"),
        ({"kind": "cross-encoder", "model": "two"}, "gives 2 numbers per pair"),
        ({"kind": "cross-encoder", "model": "empty"}, "empty cannot be loaded as a cross-encoder"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    write_cross_encoder(tmp_path / "two", labels=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=says) as caught:
        with_scores(TeacherConfig(**settings))
    assert "\n" not in caught.value.format_message()


def test_a_teacher_that_cannot_be_downloaded_is_one_line():
    with pytest.raises(HubUnreachable, match=r"cannot download org/teacher \(the teacher\).*loss.teacher.model"):
        with_scores(TeacherConfig(model="org/teacher", kind="dense", revision="main"))


def test_a_teacher_without_negatives_to_compare_is_one_line(cross_encoder):
    only_pairs = DatasetDict({"pairs": rows()["pairs"]})
    with pytest.raises(ConfigError, match="no data set has negatives"):
        with_scores(teacher_of(cross_encoder), only_pairs)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("{model: org/model, kind: dense}", "needs 'loss.teacher.revision'"),
        ("{model: ./m, kind: dense, temperature: 2.0}", "has no effect on margin-mse"),
        ("{model: ./m, kind: bm25}", "loss.teacher.model' has no effect with kind bm25"),
        ("{kind: sparse}", "loss.teacher.kind' sparse needs 'loss.teacher.model'"),
        ("{model: ./m}", "loss.teacher.kind' is missing"),
        ("{models: {}}", "loss.teacher.models' names no teacher"),
        ("{kind: bm25, models: {a: {kind: bm25}}}", "loss.teacher.kind' has no effect beside 'loss.teacher.models'"),
        ("{models: {a: {kind: dense, model: org/model}}}", "needs 'loss.teacher.models.a.revision'"),
        ("{kind: bm25, passages: batch}", "set loss.teacher.objective: kl"),
        ("{kind: data, passages: batch, objective: kl}", "batch is for teachers that give each text a vector"),
    ],
)
def test_settings_that_cannot_work_are_one_line(tmp_path, teacher, says):
    (tmp_path / "my.yaml").write_text(TINY.replace("1e-3}\ndatasets", f"1e-3, teacher: {teacher}}}\ndatasets"))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "my.yaml")
    assert says in caught.value.format_message()


# ------------------------------------------------------------------------------------------- the loss
LABELS = torch.tensor([[3.0, 1.0], [2.0, -1.0], [0.5, 0.0], [1.0, 1.0]])


def losses_of(tmp_path, *overrides):
    """Loss components of four triplets, and the dot products they come from."""
    bert = write_bert(tmp_path / "bert")
    config = config_of(
        tmp_path, bert, "inference-free-splade", "loss.scale=0.5", f"loss.teacher.model={bert}",
        "loss.teacher.kind=dense", *overrides
    )  # fmt: skip
    model = build(tmp_path, bert, "inference-free-splade").eval()
    loss = build_loss(config, model, BatchStatistics())
    features = [
        model.preprocess(texts, task=task) | {"task": task}
        for texts, task in ((QUERIES, "query"), (DOCUMENTS, "document"), (NEGATIVES, "document"))
    ]
    query, positive, negative = (model({**column})["sentence_embedding"] for column in features)
    scores = 0.5 * torch.stack([(query * positive).sum(1), (query * negative).sum(1)], dim=1)
    found = loss([{**column} for column in features], LABELS)
    return found, scores, loss, features


def test_margin_mse_is_the_squared_error_of_the_margins(tmp_path):
    found, scores, loss, features = losses_of(tmp_path, "loss.teacher.weight=0.3", "loss.teacher.score_scale=2.0")
    margins = scores[:, 0] - scores[:, 1]
    expected = 0.3 * (margins - torch.tensor([4.0, 6.0, 1.0, 0.0])).square().mean()
    assert found["distillation_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    # without labels, as in evaluation, the contrastive loss is what it was
    alone = loss([{**column} for column in features], None)
    assert alone["base_loss"].item() == pytest.approx(found["base_loss"].item(), rel=1e-5)
    assert "distillation_loss" not in alone


def test_kl_compares_probabilities_at_the_stated_temperature(tmp_path):
    found, scores, *_ = losses_of(tmp_path, "loss.teacher.objective=kl", "loss.teacher.temperature=2.0")
    teacher, student = (torch.softmax(values / 2, dim=1) for values in (LABELS, scores))
    expected = 4 * (teacher * (teacher.log() - student.log())).sum(1).mean()
    assert found["distillation_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_a_teacher_logs_its_loss_and_says_who_taught(tmp_path, monkeypatch, cached):
    monkeypatch.chdir(tmp_path)
    write_cross_encoder(tmp_path / "cross")
    (tmp_path / "tiny.yaml").write_text(
        TINY.replace(
            "1e-3}\ndatasets", "1e-3, teacher: {model: ./cross, kind: cross-encoder, cache: scores}}\ndatasets"
        )
    )
    result = run_trainer(tmp_path, "train", "tiny.yaml", "--set", f"loss.cached={str(cached).lower()}",
                         "--set", "training.max_steps=2", "--set", "training.eval_steps=2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "teacher   ./cross: scoring" in result.stdout
    events = EventAccumulator(str(tmp_path / "models/tiny/logs"))
    events.Reload()
    assert max(event.value for event in events.Scalars("loss/distillation_loss")) > 0
    found = manifest(tmp_path)["teacher"]
    assert [(one["model"], one["kind"]) for one in found["teachers"]] == [("./cross", "cross-encoder")]
    assert found["pairs_scored"] == 2 * found["rows"]
