"""Shared pieces: a config of seconds, and one trained run per session that tests copy."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.warm import run_warm

# Before any library reads them: the suite must pass without a network, and leave the user's cache alone.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nordsparse-tests-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What `make test` says is for it, not for the make that a test starts.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS"):
    os.environ.pop(name, None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]

TINY = """
model:
  base_model: from-scratch
  architecture: inference-free-splade
  from_scratch: {vocab_size: 800, hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}
training:
  max_steps: 6
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 64
  learning_rate: 1e-3
  query_learning_rate: 1e-2
  max_seq_length: 32
  eval_steps: 2
  save_steps: 2
  save_total_limit: 3
  logging_steps: 1
loss: {type: splade, document_regularizer_weight: 1e-3}
datasets:
  quickstart: {}
evaluation: {nanobeir_datasets: []}
hardware: {device: cpu}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config file of a run of seconds, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder of one finished tiny run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    result = run_trainer(folder, "train", "tiny.yaml", fresh=True)  # what others are compared with
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of the finished tiny run, in the working directory."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """Four queries, each answered by the document of the same number."""
    from tests.checkpoints import DOCUMENTS, QUERIES  # imports libraries, which the environment above is for

    target = tmp_path / "four"
    target.mkdir()
    (target / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(DOCUMENTS))
    )
    (target / "queries.dev.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{n}", "text": text}) + "\n" for n, text in enumerate(QUERIES))
    )
    (target / "qrels.dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(4))
    )
    return target


def run_trainer(folder: Path, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    """python -m trainer, or another module, in a process of its own, working in `folder`.

    A new interpreter with `fresh`, or where `env` changes what libraries read when they are imported; else a fork of a
    server that has imported them. `code` is run first.
    """
    module, code, seconds = kwargs.pop("module", "trainer"), kwargs.pop("code", ""), kwargs.pop("seconds", 300)
    changed, fresh = kwargs.pop("env", {}), kwargs.pop("fresh", False)
    if sys.platform == "linux" and module in ("trainer", "evaluate") and not changed and not fresh:
        return run_warm(folder, module, arguments, code, seconds)
    command = ["-m", module, *arguments]
    if code:
        run = f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
        command = ["-c", f"{code}\nimport runpy, sys\nsys.argv = {[module, *arguments]}\n{run}"]
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | changed,
        capture_output=True,
        text=True,
        timeout=seconds,
        **kwargs,
    )
