"""One measurement per process, on one core: peak memory is then its own, and no cache is warm from another."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]


def fresh(part: str, **arguments: Any) -> dict[str, Any]:
    """What `measure(**arguments)` of a module of this package returns, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.benchmarks.speed.{part}", json.dumps(arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"{part} {arguments} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def answer(measure: Callable[..., dict[str, Any]]) -> None:
    """The other side of `fresh`."""
    print(json.dumps(measure(**json.loads(sys.argv[1]))))


def peak_mib(device: str = "cpu") -> float:
    """Most memory this process has used, in MiB; on a GPU, that of its tensors there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if (status := Path("/proc/self/status")).exists():  # Linux's ru_maxrss starts with what the parent used
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> float:
    """Start the peak anew from what is in use now, and return that, in MiB. Only Linux can; elsewhere the peak stays."""
    if (handle := Path("/proc/self/clear_refs")).exists():
        handle.write_text("5")
    return peak_mib()


def best_seconds(call: Callable[[], Any], rounds: int = 3) -> float:
    """CPU seconds of the fastest of some calls: other work on the machine does not count."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)
