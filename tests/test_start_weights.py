"""Final weights that are a mixture of the trained ones and those from before training."""

import json
import shutil

import numpy as np
import pytest

from tests.checkpoints import write_bert
from tests.conftest import TINY, run_trainer
from tests.test_training import weights
from trainer.config import ConfigError, load_config
from trainer.publish.card import settings_of
from trainer.runs.run import Run

SETTINGS = """
model: {base_model: ./bert, architecture: inference-free-splade}
training: {start_share: 0.25}
"""
KEPT = "models/mixed/start_weights.safetensors"


def resume(folder, *overrides):
    arguments = [part for override in overrides for part in ("--set", override)]
    return run_trainer(folder, "train", "mixed.yaml", "--name", "mixed", "--resume", *arguments)


def best_of(folder):
    return folder / json.loads((folder / "models/mixed/run.json").read_text())["best_checkpoint"]


def is_mixture(mixed, trained, start, share):
    """Whether every weight lies so far on its way from trained to start, and some have moved."""
    assert mixed.keys() == start.keys() == {name for name in trained if "/" in name}  # without a checkpoint's state
    for name, value in mixed.items():
        expected = (1 - share) * trained[name].double() + share * start[name].double()
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


def test_final_is_three_parts_of_the_best_checkpoint_and_one_of_the_weights_before_training(mixed):
    final, trained = weights(mixed / "models/mixed/final"), weights(best_of(mixed))
    assert is_mixture(final, trained, weights(mixed / "models/still/final"), 0.25)


def test_the_output_says_it_and_a_run_without_it_keeps_no_weights(mixed):
    line = "Its weights are then mixed: 75% trained, 25% from before training (training.start_share)"
    assert f"over the queries that choose. {line}" in (mixed / "mixed.txt").read_text()
    assert "mixed" not in (mixed / "still.txt").read_text()
    assert (mixed / KEPT).exists()
    assert not (mixed / "models/still/start_weights.safetensors").exists()


def test_a_resumed_run_mixes_in_the_weights_from_before_its_first_step(mixed):
    whole = weights(mixed / "models/mixed/final")
    shutil.rmtree(mixed / "models/mixed/final")
    shutil.rmtree(mixed / "models/mixed/checkpoints/checkpoint-6")
    result = resume(mixed)
    assert result.returncode == 0, result.stderr
    resumed = weights(mixed / "models/mixed/final")
    assert all(np.array_equal(resumed[name], value) for name, value in whole.items())


def test_a_finished_run_gets_another_mixture_of_its_best_checkpoint_without_a_step(mixed):
    result = resume(mixed, "training.start_share=0.5")
    assert result.returncode == 0, result.stderr
    assert "steps     none left after step 6" in result.stdout
    final, trained = weights(mixed / "models/mixed/final"), weights(best_of(mixed))
    assert is_mixture(final, trained, weights(mixed / "models/still/final"), 0.5)


@pytest.mark.parametrize(("change", "why"), [("gone", "is missing"), ("a byte", "has changed")])
def test_a_run_that_lost_those_weights_is_told_so_at_once_and_stays_finished(mixed, change, why):
    content = (mixed / KEPT).read_bytes()
    (mixed / KEPT).unlink()
    if change == "a byte":
        (mixed / KEPT).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = (mixed / "models/mixed/run.json").read_bytes()
    result = resume(mixed)
    assert result.returncode == 2
    assert "data  " not in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"Error: training.start_share needs the weights from before training, {KEPT}, which {why}. Put it back, or end "
        "with the trained weights alone: SET=training.start_share=null"
    )
    assert (mixed / "models/mixed/run.json").read_bytes() == before

    assert resume(mixed, "training.start_share=null").returncode == 0
    final, trained = weights(mixed / "models/mixed/final"), weights(best_of(mixed))
    assert final.keys() == {name for name in trained if "/" in name}
    assert all(np.array_equal(value, trained[name]) for name, value in final.items())


def test_a_run_that_kept_none_cannot_mix_them_in_later(mixed):
    result = run_trainer(
        mixed, "train", "mixed.yaml", "--name", "still", "--resume", "--set", "training.start_share=0.25"
    )
    assert result.returncode == 2
    assert "which were not kept when this run was started. End with the trained weights alone: " in result.stderr


def test_the_card_says_what_the_weights_are_a_mixture_of(mixed):
    run = Run(mixed / "models/mixed")
    manifest = json.loads(run.manifest_file.read_text())
    changed = manifest | {"changes": [{"key": "training.start_share", "from": 0.5, "to": 0.25, "step": 6}]}
    target = {"document": {"target_dims": 200, "active_dims": 190, "weight": 0.01}}
    settings = settings_of(load_config(run.folder / "config.yaml").config, changed | {"sparsity": target})
    assert settings["final weights"] == "75% trained, 25% from before training"
    assert settings["sparsity"].endswith("ended at 190 with weight 0.01, before its weights were mixed")
    assert "changed on the way" not in settings


@pytest.mark.parametrize(
    ("overrides", "whose"),
    [
        (["model.from_scratch.init=normal"], "a model from scratch with init normal"),
        (["model.architecture=csr", "loss={type: csr}", "training.query_learning_rate=null"], "csr's autoencoder"),
    ],
)
def test_where_the_first_weights_are_random_it_is_refused(tiny, overrides, whose):
    with pytest.raises(ConfigError, match=f"keeps weights from before training, and those of {whose} are random"):
        load_config(tiny, [*overrides, "training.start_share=0.3"])
