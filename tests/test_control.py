import itertools
import math

import pytest
import torch

from tests.conftest import TINY, run_trainer
from tests.test_training import assert_same_weights, manifest, weights
from trainer.control import STATE, DimsController
from trainer.penalties import Step


class Plant:
    """A model in numbers: log dims move towards where the weight holds them, which drifts upwards as the model learns to
    get round the penalty. Dims of a batch are noisy, and two data sets of short and long texts take turns."""

    def __init__(self, start, rows, seed=0, needed=-6.0, slope=-0.35):
        self.level, self.rows, self.needed, self.slope = math.log(start), rows, needed, slope
        self.start = self.level
        self.noise = torch.Generator().manual_seed(seed)

    def step(self, weight, number):
        held = self.start + self.slope * max(math.log(max(weight, 1e-12)) - self.needed, 0.0)
        self.level += 0.05 * (held - self.level)
        self.needed += 0.001
        spread = 0.25 / self.rows**0.5 * torch.randn(1, generator=self.noise).item()
        return math.exp(self.level + spread) * (1.3 if number % 2 else 0.7)


def run(target, rows=16, steps=300, **plant):
    controller, model, weight = DimsController(target), Plant(400, rows, **plant), 0.0
    dims, trace = [], []
    for number in range(1, steps + 1):
        dims.append(model.step(weight, number))
        penalty = 20 * (dims[-1] / 400) ** 2
        weight = controller.update(Step(rows, dims[-1], penalty), number, steps) * min(1, number / steps / 0.1) ** 2
        trace.append(controller.log_weight)
    return torch.tensor(dims), trace


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("target", [100, 200])
def test_dims_settle_within_a_tenth_in_the_first_third_and_stay(target, rows):
    dims, _ = run(target, rows)
    windows = dims[100:].reshape(-1, 20).mean(1)
    assert ((windows / target).log().abs() < math.log(1.1)).all(), windows


def test_the_weight_is_bounded_per_step_and_in_all():
    # nothing changes these dims, so the weight goes as far as it may: down to a penalty of 0.003, and up to one of 0.5
    for target, last in ((1000, math.log(0.003 / 20)), (10, math.log(0.5 / 20))):
        controller = DimsController(target)
        trace = []
        for number in range(1, 600):
            controller.update(Step(16, 400.0, 20.0), number, 600)
            trace.append(controller.level)
        assert max(abs(after - before) for before, after in itertools.pairwise(trace)) < 0.15
        assert controller.log_weight == pytest.approx(last)


def test_what_is_driven_to_the_target_is_the_mean_over_documents_not_over_batches():
    controller = DimsController(50)
    for number in range(200):
        controller.update(Step(*((16, 10.0, 3.0) if number % 2 else (8, 100.0, 3.0))), number + 1, 400)
    assert controller.measured == pytest.approx((16 * 10 + 8 * 100) / 24, rel=0.1)


def test_a_controller_goes_on_from_its_state_to_the_last_bit():
    one = DimsController(50)
    for number in range(1, 30):
        one.update(Step(8, 90 - number / 7, 3.0), number, 100)
    two = DimsController(50)
    two.load(one.state())
    for number in range(30, 60):
        step = Step(8, 60 + number / 3, 3.0)
        assert one.update(step, number, 100) == two.update(step, number, 100)


def test_the_first_weight_makes_the_penalty_a_tenth_whatever_its_unit():
    for penalty in (1e-3, 20.0, 5e4):
        assert DimsController(50).update(Step(8, 90.0, penalty), 1, 100) * penalty == pytest.approx(0.1)


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("document_regularizer_weight: 1e-3", "target_document_dims: 20"))
    return tmp_path


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
    assert "was written with one" in other.stderr
