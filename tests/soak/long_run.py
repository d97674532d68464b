"""A long run, whose memory and open files must not grow."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from tests.soak.one_process import Board, start
from tests.soak.work import ended_well, wait_for
from trainer.training.trainer import SparseTrainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EVERY = 50  # steps between two looks
# The allocator takes more from the system now and then; what leaks is taken again and again. 6,000 steps had three jumps:
# 0.8, 1.3 and 1.6 MB. A line through 1,500 of these steps rose by more than 1 MB per 1,000 in a third of all places.
# Without the two largest jumps of each place, growth was 0.67 at most.
JUMPS = 2
SECONDS_PER_STEP = 1.0  # by then it hangs: 0.05 on an idle machine


def measure_long(steps: int, warm_up: int, echo: Callable[[str], None]) -> dict[str, float]:
    """Growth of resident memory (MB per 1,000 steps) and of open files of the quickstart, after the warm-up."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "soak.yaml").write_text(
            f"extends: {CONFIGS}/training_config_quickstart.yaml\n"
            f"training: {{max_steps: {steps}, eval_steps: {EVERY}, save_steps: {EVERY}}}\n"
        )
        with patch.object(SparseTrainer, "training_step", _noting_its_use(SparseTrainer.training_step, folder / "use")):
            pid = start(folder, "long", Board())
        ended_well(folder, "long", wait_for(pid, SECONDS_PER_STEP * steps))
        samples = np.loadtxt(folder / "use")
    kept = samples[samples[:, 0] >= warm_up]
    found = {
        "rss_mb_per_1000_steps": growth(kept[:, 0], kept[:, 1]),
        "rss_mb_first": float(kept[0, 1]),
        "rss_mb_last": float(kept[-1, 1]),
        "files_first": int(np.median(kept[:3, 2])),
        "files_last": int(np.median(kept[-3:, 2])),
        "samples": len(kept),
    }
    echo(f"long      {steps} steps, {found}")
    return found


def growth(steps: np.ndarray, used: np.ndarray) -> float:
    """MB per 1,000 steps, without the largest JUMPS between two looks. steps, used: [looks]."""
    steady = np.sort(np.diff(used))[:-JUMPS].sum()
    return float(1000 * steady / (steps[-1] - steps[0]))


def _noting_its_use(step: Callable, file: Path) -> Callable:
    """A training step that notes what the process holds after a checkpoint, when nothing of a batch is left: the step's
    number, resident memory in MB and open files.
    """

    def noting(self, *args, **kwargs):
        if self.state.global_step % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used = pages * os.sysconf("SC_PAGESIZE") / 1e6
            with file.open("a") as notes:
                notes.write(f"{self.state.global_step} {used} {len(os.listdir('/proc/self/fd'))}\n")
        return step(self, *args, **kwargs)

    return noting
