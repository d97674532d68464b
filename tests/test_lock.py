import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_trainer
from trainer.config import ConfigError
from trainer.runs.lock import only_one_in

HOLD = """
import sys, time
from pathlib import Path
from trainer.runs.lock import only_one_in
with only_one_in(Path(sys.argv[1]), print):
    if sys.argv[2] == "worker":
        import os
        if os.fork() == 0:
            time.sleep(60)  # a loader worker that outlives its parent
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, how="alone"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_owner_is_refused_with_host_process_and_age_of_the_first(tmp_path):
    first = hold(tmp_path)
    try:
        with pytest.raises(ConfigError) as caught, only_one_in(tmp_path, print):
            pass
        message = caught.value.format_message()
        owner = re.escape(f"is being trained by process {first.pid} on {os.uname().nodename}")
        assert re.search(rf"{owner}, for (0 min [0-9]+|0\.[0-9]) s\. Stop it first", message)
        assert "\n" not in message
    finally:
        end(first)


@pytest.mark.parametrize("how", ["alone", "worker"])
def test_the_lock_of_a_killed_owner_is_taken_over_and_said(tmp_path, how):
    first = hold(tmp_path, how)
    os.kill(first.pid, signal.SIGKILL)  # not its child
    first.wait()
    said = []
    try:
        with only_one_in(tmp_path, said.append):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    finally:
        if how == "worker":
            os.killpg(first.pid, signal.SIGKILL)
    assert len(said) == 1
    assert f"was left by process {first.pid} on" in said[0]
    assert "taken over" in said[0]


def test_an_owner_that_ended_in_order_or_by_an_error_leaves_nothing_to_say(tmp_path):
    said = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), only_one_in(tmp_path, said.append):
            1 / 0  # noqa: B018
    assert said == []


def test_an_owner_from_the_future_has_held_the_lock_for_no_time(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": "h", "pid": 1, "since": time.time() + 1e6}))
    said = []
    with only_one_in(tmp_path, said.append):
        pass
    assert "for 0 min 0 s" in said[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"host": 1}', '{"pid": 1, "host": "h", "since": "x"}', "\xff"])
def test_a_lock_file_of_any_content_is_no_obstacle(tmp_path, content):
    (tmp_path / ".lock").write_text(content, encoding="latin-1")
    said = []
    with only_one_in(tmp_path, said.append):
        pass
    assert "a process that did not say which" in said[0]


def _try(folder, start, found, all_have_answered):
    start.wait()
    try:
        with only_one_in(Path(folder), print):
            found.put("held")
            all_have_answered.wait()
    except ConfigError:
        found.put("refused")


def test_of_eight_that_start_at_once_one_holds_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    start, found, all_have_answered = context.Event(), context.Queue(), context.Event()
    arguments = (str(tmp_path), start, found, all_have_answered)
    processes = [context.Process(target=_try, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    answers = [found.get(timeout=120) for _ in processes]
    all_have_answered.set()
    for process in processes:
        process.join()
    assert sorted(answers) == ["held"] + ["refused"] * 7


HELD_UP = """
import os, time
from pathlib import Path
from trainer.training.trainer import SparseTrainer
step = SparseTrainer.training_step
def held_up(self, *args, **kwargs):
    Path("process").write_text(str(os.getpid()))
    while not Path("go on").exists():
        time.sleep(0.02)
    return step(self, *args, **kwargs)
SparseTrainer.training_step = held_up
"""


@pytest.mark.slow
def test_a_second_training_of_one_run_stops_with_one_line_and_the_first_goes_on(tiny):
    folder = tiny.parent
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_trainer, folder, "train", "tiny.yaml", code=HELD_UP)
        try:
            deadline = time.monotonic() + 120
            while not (folder / "process").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for again in ((), ("--resume",)):
                second = run_trainer(folder, "train", "tiny.yaml", *again)
                assert second.returncode == 2
                assert second.stderr.count("\n") == 1
                process = (folder / "process").read_text()
                assert f"models/tiny is being trained by process {process} on" in second.stderr
        finally:
            (folder / "go on").touch()
    assert first.result().returncode == 0, first.result().stderr
    assert json.loads((folder / "models/tiny/run.json").read_text())["status"] == "finished"
