"""The real NorBERT3 and NorBERT4, where the Hugging Face hub can be reached."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import run_trainer
from tests.test_models import config_of
from tests.test_remote_code import ARCHITECTURES, both_routes, reopen_elsewhere
from tests.test_training import assert_same_weights
from trainer.config import load_config
from trainer.models.build import load_model

pytestmark = pytest.mark.network

ONLINE = {"HF_HUB_OFFLINE": "0"}
# The commit of NorBERT3 is not known here: the newest is asked for, and pinned for the run.
MODELS = {"ltg/norbert3-xs": None, "ltg/norbert4-xsmall": "7483327d36a2daa5dbe936c68aa277149c6f9632"}
NEWEST = "import sys; from huggingface_hub import HfApi; print(HfApi().model_info(sys.argv[1], timeout=10).sha)"


def python(folder, code, *arguments):
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        cwd=folder,
        env=os.environ | ONLINE,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(params=MODELS)
def pinned(request, tmp_path):
    """A real model, and the commit to pin."""
    found = python(tmp_path, NEWEST, request.param)
    if found.returncode:
        pytest.skip(f"the hub cannot be reached: {found.stderr.strip().splitlines()[-1][:200]}")
    return request.param, MODELS[request.param] or found.stdout.strip()


@pytest.mark.parametrize("architecture", ARCHITECTURES[:2])
def test_the_real_model_trains_resumes_and_gives_the_trained_vectors_elsewhere(tmp_path, pinned, architecture):
    name, commit = pinned
    overrides = ("model.trust_remote_code=true", f"model.revision='{commit}'", "training.max_steps=4")
    config_of(tmp_path, name, architecture, *overrides)
    trained = run_trainer(tmp_path, "train", "config.yaml", env=ONLINE)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"^code      modeling_\w+.py: \d+ faults mended: ", trained.stdout, re.MULTILINE)
    run = tmp_path / "models/config"
    (run / "final").rename(tmp_path / "final")
    shutil.rmtree(run / "checkpoints/checkpoint-4")
    again = run_trainer(tmp_path, "train", "config.yaml", "--resume", env=ONLINE)
    assert again.returncode == 0, again.stderr
    assert_same_weights(run / "final", tmp_path / "final")
    model = load_model(run / "final", load_config(tmp_path / "config.yaml").config, "cpu")
    expected = both_routes(model)
    for _, _, vectors in expected:
        assert vectors.isfinite().all()
        assert (vectors > 0).float().mean() < 0.5
    assert reopen_elsewhere({str(run / "final"): expected}, tmp_path) <= 1e-5
