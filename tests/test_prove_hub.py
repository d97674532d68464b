"""`make prove` from end to end: a stand-in for the hub, and small models in the shapes of all eight configs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from evaluate.prove.plan import CONFIGS, DENSE, SPARSE
from tests.checkpoints import write_bert, write_dense
from tests.conftest import ROOT
from tests.shelf import Shelf
from tests.standins import COMMIT, write_dense_norbert, write_norbert
from tests.test_data import write_copies
from tests.test_models import build
from trainer.models.build import save_model

BASES = {
    "ltg/norbert3-xs": "norbert3",
    "ltg/norbert3-base": "norbert3",
    "ltg/norbert4-base": "norbert4",
    "ltg/norbert4-large": "norbert4-newer",
}
PARENT = "thivy/norbert4-base-scandinavian-embedding"
DATA = {
    "nli": "Fremtind/all-nli-norwegian",
    "norquad": "ltg/norquad",
    "noropenbookqa": "ltg/noropenbookqa",
    "scandiqa": "alexandrainst/scandi-qa",
    "supervised_da": "jealk/supervised-da",
    "paws_x": "NbAiLab/norwegian-paws-x",
    "ddsc": "DDSC/nordic-embedding-training-data",
}


def fill(shelf, root):
    """Put small stand-ins of everything on the shelf, under their names on the hub."""
    shapes = {shape: write_norbert(root / shape, shape, bias=0.0) for shape in dict.fromkeys(BASES.values())}
    for name, shape in BASES.items():
        shelf.add(name, shapes[shape])
    shelf.add(PARENT, write_dense_norbert(root / "parent", "norbert4"))
    dense = write_dense(root / "dense")
    for name in DENSE:
        shelf.add(name, dense)
    (root / "sparse").mkdir()
    save_model(build(root / "sparse", write_bert(root / "bert"), "inference-free-splade"), root / "sparse/model")
    shelf.add(SPARSE, root / "sparse/model")
    copies = write_copies(root / "data")
    for folder, name in DATA.items():
        shelf.add(name, copies / folder, "dataset")


# Small enough for seconds on a CPU. Every base model has the one commit, so that one SET trusts all of them.
SMALL = f"""
model.trust_remote_code=true model.revision='{COMMIT}'
training.max_steps=24 training.eval_steps=4 training.save_steps=4 training.max_seq_length=32
training.per_device_train_batch_size=4 training.gradient_accumulation_steps=1 training.bf16=false
training.torch_compile=false training.dataloader_num_workers=0 training.dataloader_pin_memory=false
training.dataloader_prefetch_factor=null
hardware.device=cpu hardware.tf32=false evaluation.nanobeir_datasets=[]
"""


@pytest.fixture
def checkout(tmp_path):
    """An empty checkout, and the environment of a machine whose hub is the shelf."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text((ROOT / "docs/results.md").read_text())
    with Shelf(COMMIT) as shelf:
        (tmp_path / "shelf").mkdir()
        fill(shelf, tmp_path / "shelf")
        environment = os.environ | {
            "HF_ENDPOINT": shelf.url,
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        del environment["HF_HUB_OFFLINE"]
        yield tmp_path, environment


def command(task, *more):
    tasks = ("--tasks", f"{task}:no", "--set", " ".join(SMALL.split()))
    return [sys.executable, "-m", "evaluate", "prove", *tasks, *more]


def steps_that_ran(output):
    """The keys of the steps, without those that were done before or left out."""
    return re.findall(r"^step      \d+ of \d+: ((?:train|evaluate|baseline) \S+)$", output, re.MULTILINE)


@pytest.mark.slow
def test_all_eight_configs_are_trained_and_measured_beside_the_baselines_whatever_happens_on_the_way(checkout, folder):
    where, environment = checkout

    def prove(*more):
        return subprocess.run(
            command(folder, *more), cwd=where, env=environment, capture_output=True, text=True, timeout=900
        )

    # nothing is trained when code is not trusted
    refused = prove("--only", "splade", "--set", "model.trust_remote_code=false")
    assert refused.returncode == 2
    assert "ltg/norbert3-xs comes with Python code of its own, which is not trusted yet" in refused.stderr
    assert not (where / "models/splade").exists()

    # stopped in the middle of a training
    first = subprocess.Popen(
        command(folder, "--only", "splade"), cwd=where, env=environment, stdout=subprocess.PIPE, text=True
    )
    while not (where / "models/splade/checkpoints/checkpoint-4").exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    assert output.splitlines()[-1] == "Stopped in the step 'train splade'. To go on: the same command again"
    assert json.loads((where / "models/splade/run.json").read_text())["status"] == "stopped"
    table = (where / "docs/results.md").read_text()
    assert "| BM25 | " in table
    assert "- train csr: not yet" in table

    # it goes on there; a config that cannot be trained is listed, and the others are trained
    (where / "models/csr_h100").write_text("in the way")
    second = prove()
    assert second.returncode == 1
    ran = steps_that_ran(second.stdout)
    assert ran[:3] == [f"baseline {PARENT}", "train splade", "evaluate splade"]
    assert [key for key in ran if key.startswith("train")] == [f"train {name}" for name in CONFIGS]
    assert "resuming from models/splade/checkpoints/checkpoint-" in second.stdout
    (failed,) = re.findall(r"^failed    (.*)$", second.stdout, re.MULTILINE)
    assert failed.startswith("train csr_h100: Error: models/csr_h100 cannot be written: ")
    assert f"- {failed}" in (where / "docs/results.md").read_text()

    # once it is mended, only that one is left
    (where / "models/csr_h100").unlink()
    third = prove()
    assert third.returncode == 0, third.stdout + third.stderr
    assert steps_that_ran(third.stdout) == ["train csr_h100", "evaluate csr_h100"]
    page = (where / "docs/results.md").read_text()
    section = page.partition("<!-- prove:start -->")[2].partition("<!-- prove:end -->")[0]
    scores = section.partition("active dims per document |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\S.*?) \| \d+\.\d \|", scores, re.MULTILINE)
    assert rows == [*CONFIGS, "BM25", *DENSE, SPARSE, f"{PARENT} (dense parent)"]
    assert "Not done" not in section
    for name in CONFIGS:
        manifest = json.loads((where / f"models/{name}/run.json").read_text())
        assert (manifest["status"], manifest["steps_done"]) == ("finished", 24)
        (copied,) = (where / "models/prove/mteb/results").glob(f"nordsparse__{name}/*/four.json")
        assert copied.read_text() == (where / f"models/{name}/eval/scores/{name}/four.json").read_text()
