import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_trainer
from trainer.config import ConfigError
from trainer.runs import checkpoints
from trainer.runs.checkpoints import (
    checkpoints_in,
    fault_of,
    newest_complete,
    put_in_place,
    remove_leftovers,
    remove_oldest,
    require_unchanged,
    seal,
    written_aside,
)

FILES = {"model.safetensors": b"weights" * 100, "sub/optimizer.pt": b"moments" * 100}


def write(folder, step, run="run"):
    place = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    (place / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None}))
    seal(place, run, step)
    return place


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_a_flipped_bit_in_any_file_is_found_and_the_next_older_checkpoint_is_taken(tmp_path, name):
    older, newer = write(tmp_path, 2), write(tmp_path, 10)
    said = []
    assert newest_complete(tmp_path, "run", said.append) == newer
    assert said == []
    flip(newer / name, 5)
    assert newest_complete(tmp_path, "run", said.append) == older
    assert said == [f"Warning: {newer} is skipped: {name} was changed since it was written (its SHA-256 differs)"]


def test_every_flipped_bit_of_the_seal_is_one_line_or_harmless(tmp_path):
    place = write(tmp_path, 2)
    seal_file = place / "complete.json"
    whole = seal_file.read_bytes()
    faults = []
    for position in range(len(whole)):
        flip(seal_file, position)
        faults.append(fault_of(place, "run"))
        seal_file.write_bytes(whole)
    assert not [fault for fault in faults if fault and "\n" in fault]
    # what is left: the step, which is in the folder's name too, and blanks
    assert sum(fault is None for fault in faults) < 0.2 * len(whole)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"run": "run", "files": {"a": 3}}', "{", "\x00"])
def test_a_seal_that_says_nothing_is_named(tmp_path, content):
    place = write(tmp_path, 2)
    (place / "complete.json").write_text(content)
    assert fault_of(place, "run") == "its complete.json cannot be read"


def test_a_checkpoint_is_written_aside_and_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoints, "flush", lambda path: flushed.append((path.name, not place.exists())))
    place = tmp_path / "checkpoint-4"
    with written_aside(tmp_path) as aside:
        written = write(aside, 4)
        assert checkpoints_in(tmp_path) == []
        put_in_place(written, place)
    before = {name for name, is_before in flushed if is_before}
    assert {"model.safetensors", "optimizer.pt", "complete.json", "sub", "checkpoint-4"} <= before
    assert flushed[-1] == (tmp_path.name, False)
    assert fault_of(place, "run") is None
    assert list(tmp_path.iterdir()) == [place]


def test_a_checkpoint_written_again_takes_the_place_of_the_damaged_one(tmp_path):
    place = write(tmp_path, 4)
    flip(place / "model.safetensors", 0)
    with written_aside(tmp_path) as aside:
        put_in_place(write(aside, 4), place)
    assert fault_of(place, "run") is None
    assert list(tmp_path.iterdir()) == [place]


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    kept = write(run / "checkpoints", 2)
    write(run / "checkpoints/_writing", 4)
    shutil.copytree(kept, run / "checkpoints/_removed-checkpoint-0")
    for name in (
        ".final/model.safetensors",
        ".run.json.123",
        ".start_weights.safetensors.123",
        "run.json",
        ".notes",
        "final/model.safetensors",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    remove_leftovers(run, run / "checkpoints")
    assert sorted(path.name for path in run.iterdir()) == [".notes", "checkpoints", "final", "run.json"]
    assert list((run / "checkpoints").iterdir()) == [kept]


def test_the_oldest_checkpoint_goes_by_its_step_whatever_the_clock_says(tmp_path):
    for step in (2, 4, 10):
        place = write(tmp_path, step)
        os.utime(place, (1_000_000 - step, 1_000_000 - step))  # the clock was set back before each
    remove_oldest(tmp_path, 2, tmp_path / "checkpoint-10", best=None)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-10"]


def test_the_best_and_the_newest_checkpoint_stay(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    remove_oldest(tmp_path, 1, tmp_path / "checkpoint-6", best=str(tmp_path / "checkpoint-2"))
    # 8 is newer than what was just written: a damaged one that the run has yet to come by
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_a_damaged_best_checkpoint_is_named_with_the_way_to_end_without_it(tmp_path):
    best = write(tmp_path, 2)
    require_unchanged(best, "run")
    flip(best / "model.safetensors", 3)
    with pytest.raises(ConfigError, match=r"model.safetensors was changed .*load_best_model_at_end=false"):
        require_unchanged(best, "run")


@pytest.mark.slow
def test_a_run_with_a_damaged_newest_checkpoint_goes_on_from_the_one_before_and_ends_the_same(trained):
    from tests.test_training import RUN, assert_same_weights

    run = trained / RUN
    shutil.move(run / "final", trained / "expected")
    last = run / "checkpoints/checkpoint-6"
    flip(next(last.rglob("model.safetensors")), 1000)
    result = run_trainer(trained, "train", "tiny.yaml", "--resume")
    assert result.returncode == 0, result.stderr
    assert "checkpoint-6 is skipped: " in result.stdout
    assert "resuming from models/tiny/checkpoints/checkpoint-4" in result.stdout
    assert_same_weights(run / "final", trained / "expected")
    assert fault_of(last, json.loads((run / "run.json").read_text())["id"]) is None
    state = json.loads((last / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).parent == Path(RUN) / "checkpoints"
    assert "_writing" not in (last / "trainer_state.json").read_text()


@pytest.mark.slow
def test_weights_are_read_from_safetensors_alone_and_the_rest_of_a_checkpoint_without_pickle(trained):
    """What a pickle would run when it is read stands in every file that torch.load reads: nothing of it runs."""
    import pickle

    from tests.test_training import RUN

    run = trained / RUN
    newest = run / "checkpoints/checkpoint-4"
    shutil.rmtree(run / "checkpoints/checkpoint-6")
    run_id = json.loads((run / "run.json").read_text())["id"]

    class Harmful:
        def __reduce__(self):
            return (os.system, (f"touch {trained}/harmed",))

    assert not list(newest.rglob("pytorch_model*.bin"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file = newest / name
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(Harmful()))
        seal(newest, run_id, 4)  # somebody who can write the file can write the seal
        result = run_trainer(trained, "train", "tiny.yaml", "--resume")
        assert result.returncode != 0
        assert not (trained / "harmed").exists(), name
        file.write_bytes(whole)
    (newest / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    seal(newest, run_id, 4)
    assert run_trainer(trained, "train", "tiny.yaml", "--resume").returncode == 0
    assert not (trained / "harmed").exists()
