"""Shards encoded side by side are those encoded by hand; one that fails stops the others, and all go on later."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.conftest import ROOT, run_trainer
from tests.test_export import corpus, run_export  # noqa: F401, corpus is a fixture
from trainer.cli import main
from trainer.config import ConfigError
from trainer.export import processes
from trainer.export.corpus import Shard
from trainer.export.processes import count_processes, cuda_devices, environment_of, run_shards
from trainer.export.request import Request
from trainer.runs.run import Run

FOLDER = "models/tiny/export/lucene"
COMMAND = ("export", "tiny.yaml", "--to", "lucene", "--corpus", "corpus.jsonl")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# In the place of `python -m trainer`: a shard that says its number, then waits, fails or ends as it is told.
SHARD = """
import os, sys, time
number = sys.argv[-1].split("/")[0]
print("began", flush=True)
if number == os.environ.get("FAILS"):
    print("Error: no space left", file=sys.stderr)
    sys.exit(int(os.environ["STATUS"]))
if number == os.environ.get("KILLED"):
    os.kill(os.getpid(), 9)
time.sleep(float(os.environ.get("SECONDS", 60)))
print("done")
"""


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """Processes that only say and wait."""
    (tmp_path / "trainer.py").write_text(SHARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "cuda_devices", list)


@pytest.fixture
def one_thread():
    """As in the processes: sums of another order may differ in the last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_shard_is_given_the_options_of_the_command_but_those_for_all_of_them(trained, monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "run_shards", lambda arguments, count, echo: calls.append((arguments, count)))
    monkeypatch.setattr("trainer.export.qdrant.upsert", lambda folder, url, *rest: calls.append((str(folder), url)))
    options = ["--corpus", "corpus.jsonl", "--queries", "q.jsonl", "--output", "out", "--scale", "7", "--name", "tiny"]
    every = ["export", "tiny.yaml", "--to", "qdrant", *options]
    found = CliRunner().invoke(main, [*every, "--processes", "3", "--upsert", "folder"])
    assert found.exit_code == 0, found.output
    (_, count), uploaded = calls
    assert count == 3
    assert uploaded == ("out", "folder")  # once, and after all shards


def test_a_request_becomes_the_arguments_of_its_shards_as_the_command_reads_them(trained, monkeypatch):
    calls, requests = [], []
    monkeypatch.setattr(processes, "run_shards", lambda arguments, *rest: calls.append((arguments, *rest)))
    monkeypatch.setattr(processes, "export", lambda to, request: requests.append((to, request)))
    files = {"corpus": Path("corpus.jsonl"), "queries": Path("q.jsonl"), "output": Path("-out")}
    request = Request(Run.finished("tiny"), **files, shard=Shard(1, 1), scale=7, echo=print)
    processes.export_in_processes("lucene", request, 3)
    ((arguments, count, echo),) = calls
    assert (count, echo) == (3, print)
    found = CliRunner().invoke(main, [*arguments, "--shard", "2/3"])
    assert found.exit_code == 0, found.output
    ((to, of_shard),) = requests
    assert (to, of_shard.run.folder) == ("lucene", request.run.folder)
    assert replace(of_shard, run=None, echo=None) == replace(request, run=None, echo=None, shard=Shard(2, 3))
    for other in (replace(request, corpus=None), replace(request, shard=Shard(1, 2))):
        with pytest.raises(
            ConfigError, match=r"^--processes takes the corpus apart itself: it needs --corpus, and goes"
        ):
            processes.export_in_processes("lucene", other, 2)


@pytest.mark.slow  # two processes of the command
def test_processes_write_what_shards_by_hand_do_with_the_same_options(trained, corpus, one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    queries = trained / "queries.jsonl"
    queries.write_text(json.dumps({"_id": "q", "text": "hvor"}) + "\n")
    options = ("--queries", str(queries), "--output", "together", "--scale", "1000", "--name", "tiny")
    found = CliRunner().invoke(main, [*COMMAND, *options, "--processes", "2"])
    assert found.exit_code == 0, found.output
    for number in (1, 2):
        settings = {"output": trained / "by_hand", "shard": Shard(number, 2), "scale": 1000, "queries": queries}
        run_export("lucene", corpus, **settings)
        assert f"{number}/2  exported  42 documents to together/documents-{number}-of-2.jsonl" in found.output
    names = sorted(file.name for file in (trained / "by_hand").iterdir())
    assert len(names) == 2 + 2 + 2  # documents and checks; queries.jsonl and export.json
    assert names == sorted(file.name for file in (trained / "together").iterdir())
    for name in names:
        assert (trained / "by_hand" / name).read_bytes() == (trained / "together" / name).read_bytes(), name


@pytest.mark.slow  # four processes of the command
def test_processes_go_on_where_an_earlier_run_of_them_stopped(trained, corpus):  # noqa: F811
    assert run_trainer(trained, *COMMAND, "--processes", "2", env=ONE_THREAD).returncode == 0
    file = trained / FOLDER / "documents-2-of-2.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:10]) + b'{"id": ')
    again = run_trainer(trained, *COMMAND, "--processes", "2", env=ONE_THREAD)
    assert f"1/2  resuming  {FOLDER}/documents-1-of-2.jsonl holds 42 documents" in again.stdout
    assert f"2/2  resuming  {FOLDER}/documents-2-of-2.jsonl holds 10 documents" in again.stdout
    assert file.read_bytes() == whole


@pytest.mark.slow  # three processes of the command
def test_a_mistake_is_one_line_and_exit_code_two_however_many_processes_make_it(trained, corpus):  # noqa: F811
    with corpus.open("a") as out:
        out.write('{"_id": "x", "body": "no text"}\n')
    found = run_trainer(trained, *COMMAND, "--processes", "2", env=ONE_THREAD)
    assert found.returncode == 2
    line = "corpus.jsonl:85: there is no column 'text'. The line has: _id, body"
    assert found.stderr in [f"Error: shard {number}/2: {line}\n" for number in (1, 2)]


@pytest.mark.parametrize("text", ["0", "x", "-1", "1.5", "²", ""])
def test_a_number_of_processes_that_cannot_be_is_one_line(text):
    with pytest.raises(ConfigError, match=f"^--processes {text}: a number of processes, or `all` for one per CUDA"):
        count_processes(text, print)


@pytest.mark.parametrize(
    "options", [("--to", "lucene", "--shard", "1/2", "--corpus", "corpus.jsonl"), ("--to", "onnx")]
)
def test_processes_need_a_corpus_and_take_it_apart_themselves(trained, corpus, options):  # noqa: F811
    found = CliRunner().invoke(main, ["export", "tiny.yaml", *options, "--processes", "2"])
    assert found.exit_code == 2
    assert found.output == (
        "Error: --processes takes the corpus apart itself: it needs --corpus, and goes without --shard\n"
    )


def test_one_that_fails_stops_the_others_at_once(shard, monkeypatch):
    monkeypatch.setenv("FAILS", "2")
    monkeypatch.setenv("STATUS", "2")
    said, began = [], time.monotonic()
    with pytest.raises(ConfigError, match=r"^shard 2/3: no space left$"):
        run_shards(["export"], 3, said.append)
    assert time.monotonic() - began < 30  # the others would sleep for 60
    assert "2/3  began" in said and not [line for line in said if "done" in line]


def test_a_process_that_is_killed_or_breaks_is_named(shard, monkeypatch, capfd):
    monkeypatch.setenv("KILLED", "1")
    with pytest.raises(ConfigError, match=r"^shard 1/2 was ended by SIGKILL, perhaps because memory ran out"):
        run_shards(["export"], 2, print)
    monkeypatch.delenv("KILLED")
    monkeypatch.setenv("FAILS", "1")
    monkeypatch.setenv("STATUS", "1")
    with pytest.raises(ConfigError, match=r"^shard 1/2: no space left$"):
        run_shards(["export"], 2, print)
    assert "1/2  Error: no space left" in capfd.readouterr().out


def test_processes_that_all_end_well_are_waited_for(shard, monkeypatch):
    monkeypatch.setenv("SECONDS", "0.2")
    said = []
    run_shards(["export"], 2, said.append)
    assert sorted(said) == ["1/2  began", "1/2  done", "2/2  began", "2/2  done"]


@pytest.mark.slow
def test_stopping_the_command_stops_its_processes(shard, tmp_path):
    start = ["import sys", f"sys.path[:0] = [{str(ROOT)!r}]", "from trainer.export.processes import run_shards"]
    start += ["run_shards(['export'], 2, lambda line: print(line, flush=True))"]
    (tmp_path / "start.py").write_text("\n".join(start))
    command = [sys.executable, "-P", "start.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert process.stdout.read() == ""  # closed: no process of it holds it any more


def test_every_process_has_a_device_of_its_own_as_long_as_they_last(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    made = [environment_of(number, 3, ["4", "7"]) for number in (1, 2, 3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in made] == ["4", "7", "4"]
    assert {environment["OMP_NUM_THREADS"] for environment in made} == {"5"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert environment_of(1, 3, [])["OMP_NUM_THREADS"] == "2"


def test_all_means_one_process_per_device_that_may_be_used(monkeypatch):
    said = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert cuda_devices() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cuda_devices() == ["0", "1"]
    assert count_processes("all", said.append) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (cuda_devices(), count_processes("all", said.append)) == ([], 1)
    assert said == ["processes 2 (all: 2 CUDA devices)", "processes 1 (all: no CUDA device here)"]
