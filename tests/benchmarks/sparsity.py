"""How near a target of active dims comes to it, by target and batch size: trains target.yaml for each.

python -m tests.benchmarks.sparsity --targets 100 200 400 --batches 8 32 --data ../shared/data --models /where/to
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG = Path(__file__).with_name("target.yaml")
WINDOW = (
    50  # steps whose documents are averaged: 400 at a batch of 8, whose lengths alone move the mean by some per cent
)


def train(target: int, batch: int, data: Path, folder: Path) -> Path:
    """One run in a process of its own; its folder. An earlier one of the same name is read, not trained again."""
    run = folder / "models" / f"target{target}_batch{batch}"
    if not (run / "final").is_dir():
        settings = {
            "loss.target_document_dims": target,
            "training.per_device_train_batch_size": batch,
            "datasets.norquad.source": data.resolve() / "norquad",
            "datasets.swequad.source": data.resolve() / "swequad",
        }
        pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "trainer", "train", str(CONFIG.resolve()), "--name", run.name, *pairs]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return run


def windows_of(run: Path) -> list[tuple[int, float]]:
    """(last step, mean active dims) of every WINDOW steps of a run."""
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("sparsity/document/active_dims_mean")]
    size = WINDOW // found[0][0]
    parts = [found[start : start + size] for start in range(0, len(found) - size + 1, size)]
    return [(part[-1][0], sum(value for _, value in part) / size) for part in parts]


def main() -> None:
    """Prints one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with norquad and swequad")
    parser.add_argument("--models", type=Path, default=Path("."), help="folder in which models/ is")
    options = parser.parse_args()
    print("target batch   first   after a third: lowest  highest  mean   weight at the end   nDCG@10   time")
    for target in options.targets:
        for batch in options.batches:
            run = train(target, batch, options.data, options.models)
            windows, manifest = windows_of(run), json.loads((run / "run.json").read_text())
            third = manifest["steps"] / 3
            later = [dims for step, dims in windows if step - WINDOW >= third]
            print(
                f"{target:>6} {batch:>5} {windows[0][1]:>7.0f} {min(later):>22.0f} {max(later):>8.0f} "
                f"{sum(later) / len(later):>5.0f} {manifest['sparsity']['document']['weight']:>19.2g} "
                f"{manifest['after']['search_ndcg@10']:>9.3f} {manifest['train_seconds']:>5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
