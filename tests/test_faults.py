"""What goes wrong around a run: each ends in recovery or one clear line, and nothing saved earlier is lost."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TINY, run_trainer
from tests.test_training import RUN, assert_same_weights, manifest, run_python
from trainer.runs.checkpoints import checkpoints_in, fault_of


@contextlib.contextmanager
def mounted(place, options):
    """A small file system of its own; skips where that is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def assert_whole(folder, steps):
    """These checkpoints are there, and none of them has a fault; nothing else lies beside them."""
    checkpoints, run_id = folder / RUN / "checkpoints", manifest(folder)["id"]
    assert [path.name for path in checkpoints_in(checkpoints)] == [f"checkpoint-{step}" for step in steps]
    assert [fault_of(path, run_id) for path in checkpoints_in(checkpoints)] == [None] * len(steps)
    assert not list(checkpoints.glob("_*"))


def one_line_of(result, status=2):
    assert result.returncode == status, result.stderr
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("Error: ")
    return lines[-1]


# ------------------------------------------------------------------------------------------- the disk
def test_a_read_only_output_folder_is_one_line_before_anything_is_read(tiny):
    with mounted(tiny.parent / "models", "size=1m,ro"):
        line = one_line_of(run_trainer(tiny.parent, "train", "tiny.yaml"))
    assert line == "Error: models/tiny cannot be written: Read-only file system"


def test_a_run_whose_folder_became_read_only_is_one_line_when_resumed(trained):
    shutil.copytree(trained / "models", trained / "copy")
    with mounted(trained / "models", "size=80m") as models:
        shutil.copytree(trained / "copy/tiny", models / "tiny")
        subprocess.run(["mount", "-o", "remount,ro", models], check=True)
        line = one_line_of(run_trainer(trained, "train", "tiny.yaml", "--resume"))
    assert line == "Error: models/tiny cannot be written: Read-only file system"


# Of the free space so much is left to a run that has one checkpoint, so that it is full in its second save at one or
# another file, in TensorBoard's log, or in run.json.
LEFT = ["0", "30k", "200k", "700k", "1200k"]


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFT)
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_run_goes_on_once_there_is_space(trained, left):
    resumable = trained / "copy"
    shutil.copytree(trained / RUN, resumable)
    for part in ("checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "final"):
        shutil.rmtree(resumable / part)
    with mounted(trained / "models", "size=40m") as models:
        shutil.copytree(resumable, models / "tiny")
        space = shutil.disk_usage(models).free - int(left.replace("k", "000"))
        ballast = models / "ballast"
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(space))
        line = one_line_of(run_trainer(trained, "train", "tiny.yaml", "--resume"))
        assert "No space left on device" in line or "the disk is full under models/tiny" in line
        assert_whole(trained, [2])
        ballast.unlink()
        again = run_trainer(trained, "train", "tiny.yaml", "--resume")
        assert again.returncode == 0, again.stderr
        assert_whole(trained, [2, 4, 6])
        shutil.copytree(models / "tiny/final", trained / "found")
    # the run left alone lies under the mount, hidden and not changed by it
    assert_same_weights(trained / "found", trained / RUN / "final")


FULL_FROM = """
import errno, builtins, os
import trainer.runs.checkpoints as c, trainer.training.trainer, trainer.runs.run, trainer.training.train
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
{patch}
"""
WRITES = {
    "the seal": "trainer.training.trainer.seal = full",
    "the rename": "trainer.training.trainer.put_in_place = full",
    "the final model": "trainer.training.train.save_model = full",
    "the training texts": "import trainer.data.training_data; trainer.data.training_data.TrainingData.write_texts = full",
    "TensorBoard": "from torch.utils.tensorboard import SummaryWriter; SummaryWriter.add_scalar = full",
}


@pytest.mark.slow
@pytest.mark.parametrize("patch", WRITES.values(), ids=WRITES)
def test_a_disk_full_at_each_kind_of_write_leaves_no_half_written_checkpoint(tiny, patch):
    line = one_line_of(run_python(tiny.parent, FULL_FROM.format(patch=patch)))
    assert "the disk is full under models/tiny" in line
    found = checkpoints_in(tiny.parent / RUN / "checkpoints")
    assert_whole(tiny.parent, [int(path.name.rpartition("-")[2]) for path in found])
    assert not (tiny.parent / RUN / "final").exists()


# ------------------------------------------------------------------------------------------- processes and clocks
KILL_WORKER = """
import os, signal, pathlib
from trainer.training.trainer import SparseTrainer
step = SparseTrainer.training_step
def killing(self, *args, **kwargs):
    if self.state.global_step == 3:
        for child in pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    return step(self, *args, **kwargs)
SparseTrainer.training_step = killing
"""


def test_a_loader_worker_that_is_killed_is_one_line_and_the_run_goes_on(tiny):
    tiny.write_text(TINY.replace("max_steps: 6", "max_steps: 20\n  dataloader_num_workers: 1"))
    line = one_line_of(run_python(tiny.parent, KILL_WORKER))
    assert line.startswith("Error: a loader worker was ended by the system")
    assert line.endswith("To go on: make resume CONFIG=tiny.yaml")
    # noticed at once, or when the next batch is asked for
    done = len(checkpoints_in(tiny.parent / RUN / "checkpoints"))
    assert_whole(tiny.parent, [2, 4][:done])
    assert done in (1, 2)
    assert manifest(tiny.parent)["status"] == "failed"


JUMPING = """
import time
now = time.time
def jumping():
    jump = int(20 * time.monotonic())  # twenty times a second
    return now() + 3600.0 * (jump % 48) * (-1) ** jump  # set back by hours, then on by more, two days at most
time.time = jumping
"""


@pytest.mark.slow
def test_a_clock_that_jumps_back_and_forth_changes_nothing_that_is_trained(tiny, trained_once):
    result = run_python(tiny.parent, JUMPING, fresh=True)  # before any library takes time.time for itself
    assert result.returncode == 0, result.stderr
    assert_whole(tiny.parent, [2, 4, 6])
    assert_same_weights(tiny.parent / RUN / "final", trained_once / RUN / "final")
    assert manifest(tiny.parent)["train_seconds"] > 0


@pytest.mark.slow
def test_checkpoints_with_times_from_the_past_are_kept_by_their_step(tiny):
    """The library sorts by file time: with a clock set back it would remove the newest."""
    older = """
import os, trainer.training.trainer
put = trainer.training.trainer.put_in_place
def dated(written, place):
    put(written, place)
    if place.name.startswith("checkpoint-"):
        os.utime(place, (1e9 - int(place.name[11:]),) * 2)
trainer.training.trainer.put_in_place = dated
"""
    tiny.write_text(TINY.replace("save_total_limit: 3", "save_total_limit: 1"))
    result = run_python(tiny.parent, older)
    assert result.returncode == 0, result.stderr
    best = int(manifest(tiny.parent)["best_checkpoint"].rpartition("-")[2])
    assert_whole(tiny.parent, sorted({best, 6}))


# ------------------------------------------------------------------------------------------- numbers
NAN_IN_A_BATCH = """
import torch
from trainer.training.trainer import SparseTrainer
collect = SparseTrainer.collect_features
def poisoned(self, inputs):
    features, labels = collect(self, inputs)
    if self.model.training and self.state.global_step == 3:
        with torch.no_grad():
            next(self.model.parameters())[0].fill_(float("nan"))
    return features, labels
SparseTrainer.collect_features = poisoned
"""


@pytest.mark.slow
def test_a_nan_in_the_weights_stops_the_run_and_no_checkpoint_holds_one(tiny):
    line = one_line_of(run_python(tiny.parent, NAN_IN_A_BATCH))
    assert line.startswith("Error: the loss became NaN at step 4. The last checkpoint is as good as it was.")
    assert_whole(tiny.parent, [2])
    state = json.loads((tiny.parent / RUN / "checkpoints/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2


KILLED_IN_STEP_6 = """
import os, signal
from trainer.training.trainer import SparseTrainer
step = SparseTrainer.training_step
def killed(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
SparseTrainer.training_step = killed
"""


def test_what_was_trained_up_to_the_last_checkpoint_is_counted_though_the_run_is_killed(tiny):
    assert run_trainer(tiny.parent, "train", "tiny.yaml", code=KILLED_IN_STEP_6).returncode in (-9, 137)
    killed = manifest(tiny.parent)
    assert (killed["steps_done"], killed["rows_trained"], killed["status"]) == (4, 4 * 8, "running")
    assert killed["train_seconds"] > 0
    assert run_trainer(tiny.parent, "train", "tiny.yaml", "--resume").returncode == 0
    whole = manifest(tiny.parent)
    assert (whole["steps_done"], whole["rows_trained"], whole["status"]) == (6, 6 * 8, "finished")
    assert whole["train_seconds"] > killed["train_seconds"]
    assert sum(rows["rows_drawn"] for rows in whole["datasets"].values()) == 6 * 8


def test_leftovers_of_a_killed_run_are_gone_after_the_next_start(trained):
    run = trained / RUN
    shutil.rmtree(run / "final")
    shutil.copytree(run / "checkpoints/checkpoint-6", run / "checkpoints/_writing/checkpoint-8")
    os.truncate(next((run / "checkpoints/_writing").rglob("optimizer.pt")), 10)
    (run / ".final").mkdir()
    (run / ".run.json.12345").write_text("{")
    result = run_trainer(trained, "train", "tiny.yaml", "--resume")
    assert result.returncode == 0, result.stderr
    assert_whole(trained, [2, 4, 6])
    hidden = [path.name for path in Path(run).glob(".*")]
    assert hidden == [".lock"]
