import itertools
import math

import numpy as np
import pytest
import torch

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from tests.conftest import TINY, run_trainer
from tests.test_models import build, config_of
from tests.test_training import assert_same_weights, manifest, weights
from trainer.losses.build import build_loss
from trainer.losses.dims_controller import DimsController
from trainer.losses.regularizers import Step
from trainer.losses.statistics import BatchStatistics
from trainer.training.callbacks.regularizer_weights import STATE, RegularizerWeights

# About what tests/benchmarks/target.yaml did: dims by weight, and FLOPS by dims.
WEIGHTS, HELD = np.log([1e-6, 2e-5, 1e-4, 1e-3, 0.03, 0.1, 0.4, 2]), np.log([500, 450, 400, 290, 200, 100, 45, 15])
DIMS, FLOPS = np.log([15, 45, 100, 200, 250, 300, 400, 500]), np.log([0.2, 1.2, 4, 12, 60, 88, 110, 130])


class Plant:
    """A model in numbers. Activations follow the weight after `lag` steps, and dims the activations after as many again;
    the dims of a batch are noisy, and two data sets of short and long texts take turns."""

    def __init__(self, rows, lag):
        self.activations = self.dims = math.log(300)
        self.rows, self.lag, self.noise = rows, lag, np.random.default_rng(0)

    def step(self, weight, number):
        held = np.interp(math.log(max(weight, 1e-6)), WEIGHTS, HELD)
        self.activations += (held - self.activations) / self.lag
        self.dims += (self.activations - self.dims) / self.lag
        seen = math.exp(self.dims + 0.25 / self.rows**0.5 * self.noise.standard_normal())
        return Step(
            self.rows, seen * (1.12 if number % 2 else 0.88), math.exp(np.interp(self.activations, DIMS, FLOPS))
        )


def run(target, rows, lag, steps=600):
    """Active dims of every step."""
    controller, model, weight, dims = DimsController(target), Plant(rows, lag), 0.0, []
    for number in range(1, steps + 1):
        step = model.step(weight, number)
        dims.append(step.active_dims)
        weight = controller.update(step, 1.0, number, steps) * min(1, number / steps / controller.WARM_UP) ** 2
    return np.array(dims)


@pytest.mark.parametrize("lag", [8, 14])
@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("target", [100, 200, 400])
def test_dims_settle_within_a_tenth_in_the_first_third_and_stay(target, rows, lag):
    windows = run(target, rows, lag)[200:].reshape(-1, 40).mean(1)
    assert (np.abs(np.log(windows / target)) < math.log(1.1)).all(), windows


def test_the_weight_is_bounded_per_step_and_in_all():
    # nothing changes these dims, so the weight goes as far as it may: down to a penalty of 0.01, and up to one of 0.6
    for target, last in ((1000, math.log(0.01 / 20)), (10, math.log(0.6 / 20))):
        controller = DimsController(target)
        trace = []
        for number in range(1, 600):
            controller.update(Step(16, 400.0, 20.0), 1.0, number, 600)
            trace.append(controller.level)
        assert max(abs(after - before) for before, after in itertools.pairwise(trace)) < 0.15
        assert controller.log_weight == pytest.approx(last)


def test_what_is_driven_to_the_target_is_the_mean_over_documents_not_over_batches():
    controller = DimsController(50)
    for number in range(200):
        controller.update(Step(*((16, 10.0, 3.0) if number % 2 else (8, 100.0, 3.0))), 1.0, number + 1, 400)
    assert controller.measured == pytest.approx((16 * 10 + 8 * 100) / 24, rel=0.1)


def test_a_controller_goes_on_from_its_state_to_the_last_bit():
    one = DimsController(50)
    for number in range(1, 30):
        one.update(Step(8, 90 - number / 7, 3.0), 1 - number / 99, number, 100)
    two = DimsController(50)
    two.load(one.state())
    for number in range(30, 60):
        step = Step(8, 60 + number / 3, 3.0)
        assert one.update(step, 0.7, number, 100) == two.update(step, 0.7, number, 100)


@pytest.mark.parametrize("against", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("penalty", [1e-3, 20.0, 5e4])
def test_the_first_weight_makes_the_penalty_a_tenth_of_the_loss_whatever_their_units(penalty, against):
    assert DimsController(50).update(Step(8, 90.0, penalty), against, 1, 100) * penalty == pytest.approx(against / 10)


@pytest.mark.parametrize("target", [10, 1000])
def test_a_loss_twice_as_large_is_met_with_twice_the_weight(target):
    # as with more in-batch negatives: the same dims, a larger contrastive loss
    one, two = DimsController(target), DimsController(target)
    for number in range(1, 60):
        step = Step(8, 300 - number, 20.0 + number % 3)
        assert two.update(step, 2.0, number, 100) == pytest.approx(2 * one.update(step, 1.0, number, 100))


@pytest.mark.parametrize("overrides", [[], ["loss.cached=true", "loss.mini_batch_size=1"]])
def test_a_controller_hears_the_loss_that_the_penalties_work_against_once_per_batch(tmp_path, overrides):
    bert = write_bert(tmp_path / "bert")
    config = config_of(tmp_path, bert, "splade", "loss.target_document_dims=20",
                       "loss.document_regularizer_weight=null", *overrides)  # fmt: skip
    model = build(tmp_path, bert, "splade").eval()  # no dropout
    loss = build_loss(config, model, BatchStatistics())
    schedule = RegularizerWeights(loss, config)
    features = [model.preprocess(texts) for texts in (QUERIES, DOCUMENTS)]
    with torch.no_grad():
        queries, documents = (model(columns)["sentence_embedding"] for columns in features)
        expected = torch.nn.functional.cross_entropy(queries @ documents.T, torch.arange(len(queries)))
    loss(features)  # evaluation: not heard
    model.training = True
    for _ in range(2):
        loss(features)
    assert len(loss.loss.recorded_losses) == 2
    assert schedule._mean_ranking_loss() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.loss.recorded_losses == []


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("document_regularizer_weight: 1e-3", "target_document_dims: 20"))
    return tmp_path


@pytest.mark.slow
def test_a_resumed_run_with_a_target_ends_like_an_uninterrupted_one(target):
    import shutil

    first = run_trainer(target, "train", "tiny.yaml")
    assert first.returncode == 0, first.stderr
    assert "sparsity  documents: 20 active dims on average" in first.stdout
    assert "active dims per training document at the end, of the 20 asked for, with weight" in first.stdout
    checkpoints = target / "models/tiny/checkpoints"
    assert f"{STATE}:document.controller" in weights(checkpoints / "checkpoint-6")
    found = manifest(target)["sparsity"]["document"]
    assert found["target_dims"] == 20
    assert found["weight"] > 0
    shutil.copytree(target / "models/tiny", target / "whole")
    for part in ("checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "final"):
        shutil.rmtree(target / "models/tiny" / part)
    resumed = run_trainer(target, "train", "tiny.yaml", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(checkpoints / "checkpoint-6", target / "whole/checkpoints/checkpoint-6")
    assert manifest(target)["sparsity"]["document"] == found
    # the opposite: a run that was started with a weight does not go on with a target
    other = run_trainer(target, "train", "tiny.yaml", "--resume", "--set", "loss.target_document_dims=null",
                        "--set", "loss.document_regularizer_weight=1e-3")  # fmt: skip
    assert other.returncode == 2
    assert "'loss.target_document_dims' was 20 when models/tiny was started, and is None now" in other.stderr
