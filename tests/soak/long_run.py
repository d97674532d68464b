"""A long run, whose memory and open files must not grow."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.soak.one_process import Board, start
from tests.soak.work import SECONDS, ended_well, write_work


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
        ended_well(folder, "long", os.waitstatus_to_exitcode(found[1]))
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
