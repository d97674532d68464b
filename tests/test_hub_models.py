"""The real NorBERT3 and NorBERT4, where the Hugging Face hub can be reached."""

import os
import re
import subprocess
import sys

import pytest

from tests.checkpoints import DOCUMENTS
from tests.conftest import run_trainer
from tests.test_models import config_of
from tests.test_remote_code import ARCHITECTURES
from tests.test_training import assert_same_weights

pytestmark = pytest.mark.network

ONLINE = {"HF_HUB_OFFLINE": "0"}
# The commit of NorBERT3 is not known here: the newest is asked for, and pinned for the run.
MODELS = {"ltg/norbert3-xs": None, "ltg/norbert4-xsmall": "7483327d36a2daa5dbe936c68aa277149c6f9632"}
NEWEST = "import sys; from huggingface_hub import HfApi; print(HfApi().model_info(sys.argv[1], timeout=10).sha)"
VECTORS = """
import sys, torch
from sentence_transformers import SparseEncoder
texts = sys.argv[2:]
model = SparseEncoder(sys.argv[1], trust_remote_code=True, device="cpu")
for route in ("query", "document"):
    found = getattr(model, f"encode_{route}")(texts, convert_to_sparse_tensor=False)
    assert found.isfinite().all() and (found > 0).any()
    print(route, (found > 0).sum(1).tolist(), found.shape[1], [round(value, 4) for value in found.sum(1).tolist()])
"""


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
def test_the_real_model_trains_resumes_and_reopens_sparse_and_equal_elsewhere(tmp_path, pinned, architecture):
    name, commit = pinned
    config_of(tmp_path, name, architecture, "model.trust_remote_code=true", f"model.revision='{commit}'")
    trained = run_trainer(tmp_path, "train", "config.yaml", env=ONLINE)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"^code      modeling_\w+.py: \d+ faults mended: ", trained.stdout, re.MULTILINE)
    run = tmp_path / "models/config"
    (run / "final").rename(tmp_path / "final")
    again = run_trainer(tmp_path, "train", "config.yaml", "--resume", env=ONLINE)
    assert again.returncode == 0, again.stderr
    assert_same_weights(run / "final", tmp_path / "final")
    first, second = (python("/", VECTORS, str(tmp_path / "final"), *DOCUMENTS) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    document = first.stdout.splitlines()[1]
    active, dimensions = re.match(r"document \[([\d, ]+)\] (\d+)", document).groups()
    assert max(int(count) for count in active.split(",")) < int(dimensions) / 2
