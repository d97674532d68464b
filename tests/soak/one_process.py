"""Runs of one process, killed in the phase they are in: they are forks of this one and show it on a board."""

import contextlib
import functools
import hashlib
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import trainer.training.train
from tests.soak.compare import differences, outcome
from tests.soak.report import Kill, Report
from tests.soak.work import SECONDS, STEPS, ended_well, newest_step, wait_for, write_work
from trainer.cli import main as trainer_command
from trainer.training.trainer import SparseTrainer

# Where a run is killed. In `loader` it is a worker that dies, and the run has to end by itself.
PHASES = ("start", "step", "save", "evaluation", "loader", "final")


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
    final = trainer.training.train.save_final

    def shown(phase: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            board.write(phase, self.state.global_step if isinstance(self, SparseTrainer) else STEPS)
            return method(self, *args, **kwargs)

        return call

    def recorded(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for key in sorted(inputs):
            if isinstance(inputs[key], torch.Tensor):
                digest.update(key.encode() + inputs[key].numpy().tobytes())
        with Path(f"{name}.order").open("a") as notes:
            notes.write(f"{self.state.global_step} {digest.hexdigest()}\n")
        return step(self, model, inputs, *args, **kwargs)

    SparseTrainer.training_step = shown("step", recorded)
    SparseTrainer._save_checkpoint = shown("save", save)
    SparseTrainer.evaluate = shown("evaluation", evaluate)
    trainer.training.train.save_final = shown("final", final)


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


def workers_of(pid: int) -> list[int]:
    """Loader workers: children of a run."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


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
            return ended_well(folder, name, os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            raise TimeoutError(f"{target}: the run hangs in phase {phase}")
    time.sleep(rng.uniform(0, pause))
    if target == "loader":
        return _kill_worker(folder, name, board, pid)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        return ended_well(folder, name, os.waitstatus_to_exitcode(status))
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


def soak(architecture: str, kills: int, seed: int, echo: Callable[[str], None]) -> Report:
    """Kill runs of one architecture so many times, each resumed until it is done and compared with one left alone."""
    rng, report, board = random.Random(f"{seed} {architecture}"), Report(architecture), Board()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_work(folder, architecture)
        status = wait_for(start(folder, "alone", board))
        ended_well(folder, "alone", status)
        expected = outcome(folder, "alone")
        while len(report.kills) < kills:
            name = f"killed{report.runs}"
            report.runs += 1
            _kill_until_done(folder, name, board, kills, rng, report)
            found = outcome(folder, name)
            report.compared = len(found)
            report.differences += [f"{name} {difference}" for difference in differences(expected, found)]
            echo(f"{architecture}: {len(report.kills)} of {kills} kills, {len(report.differences)} differences")
    return report


def _kill_until_done(folder: Path, name: str, board: Board, kills: int, rng: random.Random, report: Report) -> None:
    """Start a run, and resume it after every kill, until it ends or the kills are used up."""
    workers = ("--set", "training.dataloader_num_workers=1")
    final = folder / "models" / name / "final"
    for _ in range(kills + 100):
        there = (folder / "models" / name / "run.json").exists()
        pid = start(folder, name, board, *(["--resume"] if there else workers))
        if len(report.kills) >= kills:
            ended_well(folder, name, wait_for(pid))
            return
        kill = kill_once(folder, name, board, pid, rng.choice(PHASES), rng)
        if kill is None and final.is_dir():
            return
        if kill is not None:
            report.kills.append(kill)
    raise AssertionError(f"{name} does not come to an end")
