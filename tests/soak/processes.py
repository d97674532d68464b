"""Runs of several gloo processes: a rank, their launcher, or all of them are killed, and the run is resumed until done."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.soak.compare import differences, outcome
from tests.soak.report import Kill, Report
from tests.soak.work import SAVE_EVERY, SECONDS, STEPS, newest_step, write_work

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("rank", "launcher", "all")
MOMENTS = ("start", "step", "save")
# A sum of three or more gradients depends on their order, and that on where they lie in DDP's buckets, which are laid out
# anew after a process's first step, so after a resume too: the weights then differ by 3e-8 after 8 steps. Two gradients
# have one order. With GradCache the buckets stay as they are, and everything is bit-equal again.
CACHED = ["--set", "loss.cached=true", "--set", "loss.mini_batch_size=4"]
# By then every process of a run has to be gone once one of them is.
ALL_GONE = 30.0


class Together:
    """One start of soak.yaml in several processes; they write <name>.out and <name>.err."""

    def __init__(self, folder: Path, name: str, processes: int):
        self.folder, self.name, self.saved = folder, name, newest_step(folder, name)
        command = [sys.executable, "-m", "trainer", "train", "soak.yaml", "--name", name, "--processes", str(processes)]
        if (folder / "models" / name / "run.json").exists():
            command.append("--resume")
        elif processes > 2:
            command += CACHED
        with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
            self.launcher = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=err, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are there, by rank."""
        found = {}
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split():
                settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(entry[5:]): int(pid) for entry in settings if entry.startswith(b"RANK=")}
        return [found[rank] for rank in sorted(found)]

    def moment(self) -> str:
        """What the run is doing now, as far as its folder shows."""
        run = self.folder / "models" / self.name
        if (run / "checkpoints" / "_writing").is_dir():
            return "save"
        if newest_step(self.folder, self.name) == STEPS:
            return "final"
        return "step" if self.status() == "running" else "start"

    def status(self) -> str | None:
        """What run.json says of the run; None before there is one."""
        with contextlib.suppress(OSError):
            return json.loads((self.folder / "models" / self.name / "run.json").read_text())["status"]

    def errors(self) -> str:
        """What it wrote to stderr."""
        return (self.folder / f"{self.name}.err").read_text()


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> float:
    """How long it took; raises when it takes longer than that."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"{what} took more than {seconds:.0f} s")
        time.sleep(0.002)
    return time.monotonic() - start


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill_once(run: Together, processes: int, rng: random.Random) -> tuple[Kill | None, float]:
    """Kill at a random moment; the seconds until all were gone. (None, 0) when the run ended before."""
    target, moment = rng.choice(TARGETS), rng.choice(MOMENTS)
    later = run.saved + SAVE_EVERY * rng.randint(0, 2)
    reached = {
        "start": lambda: len(run.ranks()) == processes,
        "step": lambda: run.moment() == "step" and newest_step(run.folder, run.name) >= later,
        "save": lambda: run.moment() == "save" and newest_step(run.folder, run.name) >= later,
    }[moment]
    wait_until(lambda: reached() or run.launcher.poll() is not None, SECONDS, f"{run.name} until {moment}")
    time.sleep(rng.uniform(0, {"start": 8.0, "step": 0.3, "save": 0.1}[moment]))
    ranks, seen = run.ranks(), run.moment()
    if len(ranks) < processes or run.launcher.poll() is not None:
        return _ended(run), 0.0
    chosen = rng.randrange(processes)
    for pid in {"rank": [ranks[chosen]], "launcher": [run.launcher.pid], "all": [run.launcher.pid, *ranks]}[target]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    seconds = wait_until(
        lambda: all(map(gone, [run.launcher.pid, *ranks])), ALL_GONE, f"{run.name}, {target} killed: the end"
    )
    if (status := run.launcher.wait()) == 0 or run.status() == "finished":  # what was killed had nothing left to do
        return None, 0.0
    said = run.errors()
    reason = {"rank": f"process {chosen} was ended by SIGKILL", "launcher": "launcher was ended", "all": ""}[target]
    # Killed before it had set up anything, a rank has nothing to say of the launcher; the launcher always has of a rank.
    if "Traceback" in said or (reason not in said and not (target == "launcher" and seen == "start")):
        raise AssertionError(f"{target} killed in {seen}, status {status}:\n{said[-3000:]}")
    return Kill(f"{target}, {seen}", None, target), seconds


def _ended(run: Together) -> None:
    """It came to its end by itself, and well."""
    status = run.launcher.wait(SECONDS)
    if status:
        raise AssertionError(f"{run.name} ended with {status}:\n{run.errors()[-3000:]}")


def _resumed_where_it_was_saved(run: Together) -> None:
    """Nothing that was saved is lost: it went on from the newest checkpoint there was."""
    said = (run.folder / f"{run.name}.out").read_text()
    if run.saved and "step" in said and f"checkpoints/checkpoint-{run.saved}" not in said.partition("data  ")[0]:
        raise AssertionError(f"{run.name} did not resume from step {run.saved}:\n{said[:2000]}")


def soak_processes(processes: int, kills: int, seed: int, echo: Callable[[str], None]) -> Report:
    """Kill runs of so many processes, each resumed with as many until it is done and compared with one left alone."""
    rng, report = random.Random(f"{seed} {processes}"), Report(f"{processes} processes")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_work(folder, "inference-free-splade")
        _ended(Together(folder, "alone", processes))
        expected = outcome(folder, "alone")
        while len(report.kills) < kills:
            name = f"killed{report.runs}"
            report.runs += 1
            _kill_until_done(folder, name, processes, kills, rng, report)
            found = outcome(folder, name)
            report.compared = len(found)
            report.differences += [f"{name} {difference}" for difference in differences(expected, found)]
            echo(
                f"{processes} processes: {len(report.kills)} of {kills} kills, {len(report.differences)} differences, "
                f"all gone after {report.slowest_end:.1f} s at most"
            )
    return report


def _kill_until_done(folder: Path, name: str, processes: int, kills: int, rng: random.Random, report: Report) -> None:
    """Start a run, and resume it after every kill, until it ends or the kills are used up."""
    for _ in range(kills + 100):
        run = Together(folder, name, processes)
        try:
            if len(report.kills) >= kills:
                _ended(run)
                return
            kill, seconds = kill_once(run, processes, rng)
        finally:
            for pid in (*run.ranks(), run.launcher.pid):  # after an error of ours nothing goes on
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.launcher.wait()
        _resumed_where_it_was_saved(run)
        if kill is None:
            return
        report.kills.append(kill)
        report.slowest_end = max(report.slowest_end, seconds)
    raise AssertionError(f"{name} does not come to an end")
