"""Kills a training at random moments and resumes it until it is done; what comes out must equal an uninterrupted run.

python -m tests.soak --kills 25          every architecture, 25 kills each
python -m tests.soak --long              2,000 steps: memory and open files must not grow
"""

import argparse
import contextlib
import functools
import hashlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import trainer.train
from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense
from trainer.cli import main as trainer_command
from trainer.loop import SparseTrainer

STEPS, SAVE_EVERY = 18, 3
ARCHITECTURES = ("inference-free-splade", "splade", "csr")
# Where a run is killed. In `loader` it is a worker that dies, and the run has to end by itself.
PHASES = ("start", "step", "save", "evaluation", "loader", "final")
SECONDS = 120  # by then a run of a few seconds hangs

CONFIG = """
model: {{architecture: {architecture}, {model}}}
training: {{max_steps: {steps}, per_device_train_batch_size: 4, learning_rate: 1e-3, {query_rate} max_seq_length: 16,
           eval_steps: {save}, save_steps: {save}, save_total_limit: 2, logging_steps: 1}}
loss: {{{loss}}}
datasets: {{mine: {{source: rows.jsonl, eval_rows: 6}}}}
evaluation: {{nanobeir_datasets: [], search: [four]}}
hardware: {{device: cpu}}
"""
SMALL = (
    "base_model: from-scratch, from_scratch: {vocab_size: 300, hidden_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, intermediate_size: 32}"
)
PARTS = {
    "inference-free-splade": {
        "model": SMALL,
        "query_rate": "query_learning_rate: 1e-2,",
        "loss": "type: splade, document_regularizer_weight: 1e-3",
    },
    "splade": {
        "model": "base_model: bert",
        "query_rate": "",
        "loss": "type: splade, target_document_dims: 40, target_query_dims: 20",
    },
    "csr": {
        "model": "base_model: dense, csr_hidden_dim: 64, csr_k: 4, csr_k_aux: 8, csr_k_start: 8, csr_revive_steps: 4",
        "query_rate": "",
        "loss": "type: csr",
    },
}


# ------------------------------------------------------------------------------------------- the run
def write_work(folder: Path, architecture: str, steps: int = STEPS, save: int = SAVE_EVERY) -> None:
    """Everything a run reads: its config, rows with and without a negative, a search, a base model."""
    rows = [
        {"anchor": f"hva er {n}", "positive": f"svaret er {n}"} | ({"negative": f"ikke {n}"} if n % 2 else {})
        for n in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    search = folder / "four"
    search.mkdir()
    texts = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(DOCUMENTS)]
    (search / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)]
    (search / "queries.dev.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (search / "qrels.dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(4))
    )
    if architecture == "splade":
        write_bert(folder / "bert")
    if architecture == "csr":
        write_dense(folder).rename(folder / "dense_")
        (folder / "dense_").rename(folder / "dense")
    (folder / "soak.yaml").write_text(
        CONFIG.format(architecture=architecture, steps=steps, save=save, **PARTS[architecture])
    )


class Board:
    """What a run shows of itself: its phase, how often it was in it, and its last step. Survives the run's death."""

    LAYOUT = struct.Struct("3q")

    def __init__(self):
        self.memory = mmap.mmap(-1, self.LAYOUT.size)
        self.visits: Counter[str] = Counter()

    def write(self, phase: str, step: int) -> None:
        """Called in the run."""
        self.visits[phase] += 1
        self.memory[:] = self.LAYOUT.pack(PHASES.index(phase), self.visits[phase], step)

    def read(self) -> tuple[str, int, int]:
        """Phase, visits to it, step."""
        phase, visits, step = self.LAYOUT.unpack(self.memory[:])
        return PHASES[phase], visits, step


def watched(board: Board, name: str) -> None:
    """Make this process's trainer show its phases on the board, and note the rows of every step in <name>.order."""
    step, save, evaluate = SparseTrainer.training_step, SparseTrainer._save_checkpoint, SparseTrainer.evaluate
    final = trainer.train.save_final

    def shown(phase: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            board.write(phase, self.state.global_step if isinstance(self, SparseTrainer) else STEPS)
            return method(self, *args, **kwargs)

        return call

    def noted(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for key in sorted(inputs):
            if isinstance(inputs[key], torch.Tensor):
                digest.update(key.encode() + inputs[key].numpy().tobytes())
        with Path(f"{name}.order").open("a") as notes:
            notes.write(f"{self.state.global_step} {digest.hexdigest()}\n")
        return step(self, model, inputs, *args, **kwargs)

    SparseTrainer.training_step = shown("step", noted)
    SparseTrainer._save_checkpoint = shown("save", save)
    SparseTrainer.evaluate = shown("evaluation", evaluate)
    trainer.train.save_final = shown("final", final)


def start(folder: Path, name: str, board: Board, *arguments: str) -> int:
    """The pid of a training of soak.yaml in a fork of this process, which has the libraries imported."""
    board.memory[:] = bytes(board.LAYOUT.size)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.setsid()
    os.chdir(folder)
    # a new file: workers that outlive a killed run for a moment may still write to its own
    Path(f"{name}.log").unlink(missing_ok=True)
    output = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        watched(board, name)
        trainer_command(["train", "soak.yaml", "--name", name, *arguments], standalone_mode=True)
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        os._exit(status)


def wait_for(pid: int, seconds: float = SECONDS) -> int:
    """The exit status of a run; kills it and raises when it hangs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the run did not end within {seconds:.0f} s")


# ------------------------------------------------------------------------------------------- killing
@dataclass
class Kill:
    """One kill: in which phase the run was, and how many steps have to be done again."""

    phase: str
    lost: int
    what: str = "run"


def workers_of(pid: int) -> list[int]:
    """Loader workers: children of a run."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def newest_step(folder: Path, name: str) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = (folder / "models" / name / "checkpoints").glob("checkpoint-*")
    return max((int(path.name.rpartition("-")[2]) for path in found), default=0)


def kill_once(folder: Path, name: str, board: Board, pid: int, target: str, rng: random.Random) -> Kill | None:
    """Kill a run, or its loader worker, in the target phase at a random moment. None when it ended before that."""
    wanted, visit = ("step" if target == "loader" else target), rng.randint(1, 1 if target == "final" else 3)
    pause = {"start": 2.0, "step": 0.05, "save": 0.12, "evaluation": 0.1, "loader": 0.02, "final": 0.3}[target]
    deadline = time.monotonic() + SECONDS
    while True:
        phase, visits, _ = board.read()
        if (phase == wanted and visits >= visit) or (target == "start"):
            break
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return _ended_well(folder, name, os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            raise TimeoutError(f"{target}: the run hangs in phase {phase}")
    time.sleep(rng.uniform(0, pause))
    if target == "loader":
        return _kill_worker(folder, name, board, pid)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        return _ended_well(folder, name, os.waitstatus_to_exitcode(status))
    phase, _, step = board.read()
    return Kill(phase, max(step - newest_step(folder, name), 0))


def _kill_worker(folder: Path, name: str, board: Board, pid: int) -> Kill | None:
    """The run has to notice and end with one line; it is not told."""
    workers = workers_of(pid)
    for worker in workers[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    status = wait_for(pid)
    if status == 0:
        return None  # between two loaders, or its work was done
    log = (folder / f"{name}.log").read_text()
    if status != 2 or "Traceback" in log or "a loader worker" not in log:
        raise AssertionError(f"a killed loader worker ended the run with status {status}:\n{log[-3000:]}")
    _, _, step = board.read()
    return Kill("loader", max(step - newest_step(folder, name), 0), "worker")


def _ended_well(folder: Path, name: str, status: int) -> None:
    if status:
        raise AssertionError(f"the run ended with {status}:\n{(folder / f'{name}.log').read_text()[-3000:]}")


# ------------------------------------------------------------------------------------------- comparing
def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything nested in a value."""
    if isinstance(value, dict):
        for key in value:
            yield from flat(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from flat(item, f"{path}.{number}")
    else:
        yield path, value


def equal(one: Any, two: Any) -> bool:
    """Bit-equality of leaves."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and np.array_equal(one, two)
    return type(one) is type(two) and one == two


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """Everything that must not depend on kills, by name: weights, optimizer, random numbers, log history, data order."""
    run = folder / "models" / name
    last = run / "checkpoints" / f"checkpoint-{newest_step(folder, name)}"
    found: dict[str, Any] = {"last step": newest_step(folder, name)}
    for place in (run / "final", last):
        for file in sorted(place.rglob("*.safetensors")):
            for tensor, value in load_file(file).items():
                found[f"{place.name}/{file.relative_to(place)}:{tensor}"] = value
    for file in sorted(last.glob("*.pt*")):
        if file.name != "training_args.bin":
            safe = torch.load(file, weights_only=file.name != "rng_state.pth")
            found |= {f"{file.name}:{path}": leaf for path, leaf in flat(safe)}
    state = json.loads((last / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    found |= {f"state:{path}": leaf for path, leaf in flat(state) if not path.endswith(("_runtime", "_per_second"))}
    for number, digest in data_order(folder / f"{name}.order").items():
        found[f"rows of step {number}"] = digest
    return found


def data_order(file: Path) -> dict[str, str]:
    """Which rows each step saw. A step that was repeated has to have seen the same rows."""
    seen: dict[str, set[str]] = {}
    for line in file.read_text().splitlines():
        number, digest = line.split()
        seen.setdefault(number, set()).add(digest)
    return {number: " and ".join(sorted(digests)) for number, digests in seen.items()}


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    missing = sorted(one.keys() ^ two.keys())
    return missing + [name for name in one if name in two and not equal(one[name], two[name])]


# ------------------------------------------------------------------------------------------- kills
@dataclass
class Report:
    """What was tried with one architecture."""

    architecture: str
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    compared: int = 0
    differences: list[str] = field(default_factory=list)


def soak(architecture: str, kills: int, seed: int, say: Callable[[str], None]) -> Report:
    """Kill runs of one architecture so many times, each resumed until it is done and compared with one left alone."""
    rng, report, board = random.Random(f"{seed} {architecture}"), Report(architecture), Board()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_work(folder, architecture)
        status = wait_for(start(folder, "alone", board))
        _ended_well(folder, "alone", status)
        expected = outcome(folder, "alone")
        while len(report.kills) < kills:
            name = f"killed{report.runs}"
            report.runs += 1
            _kill_until_done(folder, name, board, kills, rng, report)
            found = outcome(folder, name)
            report.compared = len(found)
            report.differences += [f"{name} {difference}" for difference in differences(expected, found)]
            say(f"{architecture}: {len(report.kills)} of {kills} kills, {len(report.differences)} differences")
    return report


def _kill_until_done(folder: Path, name: str, board: Board, kills: int, rng: random.Random, report: Report) -> None:
    """Start a run, and resume it after every kill, until it ends or the kills are used up."""
    workers = ("--set", "training.dataloader_num_workers=1")
    final = folder / "models" / name / "final"
    for _ in range(kills + 100):
        there = (folder / "models" / name / "run.json").exists()
        pid = start(folder, name, board, *(["--resume"] if there else workers))
        if len(report.kills) >= kills:
            _ended_well(folder, name, wait_for(pid))
            return
        kill = kill_once(folder, name, board, pid, rng.choice(PHASES), rng)
        if kill is None and final.is_dir():
            return
        if kill is not None:
            report.kills.append(kill)
    raise AssertionError(f"{name} does not come to an end")


def table(reports: list[Report]) -> str:
    """Kills by phase, what was done again, and whether anything differs."""
    rows = [f"{'architecture':<24}{'killed in':<14}{'kills':>6}{'steps again, mean':>19}{'most':>6}"]
    for report in reports:
        for phase in PHASES:
            lost = [kill.lost for kill in report.kills if kill.phase == phase]
            if lost:
                mean = sum(lost) / len(lost)
                rows.append(f"{report.architecture:<24}{phase:<14}{len(lost):>6}{mean:>19.1f}{max(lost):>6}")
        rows.append(
            f"{report.architecture:<24}{'all':<14}{len(report.kills):>6}   {report.runs} runs, {report.compared} values "
            f"each: {len(report.differences)} differ"
        )
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------- a long run
def measure_long(steps: int, warm_up: int, say: Callable[[str], None]) -> dict[str, float]:
    """Growth of resident memory (MB per 1,000 steps) and of open files after the warm-up."""
    samples: list[tuple[int, float, int]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_work(folder, "inference-free-splade", steps, save=steps // 8)
        pid = start(folder, "long", Board(), "--set", "training.logging_steps=10")
        deadline = time.monotonic() + SECONDS
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(OSError, ValueError, IndexError):
                step = int((folder / "long.order").read_bytes()[-120:].splitlines()[-1].split()[0])
                if not samples or step >= samples[-1][0] + 20:
                    samples.append((step, *_use_of(pid)))
            time.sleep(0.05)
        _ended_well(folder, "long", os.waitstatus_to_exitcode(found[1]))
    kept = np.array([sample for sample in samples if sample[0] >= warm_up])
    slope = np.polyfit(kept[:, 0], kept[:, 1], 1)[0] * 1000
    found = {
        "rss_mb_per_1000_steps": float(slope),
        "rss_mb_first": float(kept[0, 1]),
        "rss_mb_last": float(kept[-1, 1]),
        "files_first": int(np.median(kept[:10, 2])),
        "files_last": int(np.median(kept[-10:, 2])),
        "samples": len(kept),
    }
    say(f"long      {steps} steps, {found}")
    return found


def _use_of(pid: int) -> tuple[float, int]:
    """Resident memory in MB and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing differs, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="per architecture")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of phases and moments")
    parser.add_argument("--long", action="store_true", help="2,000 steps without a kill")
    options = parser.parse_args(arguments)
    # Before the fork: no thread of this process may hold a lock that its children would wait for.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    if options.long:
        found = measure_long(2000, 500, print)
        return int(found["rss_mb_per_1000_steps"] >= 1 or found["files_first"] != found["files_last"])
    print(f"seed {options.seed}", flush=True)
    say = functools.partial(print, flush=True)
    reports = [soak(name, options.kills, options.seed, say) for name in options.architectures]
    print(table(reports))
    wrong = [difference for report in reports for difference in report.differences]
    for difference in wrong[:40]:
        print(f"differs: {difference}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
