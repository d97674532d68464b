"""Measures every row and writes models/benchmarks/speed.json and speed.md.

python -m tests.benchmarks.speed [ROW ...]    the rows whose name contains one of these words; all without
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.speed.process import ROOT, fresh
from tests.benchmarks.speed.step import prepare
from trainer.files import write_atomically

OUTPUT = ROOT / "models" / "benchmarks"
NOT_HERE = "not measured here (no CUDA device)"
WIDTHS = (192, 384, 768)
# The starter config's rows per step at width 192; wider models get fewer, so that the stock side fits into 16 GiB.
BATCHES = {192: 16, 384: 8, 768: 8}
# Layers, width and words of NorBERT4-large, 360 million parameters, in BERT's architecture; rows of its H100 config.
LARGE, LARGE_BATCH = {"layers": 28, "width": 960, "words": 51_200}, 32
# Operations that a document's token needs: two for each of the layers' weights, thrice (forward, and two products
# backward), and the head's product once: its gradient is that of the active words.
FLOPS_PER_TOKEN = 6 * LARGE["layers"] * 12 * LARGE["width"] ** 2 + 2 * LARGE["width"] * LARGE["words"]
BUDGETS_MIB = {"cpu": 4 << 10, "cuda": 64 << 10}


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, in which setting, what is wanted and what was found."""

    what: str
    setting: str
    goal: str
    found: str
    figures: dict[str, Any]


def per_token(figures: dict[str, Any]) -> float:
    """Seconds of a step per real token of its documents: two orders of the rows have other lengths in a few steps."""
    return figures["seconds"] / figures["tokens"]


def times(factor: float) -> str:
    """5.25 → 5.2×."""
    return f"{factor:.1f}×"


def head_rows() -> Iterator[Row]:
    """Time and memory of the head, with and without padding, and beside one matrix product."""
    goals = {False: ("7×", "4.5×", "3.5×"), True: ("8×", "6×", "5.8×")}
    memory_goals = ("1/15", "1/13", "1/8")
    shape = "CPU, 16 × 256 tokens, vocabulary 50,000, 1 % active, width {}"
    for padded, (name, words) in ((False, ("head", "")), (True, ("head, padded", ", lengths 51 to 256"))):
        for number, width in enumerate(WIDTHS):
            stock, fused = (fresh("head", side=side, width=width, padded=padded) for side in ("stock", "fused"))
            figures, setting = {"stock": stock, "fused": fused}, shape.format(width) + words
            faster = times(stock["both"] / fused["both"])
            yield Row(f"{name}, forward + backward", setting, f"≥ {goals[padded][number]}", faster, figures)
            if not padded:
                share = f"1/{stock['mib'] / fused['mib']:.0f}"
                yield Row("head, memory beside its inputs", setting, f"≤ {memory_goals[number]}", share, figures)
    product = fresh("head", side="product", width=768)
    full = fresh("head", side="fused", width=768)
    found = f"{full['forward'] / product['forward']:.2f}×"
    yield Row("head forward, of one torch.mm", shape.format(768), "≤ 1.1×", found, {"fused": full, "product": product})


def step_rows(folders: Callable[[int], Path]) -> Iterator[Row]:
    """Whole steps of both trainers."""
    goals = {192: "≥ 3×, ≤ 1/4 peak memory", 384: "≥ 2×", 768: "≥ 1.5×"}
    for width, checkpointing in ((192, False), (192, True), (384, False), (768, False)):
        batch = BATCHES[width]
        arguments = {"folder": str(folders(width)), "batch": batch, "steps": 3, "checkpointing": checkpointing}
        ours, stock = (fresh("step", side=side, **arguments) for side in ("ours", "stock"))
        setting = f"CPU, 12 layers of width {width}, vocabulary 50,000, {batch} triplets of ≤ 256 tokens"
        setting += ", gradient checkpointing on both sides" if checkpointing else ""
        found = f"{times(per_token(stock) / per_token(ours))}, 1/{stock['mib'] / ours['mib']:.1f} peak memory"
        yield Row("whole training step", setting, goals[width], found, {"ours": ours, "stock": stock})


def largest_rows(setting: str, **arguments: Any) -> Iterator[Row]:
    """How many rows of a step fit into a budget, with activations kept and with them computed again."""
    for checkpointing in (False, True):
        ours, stock = (
            fresh("largest", side=side, checkpointing=checkpointing, **arguments) for side in ("ours", "stock")
        )
        found = f"{times(ours['batch'] / stock['batch'])} ({ours['batch']} rows to {stock['batch']})"
        under = f"{setting}, under {arguments['budget_mib'] / 1024:.0f} GiB"
        words = f"{under}, gradient checkpointing on both sides" if checkpointing else under
        yield Row("largest batch", words, "≥ 4×", found, {"ours": ours, "stock": stock})


def curve_rows(folders: Callable[[int], Path]) -> Iterator[Row]:
    """The losses of 200 steps with the library's head and with ours, on the same batches."""
    folder = prepare(folders(192).parent / "small", 64, layers=2, words=5000)
    ours, stock = (
        fresh("step", side=side, folder=str(folder), batch=8, steps=200, length=64) for side in ("ours", "stock-head")
    )
    pairs = list(zip(ours["losses"], stock["losses"], strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    setting = f"CPU, fp32, {len(pairs)} steps, 2 layers of width 64, vocabulary 5,000, same batches"
    yield Row("loss curve against the library's head", setting, "≤ 1e-4 relative", f"{worst:.1e}", {"losses": pairs})


def encode_rows(folders: Callable[[int], Path]) -> Iterator[Row]:
    """Documents in bulk, queries one at a time."""
    folder = str(folders(192))
    ours, stock = (fresh("encode", side=side, folder=folder, what="documents") for side in ("ours", "stock"))
    found = f"{times(stock['seconds'] / ours['seconds'])}, 1/{stock['mib'] / ours['mib']:.1f} peak memory"
    setting = "CPU, 12 layers of width 192, vocabulary 50,000, 128 passages of ≤ 256 tokens, batches of 32"
    yield Row("document encoding", setting, "≥ 2.5×", found, {"ours": ours, "stock": stock})
    ours, stock = (fresh("encode", side=side, folder=folder, what="queries") for side in ("ours", "stock"))
    found = f"{times(stock['p50'] / ours['p50'])}, p95 {ours['p95']:.2f} ms"
    setting = "CPU, inference-free, vocabulary 50,000, one query at a time"
    yield Row("query encoding", setting, "≥ 20×, p95 < 1 ms", found, {"ours": ours, "stock": stock})


def cuda_rows(scratch: str) -> Iterator[Row]:
    """The head and whole steps on a GPU, where there is one."""
    head = "CUDA, 32 × 512 tokens, width 960, vocabulary 51,200, bf16"
    step = f"CUDA, NorBERT4-large's shape, {LARGE_BATCH} triplets of ≤ 512 tokens, bf16"
    goals = {
        ("head, forward + backward", head): "≥ 4.8×",
        ("head, memory beside its inputs", head): "≤ 1/10",
        ("head forward, of the matrix product's speed", head): "≥ 70 %",
        ("whole training step", step): "≥ 2×",
        ("largest batch", "CUDA, NorBERT4-large's shape, bf16"): "≥ 4×",
    }
    if not torch.cuda.is_available():
        yield from (Row(*row, goal, NOT_HERE, {}) for row, goal in goals.items())
        return
    figures = fresh("cuda")
    found = (
        times(figures["eager_ms"] / figures["fused_ms"]),
        f"1/{figures['eager_mib'] / figures['fused_mib']:.0f}",
        f"{figures['product_ms'] / figures['forward_ms']:.0%}",
    )
    for (row, goal), value in zip(goals.items(), found, strict=False):
        yield Row(*row, goal, value, figures)

    folder = prepare(Path(scratch, "large"), **LARGE)
    arguments = {"folder": str(folder), "length": 512, "device": "cuda"}
    stock = fresh("step", side="stock", batch=LARGE_BATCH, steps=32, **arguments)
    for attention, words in (("varlen", "texts packed"), ("auto", "texts padded")):
        overrides = [f"model.attention={attention}"]
        ours = fresh("step", side="ours", batch=LARGE_BATCH, steps=32, overrides=overrides, **arguments)
        parts = [times(per_token(stock) / per_token(ours))]
        for side, measured in (("ours", ours), ("stock", stock)):
            share = FLOPS_PER_TOKEN / per_token(measured) / (figures["peak_tflops"] * 1e12)
            parts.append(f"{side} {1 / per_token(measured):,.0f} tokens/s, {share:.0%} of a matrix product's rate")
        yield Row(
            "whole training step",
            f"{step}, {words}",
            goals["whole training step", step],
            "; ".join(parts),
            {"ours": ours, "stock": stock},
        )
    yield from largest_rows("CUDA, NorBERT4-large's shape, bf16", budget_mib=BUDGETS_MIB["cuda"], **arguments)


def all_rows(words: list[str]) -> Iterator[Row]:
    """The rows of the parts whose name contains one of the words."""
    with tempfile.TemporaryDirectory() as scratch:
        made: dict[int, Path] = {}

        def folders(width: int) -> Path:
            if width not in made:
                made[width] = Path(scratch, str(width))
                prepare(made[width], width)
            return made[width]

        parts = {
            "head": head_rows,
            "encode": lambda: encode_rows(folders),
            "step": lambda: step_rows(folders),
            "curve": lambda: curve_rows(folders),
            "largest": lambda: largest_rows(
                "CPU, 12 layers of width 192, texts of 256 tokens",
                folder=str(folders(192)),
                budget_mib=BUDGETS_MIB["cpu"],
            ),
            "cuda": lambda: cuda_rows(scratch),
        }
        for name, rows in parts.items():
            if not words or any(word in name for word in words):
                yield from rows()


def machine() -> str:
    """Processor, torch and day."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    kind = names[0] if names else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{kind}, one core of {os.cpu_count()}{gpu}; torch {torch.__version__}; {date.today()}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


def main() -> None:
    """Print each row when it is known; then write both files."""
    head = ["| what | setting | goal | found |", "|---|---|---|---|"]
    print("\n".join(head))
    rows = []
    for row in all_rows(sys.argv[1:]):
        rows.append(row)
        head.append(f"| {row.what} | {row.setting} | {row.goal} | {row.found} |")
        print(head[-1], flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    values = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    write_atomically(OUTPUT / "speed.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    write_atomically(OUTPUT / "speed.md", "\n".join([*head, "", f"Measured on {machine()}.", ""]))
    print(f"written   {OUTPUT / 'speed.json'} and {OUTPUT / 'speed.md'}")


if __name__ == "__main__":
    main()
