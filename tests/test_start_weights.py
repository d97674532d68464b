"""Final weights that are a mixture of the trained ones and those from before training."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import write_bert
from tests.conftest import TINY, run_trainer
from trainer.config import ConfigError, load_config

SETTINGS = """
model: {base_model: ./bert, architecture: inference-free-splade}
training: {start_share: 0.25, load_best_model_at_end: false}
"""
KEPT = "models/mixed/start_weights.safetensors"


def weights(folder):
    """All weights of a saved model, by the folder of the module and their name."""
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted(folder.glob("*/*.safetensors"))  # those of modules, and none of a checkpoint's state
        for name, value in load_file(file).items()
    }


def is_mixture(mixed, trained, start, share):
    """Whether every weight lies so far on its way from trained to start, and some have moved."""
    assert mixed.keys() == trained.keys() == start.keys()
    for name, value in mixed.items():
        expected = (1 - share) * trained[name].astype(np.float64) + share * start[name].astype(np.float64)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    return any(not np.array_equal(trained[name], start[name]) for name in mixed)


@pytest.fixture(scope="module")
def mixed_once(tmp_path_factory):
    """A run with a share of 0.25, and one whose weights stay where they were."""
    folder = tmp_path_factory.mktemp("mixed")
    write_bert(folder / "bert")
    scratch = next(line for line in TINY.splitlines() if line.strip().startswith("from_scratch"))
    (folder / "tiny.yaml").write_text(TINY.replace("from-scratch", "./bert").replace(scratch + "\n", ""))
    (folder / "mixed.yaml").write_text("extends: tiny.yaml\n" + SETTINGS)
    still = ("--set", "training.learning_rate=1e-30", "--set", "training.query_learning_rate=1e-30")
    for name, arguments in (("mixed", ()), ("still", (*still, "--set", "training.start_share=null"))):
        result = run_trainer(folder, "train", "mixed.yaml", "--name", name, *arguments)
        assert result.returncode == 0, result.stderr
        (folder / f"{name}.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def mixed(mixed_once, tmp_path, monkeypatch):
    shutil.copytree(mixed_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_final_is_three_parts_of_the_last_checkpoint_and_one_of_the_weights_before_training(mixed):
    models = mixed / "models"
    final, trained = weights(models / "mixed/final"), weights(models / "mixed/checkpoints/checkpoint-6")
    assert is_mixture(final, trained, weights(models / "still/final"), 0.25)


def test_the_plan_says_it_and_a_run_without_it_keeps_no_weights(mixed):
    line = "25% of its weights are then those from before training (training.start_share)"
    assert f"training.load_best_model_at_end is false. {line}" in (mixed / "mixed.txt").read_text()
    assert line not in (mixed / "still.txt").read_text()
    assert (mixed / KEPT).exists()
    assert not (mixed / "models/still/start_weights.safetensors").exists()


def test_a_resumed_run_mixes_in_the_weights_from_before_its_first_step(mixed):
    whole = weights(mixed / "models/mixed/final")
    shutil.rmtree(mixed / "models/mixed/final")
    shutil.rmtree(mixed / "models/mixed/checkpoints/checkpoint-6")
    result = run_trainer(mixed, "train", "mixed.yaml", "--name", "mixed", "--resume")
    assert result.returncode == 0, result.stderr
    resumed = weights(mixed / "models/mixed/final")
    assert all(np.array_equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("size", [None, 1000])
def test_a_run_that_lost_those_weights_is_not_resumed(mixed, size):
    start = (mixed / KEPT).read_bytes()
    (mixed / KEPT).unlink()
    if size:
        (mixed / KEPT).write_bytes(start[:size])
    result = run_trainer(mixed, "train", "mixed.yaml", "--name", "mixed", "--resume")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"Error: {KEPT}, which training.start_share needs, cannot be read: "
    )
    assert result.stderr.splitlines()[-1].endswith("Put it back, or train anew under a new name")


@pytest.mark.parametrize(
    ("overrides", "whose"),
    [
        ([], "a model from scratch"),
        (["model.architecture=csr", "loss={type: csr}", "training.query_learning_rate=null"], "csr's autoencoder"),
    ],
)
def test_where_the_first_weights_are_random_it_is_refused(tiny, overrides, whose):
    with pytest.raises(ConfigError, match=f"keeps weights from before training, and those of {whose} are random"):
        load_config(tiny, [*overrides, "training.start_share=0.3"])
