import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.conftest import ROOT, run_trainer
from tests.soak.processes import CACHED, gone
from tests.test_plan import lines_about
from tests.test_training import assert_same_weights
from trainer.config import ConfigError, load_config
from trainer.data.batches import NoDuplicateBatches, batch_sizes
from trainer.data.loading import load_data
from trainer.runs.run import Run
from trainer.system.device import choose_device
from trainer.system.launch import exit_status
from trainer.training import command
from trainer.training.resume import check_same_batches

QUICKSTART = ROOT / "trainer" / "data" / "quickstart"

# Two sets, of triplets and of pairs, whose batches can be shared equally; no dropout, whose noise depends on the process.
EVEN = """
model:
  base_model: from-scratch
  architecture: inference-free-splade
  from_scratch: {vocab_size: 800, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
                 dropout: 0.0}
training: {max_steps: 24, per_device_train_batch_size: 16, learning_rate: 1e-3, query_learning_rate: 1e-2,
           max_seq_length: 32, eval_steps: 4, save_steps: 4, save_total_limit: 9, logging_steps: 1}
loss: {type: splade, document_regularizer_weight: 1e-2, scale: 0.1}
datasets:
  triplets: {source: triplets.jsonl, max_samples: 80, eval_rows: 0}
  pairs: {source: pairs.jsonl, max_samples: 80, eval_rows: 0}
evaluation: {nanobeir_datasets: [], search: [SEARCH]}
hardware: {device: cpu}
"""
TWO = ("--processes", "2", "--set", "training.per_device_train_batch_size=8")
FOUR = ("--processes", "4", "--set", "training.per_device_train_batch_size=4")
HANGS = 300  # by then what takes seconds hangs, on the busiest machine too


def write_even_rows(folder):
    """triplets.jsonl and pairs.jsonl, of the embedded sets."""
    for name, source, roles in (
        ("triplets", "nli", {"anchor": "anchor", "positive": "positive", "negative": "negative"}),
        ("pairs", "scandi_qa", {"anchor": "question", "positive": "context"}),
    ):
        rows = [json.loads(line) for line in (QUICKSTART / f"{source}.jsonl").read_text().splitlines()]
        lines = [json.dumps({role: row[column] for role, column in roles.items()}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    rows = [json.loads(line) for line in (folder / "triplets.jsonl").read_text().splitlines()]
    several = [
        row | {f"negative_{place}": rows[(number + place) % len(rows)]["negative"] for place in (1, 2)}
        for number, row in enumerate(rows)
    ]
    (folder / "several.jsonl").write_text("\n".join(map(json.dumps, several)))


@pytest.fixture
def even(tmp_path, monkeypatch):
    write_even_rows(tmp_path)
    (tmp_path / "even.yaml").write_text(EVEN.replace("SEARCH", str(QUICKSTART / "search")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder, name, *arguments):
    result = run_trainer(folder, "train", "even.yaml", "--name", name, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def losses(folder, name):
    states = (folder / "models" / name / "checkpoints").glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda file: int(file.parent.name.rpartition("-")[2]))
    return [entry["loss"] for entry in json.loads(newest.read_text())["log_history"] if "loss" in entry]


def start(folder, *arguments):
    command = [sys.executable, "-m", "trainer", "train", "even.yaml", "--name", "two", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def until_saved(folder, step):
    seal = folder / "models" / "two" / "checkpoints" / f"checkpoint-{step}" / "complete.json"
    deadline = time.monotonic() + HANGS
    while not seal.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(launcher):
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if b"trainer" in Path(f"/proc/{child}/cmdline").read_bytes()]


# ------------------------------------------------------------------------------------------- batches
def test_every_process_gets_a_part_of_every_batch_and_all_parts_are_equal():
    rows = Dataset.from_dict({"anchor": [f"q{n}" for n in range(72)], "positive": [f"d{n}" for n in range(72)]})
    alone, shared = NoDuplicateBatches(rows, 12, seed=1), NoDuplicateBatches(rows, 4, seed=1, processes=3)
    parts = list(shared)
    assert len(parts) == len(shared) == 3 * len(alone) == 18
    # the rows divide evenly, so one process with three times the rows draws the very same batches
    assert [parts[n] + parts[n + 1] + parts[n + 2] for n in range(0, len(parts), 3)] == list(alone)
    assert {len(part) for part in parts} == {4}


def test_batch_sizes_are_multiples_of_the_processes_and_lose_less_than_one_row_each():
    rng = np.random.default_rng(0)
    for _ in range(200):
        processes, per_process, rows = (int(rng.integers(low, high)) for low, high in ((1, 9), (1, 40), (8, 3000)))
        sizes = batch_sizes(rows, per_process * processes, processes)
        assert all(size % processes == 0 and 0 < size <= per_process * processes for size in sizes)
        assert rows - processes < sum(sizes) <= rows
        assert max(sizes) - min(sizes) in (0, processes)


def test_more_processes_than_rows_are_refused():
    rows = Dataset.from_dict({"anchor": ["q0", "q1"], "positive": ["d0", "d1"]})
    with pytest.raises(ConfigError, match="2 rows are too few for 4 processes"):
        NoDuplicateBatches(rows, 4, processes=4)


def test_texts_that_fill_every_row_leave_a_batch_with_too_few():
    rows = Dataset.from_dict({"anchor": ["q"] * 4, "positive": ["a", "b", "c", "d"]})
    with pytest.raises(ConfigError, match="share a text"):
        NoDuplicateBatches(rows, 2, processes=2).batches(0)


# ------------------------------------------------------------------------------------------- the launcher
def test_the_launcher_ends_as_the_process_that_failed_by_itself():
    assert exit_status([143, -signal.SIGTERM]) == 143
    assert exit_status([-signal.SIGTERM, 2]) == 2
    assert exit_status([-signal.SIGKILL, -signal.SIGTERM]) == 137
    assert exit_status([1, -signal.SIGKILL]) == 137
    assert exit_status([1, 2, 1]) == 2
    assert exit_status([-signal.SIGTERM, -signal.SIGTERM]) == 143


@pytest.mark.slow
def test_machines_without_a_meeting_point_are_one_line(tiny):
    result = run_trainer(tiny.parent, "train", "tiny.yaml", "--nodes", "2")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--rendezvous HOST:PORT" in result.stderr


def test_the_line_that_resumes_names_the_processes_too(monkeypatch):
    from trainer.training.command import command_that_resumes

    assert command_that_resumes("splade", None) == "make resume CONFIG=splade"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("NORDSPARSE_RENDEZVOUS", "gpu1:29500")
    assert command_that_resumes("splade", None) == "make resume CONFIG=splade PROCS=8 NODES=2 RENDEZVOUS=gpu1:29500"
    assert command_that_resumes("mine.yaml", "x").endswith(
        "--name x --resume --processes 8 --nodes 2 --rendezvous gpu1:29500"
    )
    monkeypatch.setenv("NORDSPARSE_NODES_HERE", "2")
    assert command_that_resumes("splade", None) == "make resume CONFIG=splade PROCS=8 NODES=2"


def test_more_processes_than_gpus_are_one_line(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 processes need as many GPUs, and this machine has 4: PROCS=4"):
        choose_device(load_config(tiny, ["hardware.device=cuda"]).config)


def test_a_resume_with_larger_batches_in_other_processes_is_refused(tiny, monkeypatch):
    loaded = load_config(tiny)
    run = Run.create(loaded)
    run.update(processes=2, rows_per_batch=16)
    said = []
    with pytest.raises(ConfigError, match="batches of 16 rows in 2 processes, and would go on with 1 × 8"):
        check_same_batches(loaded.config, run, said.append)
    same = load_config(tiny, ["training.per_device_train_batch_size=16"]).config
    check_same_batches(same, run, said.append)
    assert said == ["changed   processes: 2 → 1, with the same batches"]


def test_rows_that_cannot_be_shared_are_counted_apart_and_small_evaluation_sets_are_left_out(tiny, monkeypatch):
    config = load_config(tiny).config
    monkeypatch.setenv("WORLD_SIZE", "8")
    data = load_data(config)
    # 162 = 20 × 8 + 2; 66 triplets and 96 pairs = 8 × 8 + 2 and 12 × 8; the six triplets held out are fewer than eight
    assert [data.rows_left_over(config, name) for name in data.subsets] == [2, 2, 2]
    assert [data.rows_without_a_batch(config, name) for name in data.subsets] == [0, 0, 0]
    assert set(data.eval) == {"quickstart_nli", "quickstart_scandi_qa", "quickstart_ddsc-pairs"}
    assert data.summaries["quickstart_ddsc"].left_out["held out in vain: too few to evaluate in 8 processes"] == 6
    lines = "\n".join(lines_about(config, data))
    assert lines.count("2 rows sit out each pass: they cannot be shared equally by 8 processes") == 3


@pytest.mark.slow
def test_processes_that_cannot_reach_each_other_say_which_setting_to_make(tiny):
    environment = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    result = run_trainer(tiny.parent, "train", "tiny.yaml", "--processes", "2", env=environment)
    assert result.returncode == 2
    assert "the 2 processes cannot reach each other" in result.stderr
    assert "GLOO_SOCKET_IFNAME" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_device_that_is_not_here_is_named_once_for_all_processes(tiny):
    result = run_trainer(tiny.parent, "train", "tiny.yaml", "--processes", "2", "--set", "hardware.device=cuda")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "finds no such device" in result.stderr


def test_a_run_folder_that_is_not_shared_is_named(tiny, monkeypatch):
    monkeypatch.setattr("trainer.runs.run.SHARED_SECONDS", 0.1)
    loaded = load_config(tiny)
    Run.create(loaded)
    manifest = json.loads(Path("models/tiny/run.json").read_text())
    assert not Run.follow(loaded, None, manifest).is_mine
    with pytest.raises(ConfigError, match="one models/ that all of them share"):
        Run.follow(loaded, None, manifest | {"id": "of another folder"})


def test_a_process_that_follows_writes_nothing(tiny):
    loaded = load_config(tiny)
    run = Run.create(loaded)
    before = Path("models/tiny/run.json").read_text()
    follower = Run.follow(loaded, None, dict(run.manifest))
    follower.update(status="running")
    assert follower.manifest["status"] == "running"
    assert Path("models/tiny/run.json").read_text() == before


# A process ends while gloo's thread, which has added up the last numbers, waits for the interpreter to drop them.
LAST_NUMBERS_HELD = """
import atexit, contextlib, os, sys, time

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)  # the interpreter's end comes to a place where another thread may go on

late = Late()

def hold():
    global numbers, seen
    import torch
    numbers = torch.ones(1, dtype=torch.float64)
    seen = numbers.numpy()  # reading a tensor would let other threads go on, reading an array does not
    references = sys.getrefcount(numbers)
    sys.setswitchinterval(1000)  # this thread goes on till it waits for something
    torch.distributed.all_reduce(numbers, async_op=True)
    until = time.monotonic() + 60
    while seen[0] != int(os.environ["WORLD_SIZE"]) and time.monotonic() < until:
        pass
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    if sys.getrefcount(numbers) != references + 1:
        os._exit(1)
"""
ONE_OF_TWO = (
    LAST_NUMBERS_HELD
    + """
from trainer.system.distributed import connect, ending_together, is_first, total

context = eval(sys.argv[1])
with context():
    connect("cpu")
    if not is_first():
        time.sleep(1)
        total(1.0)
        os._exit(0)
    hold()
    if context is ending_together:  # writing lets other threads go on
        atexit.register(print, "exit functions have run")
        print("buffered")
    sys.exit(7)
"""
)


@pytest.mark.parametrize(
    "context,status,said",
    [
        ("ending_together", 7, "buffered\nexit functions have run\n"),
        # what it is there for; should this one fail after an update of torch, ending_together is not needed any more
        pytest.param("contextlib.nullcontext", -signal.SIGABRT, None, marks=pytest.mark.slow),
    ],
)
def test_a_process_ends_with_its_own_status_while_the_last_numbers_are_still_held(tmp_path, context, status, said):
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, context], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | group | {"RANK": rank, "PYTHONPATH": str(ROOT)},
        )
        for rank in "01"
    )  # fmt: skip
    output, errors = first.communicate(timeout=HANGS)
    second.communicate(timeout=HANGS)
    assert first.returncode == status, errors
    assert said in (None, output)


# ------------------------------------------------------------------------------------------- whole runs
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--set", "loss.cached=true", "--set", "loss.mini_batch_size=4"),
        ("--set", "training.gradient_accumulation_steps=2", "--set", "hardware.gradient_checkpointing=true"),
        (
            *("--set", "model.architecture=splade", "--set", "loss.query_regularizer_weight=1e-3"),
            *("--set", "training.query_learning_rate=null"),
        ),
        ("--set", "loss.document_regularizer_weight=null", "--set", "loss.target_document_dims=20"),
        (
            *("--set", "datasets.triplets.source=several.jsonl", "--set", "loss.teacher.kind=bm25"),
            *("--set", "loss.teacher.objective=kl"),
        ),
    ],
    ids=["plain", "cached", "accumulated", "splade", "target", "several negatives and their scores"],
)
def test_two_processes_give_the_loss_curve_of_one_with_the_same_batch(even, options):
    train(even, "one", *options)
    result = train(even, "two", *TWO, *options)
    one, two = losses(even, "one"), losses(even, "two")
    assert len(one) == 24
    assert two == pytest.approx(one, rel=1e-5)
    assert one[0] != one[-1]
    manifests = [json.loads((even / "models" / name / "run.json").read_text()) for name in ("one", "two")]
    assert [manifest["processes"] for manifest in manifests] == [1, 2]
    for key in ("rows_trained", "tokens_trained", "steps_done"):
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[0]["after"] == pytest.approx(manifests[1]["after"], rel=1e-3)
    assert result.stdout.count("verdict") == 1


@pytest.mark.slow
def test_the_first_of_two_processes_mines_for_both(even):
    mine = "datasets.pairs.mine={method: self, every: 8, rounds: 2, range: [0, 40]}"
    result = train(even, "two", *TWO, "--set", mine)
    assert [line.split(",")[0] for line in result.stdout.splitlines() if line.startswith("mining")] == [
        "mining    pairs: round 1 of 2", "mining    pairs: round 2 of 2"
    ]  # fmt: skip
    mined = sorted(file.name for file in (even / "models/two/mined").iterdir())
    assert mined == ["pairs-step-16.parquet", "pairs-step-8.parquet"]
    assert len(losses(even, "two")) == 24


# Put in front of Python's path: every process but the first gets a view of the working directory that it cannot write to.
READ_ONLY_BUT_FOR_THE_FIRST = """
import ctypes, os, subprocess
if os.environ.get("RANK", "0") != "0":
    NEW_MOUNTS = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    here = os.getcwd()
    for options in (["--make-rprivate", "/"], ["--bind", here, here], ["-o", "remount,ro,bind", here]):
        subprocess.run(["mount", *options], check=True)
    os.chdir(here)
    try:
        open("written_by_another", "w")
    except OSError:
        open(f"/tmp/{os.environ['CANNOT_WRITE']}{os.environ['RANK']}", "w").close()
"""


@pytest.mark.slow
def test_four_processes_give_the_loss_curve_of_one_and_all_but_the_first_could_do_so_on_a_read_only_disk(even):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a view of the disk of one's own is not allowed here")
    with tempfile.TemporaryDirectory(dir="/tmp") as outside:
        (Path(outside) / "sitecustomize.py").write_text(READ_ONLY_BUT_FOR_THE_FIRST)
        environment = {"PYTHONPATH": f"{outside}:{ROOT}", "CANNOT_WRITE": f"{Path(outside).name}/rank"}
        result = run_trainer(even, "train", "even.yaml", "--name", "four", *FOUR, env=environment)
        assert result.returncode == 0, result.stderr
        assert sorted(file.name for file in Path(outside).glob("rank*")) == ["rank1", "rank2", "rank3"]
    train(even, "one")
    assert losses(even, "four") == pytest.approx(losses(even, "one"), rel=1e-5)
    found = {path.relative_to(even / "models/four") for path in (even / "models/four").rglob("*") if path.is_file()}
    expected = {path.relative_to(even / "models/one") for path in (even / "models/one").rglob("*") if path.is_file()}
    # the random numbers of each process, which the first writes for all, are what four have more than one
    more = {str(path) for path in found - expected if "tfevents" not in path.name}
    assert {Path(name).name for name in more} == {f"rng_state_{rank}.pth" for rank in range(4)}


@pytest.mark.slow
def test_a_training_ends_well_in_every_process_while_the_last_numbers_are_still_held(even):
    with tempfile.TemporaryDirectory() as outside:
        at_exit = 'if "RANK" in os.environ:\n    atexit.register(lambda: "torch" in sys.modules and hold())\n'
        (Path(outside) / "sitecustomize.py").write_text(LAST_NUMBERS_HELD + at_exit)
        short = ("--set", "training.max_steps=4")
        result = run_trainer(
            even, "train", "even.yaml", "--name", "two", *TWO, *short, env={"PYTHONPATH": f"{outside}:{ROOT}"}
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("verdict") == 1


@pytest.mark.slow
def test_the_plan_of_several_processes_is_what_they_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = (
        "training.num_train_epochs=1",
        "training.per_device_train_batch_size=8",
        "datasets.sampling_strategy=round_robin",
    )
    options = [option for value in values for option in ("--set", value)]
    result = run_trainer(tmp_path, "train", "quickstart", "--processes", "3", *options)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(Path("models/quickstart/run.json").read_text())
    # four sets, of which the smallest has 162 rows in batches of 24: seven each
    assert manifest["steps"] == manifest["steps_done"] == 28
    assert manifest["rows_trained"] == sum(found["rows_drawn"] for found in manifest["datasets"].values())
    assert f"steps     {manifest['steps']} of 8 rows × 3 processes" in result.stdout


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one_for_csr_too(even):
    from tests.checkpoints import write_dense

    base = write_dense(even / "base")
    options = [
        *(f"model.base_model={base}", "model.from_scratch=null", "model.architecture=csr", "loss.type=csr"),
        *("loss.document_regularizer_weight=null", "training.query_learning_rate=null", "model.csr_k=8"),
        *("model.csr_hidden_dim=64", "model.csr_k_aux=16", "loss.scale=20.0", "loss.similarity_weight=1.0"),
    ]
    pairs = [part for option in options for part in ("--set", option)]
    train(even, "one", *pairs)
    train(even, "two", *TWO, *pairs)
    assert losses(even, "two") == pytest.approx(losses(even, "one"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["launcher", "one worker"])
def test_a_signal_to_any_of_them_saves_a_checkpoint_stops_all_and_resume_goes_on(even, told):
    train(even, "whole", *TWO, "--set", "training.max_steps=80")
    launcher = start(even, *TWO, "--set", "training.max_steps=80")
    until_saved(even, 8)
    os.kill(launcher.pid if told == "launcher" else workers_of(launcher)[1], signal.SIGTERM)
    _, errors = launcher.communicate(timeout=HANGS)
    assert launcher.returncode == 143, errors
    assert errors.count("Stopped at step") == 1
    assert errors.count("\n") == 1
    assert errors.endswith("To go on: python -m trainer train even.yaml --name two --resume --processes 2\n")
    step = int(errors.split("step ")[1].split(";")[0])
    assert 8 <= step < 80
    assert (even / "models" / "two" / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
    assert json.loads((even / "models" / "two" / "run.json").read_text())["status"] == "stopped"

    resumed = run_trainer(even, "train", "even.yaml", "--name", "two", "--resume", "--processes", "2")
    assert resumed.returncode == 0, resumed.stderr
    # ten batches an epoch: the resumed run also goes through epochs that the stopped one had not come to
    assert losses(even, "two") == losses(even, "whole")


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line_each_and_resume_goes_on(even):
    launcher = start(even, *TWO, "--set", "training.max_steps=80")
    until_saved(even, 8)
    killed = time.monotonic()
    os.kill(workers_of(launcher)[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=HANGS)
    assert time.monotonic() - killed < 30
    assert launcher.returncode == 137
    assert "process 1 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    # one process with all the rows goes on with the very next batch of the two
    alone = ("--set", "training.per_device_train_batch_size=16")
    resumed = run_trainer(even, "train", "even.yaml", "--name", "two", "--resume", *alone)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed   processes: 2 → 1, with the same batches" in resumed.stdout
    train(even, "whole", *TWO, "--set", "training.max_steps=80")
    assert losses(even, "two") == pytest.approx(losses(even, "whole"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("killed,options", [(0, CACHED), (2, []), ("launcher", CACHED)])
def test_one_of_four_or_their_launcher_killed_ends_all_with_the_reason_and_four_go_on(even, killed, options):
    longer = ("--set", "training.max_steps=40", "--set", "model.from_scratch.dropout=0.1", *options)
    train(even, "whole", *FOUR, *longer)
    launcher = start(even, *FOUR, *longer)
    until_saved(even, 8)
    workers = workers_of(launcher)
    assert len(workers) == 4
    at = time.monotonic()
    os.kill(launcher.pid if killed == "launcher" else workers[killed], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=HANGS)  # until the last of them has closed its end
    while not all(map(gone, workers)):  # it gives its memory back after that
        assert time.monotonic() - at < 30
        time.sleep(0.05)
    assert time.monotonic() - at < 30
    assert "Traceback" not in errors
    if killed == "launcher":
        assert errors == "Error: the training ends here, for its launcher was ended\n"
    else:
        assert f"process {killed} was ended by SIGKILL" in errors
        assert launcher.returncode == 137
    resumed = run_trainer(even, "train", "even.yaml", "--name", "two", "--resume", "--processes", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from models/two/checkpoints/checkpoint-" in resumed.stdout
    if options == CACHED:
        assert losses(even, "two") == losses(even, "whole")
        assert_same_weights(even / "models/two/final", even / "models/whole/final")
    else:  # the order in which gradients are added differs after a resume: tests/soak/processes.py
        assert losses(even, "two") == pytest.approx(losses(even, "whole"), rel=1e-5)


@pytest.mark.parametrize("launcher", ["there", "gone"])
def test_the_watch_says_that_the_launcher_has_gone_even_if_another_process_is_lost_first(monkeypatch, capsys, launcher):
    slept = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("NORDSPARSE_LAUNCHER", str(os.getppid() + (launcher == "gone")))
    monkeypatch.setattr(command.time, "sleep", slept.append)
    with pytest.raises(SystemExit), command._together_with_others("make resume"):
        raise RuntimeError("Connection closed by peer")
    assert bool(slept) == (launcher == "gone")
    assert (
        capsys.readouterr().err
        == "Error: another process of this training ended. Nothing saved is lost. To go on: make resume\n"
    )
