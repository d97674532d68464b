"""How near a target of active dims comes to it, and what one weight gives, by batch size: trains target.yaml for each.

python -m tests.benchmarks.sparsity targets --targets 100 200 400 --batches 8 32 --data ../shared/data --models /where/to
python -m tests.benchmarks.sparsity weight --weight 0.015 --data ../shared/data --models /where/to
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import FlopsLoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from trainer.data.beir import read_search_set
from trainer.losses.regularizers import Regularizer, flops

CONFIG = Path(__file__).with_name("target.yaml")
SETS = ("norquad", "swequad")
# Steps whose documents are averaged: 400 at a batch of 8, whose lengths alone move the mean by some per cent.
WINDOW = 50
# Of `weight`: shorter, so that a step of 64 rows fits a run of ten minutes on one core.
SHORT = {"training.max_steps": 300, "training.max_seq_length": 256}
# Rows per device, batches per step, rows per pass of GradCache
CUTS = [(8, 1, None), (16, 1, None), (64, 1, None), (64, 1, 8), (16, 4, None), (8, 8, None)]


def train(name: str, settings: dict[str, object], options: argparse.Namespace) -> Path:
    """One run in a process of its own; its folder. An earlier one of the same name is read, not trained again."""
    name = f"{name}_seed{options.seed}"
    run = options.models / "models" / name
    if not (run / "final").is_dir():
        settings = settings | {"training.seed": options.seed}
        settings |= {f"datasets.{source}.source": options.data.resolve() / source for source in SETS}
        pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "trainer", "train", str(CONFIG.resolve()), "--name", name, *pairs]
        environment = os.environ | {"PYTHONPATH": str(CONFIG.resolve().parents[2])}  # models/ is where it runs
        subprocess.run(command, cwd=options.models, env=environment, check=True, stdout=sys.stderr)
    return run


def manifest_of(run: Path) -> dict:
    """What the run says of itself."""
    return json.loads((run / "run.json").read_text())


def windows_of(run: Path) -> list[tuple[int, float]]:
    """(last step, mean active dims) of every WINDOW steps of a run."""
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("sparsity/document/active_dims_mean")]
    size = WINDOW // found[0][0]
    parts = [found[start : start + size] for start in range(0, len(found) - size + 1, size)]
    return [(part[-1][0], sum(value for _, value in part) / size) for part in parts]


def vectors_of(run: Path, data: Path, split: str) -> Tensor:
    """[passages, vocabulary] of those that answer a question of the split; no dev passage answers a training question."""
    texts = []
    for name in SETS:
        found = read_search_set(data / name, split, name)
        answers = set().union(*found.relevant.values())
        texts += [text for passage, text in found.corpus.items() if passage in answers]
    model = SparseEncoder(str(run / "final"), device="cpu")
    return model.encode_document(texts, show_progress_bar=False, convert_to_sparse_tensor=False)


def pressure(penalty: nn.Module, vectors: Tensor, rows: int) -> float:
    """How hard a penalty presses all activations down in batches of so many rows, as a multiple of FLOPS of all vectors.

    The mean of d penalty(s · vectors) / ds at s = 1 over random batches of altogether 20,000 vectors.
    """
    slopes, random = [], torch.Generator().manual_seed(0)
    for draw in range(20_000 // rows + 50):
        scale = torch.ones((), requires_grad=True)
        batch = vectors[torch.randint(len(vectors), (rows,), generator=random)]
        penalty.compute_loss_from_embeddings(scale * batch).backward()
        if isinstance(penalty, Regularizer):
            penalty.finish_step()
        if draw >= 50:  # the running mean starts at 0
            slopes.append(scale.grad.item())
    return sum(slopes) / len(slopes) / (2 * vectors.mean(0).square().sum().item())


def print_targets(options: argparse.Namespace) -> None:
    """One line per target and batch size."""
    print("target batch   first   after a third: lowest  highest  mean   weight at the end   nDCG@10   time")
    for target in options.targets:
        for batch in options.batches:
            settings = {"loss.target_document_dims": target, "training.per_device_train_batch_size": batch}
            run = train(f"target{target}_batch{batch}", settings, options)
            windows, manifest = windows_of(run), manifest_of(run)
            third = manifest["steps"] / 3
            later = [dims for step, dims in windows if step - WINDOW >= third]
            print(
                f"{target:>6} {batch:>5} {windows[0][1]:>7.0f} {min(later):>22.0f} {max(later):>8.0f} "
                f"{sum(later) / len(later):>5.0f} {manifest['sparsity']['document']['weight']:>19.2g} "
                f"{manifest['after']['search_ndcg@10']:>9.3f} {manifest['train_seconds']:>5.0f} s",
                flush=True,
            )


def print_weight(options: argparse.Namespace) -> None:
    """One line per way to cut a step's rows, all with one weight, and how far their held-out dims are apart."""
    print("per device   batches per step   rows per pass   active dims: held out   last steps   nDCG@10   time")
    found = []
    for rows, batches, at_once in CUTS:
        settings = SHORT | {
            "loss.target_document_dims": "null",
            "loss.document_regularizer_weight": options.weight,
            "training.per_device_train_batch_size": rows,
            "training.gradient_accumulation_steps": batches,
        }
        if at_once:
            settings |= {"loss.cached": "true", "loss.mini_batch_size": at_once}
        run = train(f"weight{options.weight:g}_{rows}x{batches}_{at_once}", settings, options)
        manifest = manifest_of(run)
        dims = (vectors_of(run, options.data, "dev") > 0).sum(1).float().mean().item()
        found.append(dims)
        print(
            f"{rows:>10} {batches:>18} {at_once or rows:>15} {dims:>23.1f} {windows_of(run)[-1][1]:>12.1f} "
            f"{manifest['after']['search_ndcg@10']:>9.3f} {manifest['train_seconds']:>5.0f} s",
            flush=True,
        )
    print(f"the largest is {max(found) / min(found) - 1:.1%} above the smallest")
    vectors, any_model = vectors_of(run, options.data, "train"), nn.Identity().train()
    for rows in sorted({cut[0] for cut in CUTS}):
        ours, stock = (pressure(kind, vectors, rows) for kind in (Regularizer(any_model, flops), FlopsLoss(any_model)))
        print(
            f"FLOPS in batches of {rows:>2} presses {ours:.3f} times as hard as of all at once, the library's {stock:.3f}"
        )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS), nargs="?", default="targets")
    parser.add_argument("--targets", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--weight", type=float, default=0.015)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with norquad and swequad")
    parser.add_argument("--models", type=Path, default=Path("."), help="folder in which models/ is")
    options = parser.parse_args()
    PARTS[options.part](options)


PARTS = {"targets": print_targets, "weight": print_weight}

if __name__ == "__main__":
    main()
