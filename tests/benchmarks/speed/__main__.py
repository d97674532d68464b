"""Measures every row and writes models/benchmarks/speed.json and speed.md.

python -m tests.benchmarks.speed [ROW ...]    the parts whose name begins with one of these words; all without
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.speed.process import ROOT, fresh
from tests.benchmarks.speed.step import prepare
from trainer.system.files import write_atomically

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


def against(ours: dict[str, Any], stock: dict[str, Any]) -> str:
    """How much faster a token is, and what share of the memory it takes."""
    return f"{times(per_token(stock) / per_token(ours))}, 1/{stock['mib'] / ours['mib']:.1f} peak memory"


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
        yield Row("whole training step", setting, goals[width], against(ours, stock), {"ours": ours, "stock": stock})


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


@cache
def cuda_head() -> dict[str, Any]:
    """Times and memory of the head on a GPU, and the rate of a large matrix product there."""
    return fresh("cuda")


def cuda_head_rows() -> Iterator[Row]:
    """The head on a GPU."""
    found, setting = cuda_head(), "CUDA, 32 × 512 tokens, width 960, vocabulary 51,200, bf16"
    faster, share = times(found["eager_ms"] / found["fused_ms"]), f"1/{found['eager_mib'] / found['fused_mib']:.0f}"
    yield Row("head, forward + backward", setting, "≥ 4.8×", faster, found)
    yield Row("head, memory beside its inputs", setting, "≤ 1/10", share, found)
    of_product = f"{found['product_ms'] / found['forward_ms']:.0%}"
    yield Row("head forward, of the matrix product's speed", setting, "≥ 70 %", of_product, found)


def cuda_step_rows(folder: Path) -> Iterator[Row]:
    """Whole steps on a GPU, with the flags of the shipped H100 configs; torch.compile where the setting says so."""
    arguments = {"folder": str(folder), "batch": LARGE_BATCH, "steps": 32, "length": 512, "device": "cuda"}
    stock = fresh("step", side="stock", **arguments)
    rate = cuda_head()["peak_tflops"] * 1e12
    for words, overrides in (
        ("texts packed", []),
        ("texts padded", ["model.attention=sdpa"]),
        ("texts packed, ours with torch.compile", ["training.torch_compile=true"]),
    ):
        ours = fresh("step", side="ours", overrides=overrides, **arguments)
        parts = [against(ours, stock)]
        for side, measured in (("ours", ours), ("stock", stock)):
            share = FLOPS_PER_TOKEN / per_token(measured) / rate
            parts.append(f"{side} {1 / per_token(measured):,.0f} tokens/s, {share:.0%} of a matrix product's rate")
        setting = f"CUDA, NorBERT4-large's shape, {LARGE_BATCH} triplets of ≤ 512 tokens, bf16, {words}"
        yield Row("whole training step", setting, "≥ 2×", "; ".join(parts), {"ours": ours, "stock": stock})


def cuda_largest_rows(folders: Callable[[int], Path], large: Callable[[], Path]) -> Iterator[Row]:
    """Largest batches on a GPU: of the starter config's shape, as on a CPU, and of NorBERT4-large's."""
    small = {"folder": str(folders(192)), "length": 256, "budget_mib": 4 << 10}
    yield from largest_rows("CUDA, 12 layers of width 192, texts of 256 tokens, bf16", device="cuda", **small)
    big = {"folder": str(large()), "length": 512, "budget_mib": 48 << 10}
    yield from largest_rows("CUDA, NorBERT4-large's shape, texts of 512 tokens, bf16", device="cuda", **big)


def all_rows(words: list[str]) -> Iterator[Row]:
    """The rows of the parts whose name begins with one of the words, or of all."""
    with tempfile.TemporaryDirectory() as scratch:

        @cache
        def folders(width: int) -> Path:
            return prepare(Path(scratch, str(width)), width)

        @cache
        def large() -> Path:
            return prepare(Path(scratch, "large"), **LARGE)

        parts = {
            "head": head_rows,
            "encode": lambda: encode_rows(folders),
            "step": lambda: step_rows(folders),
            "curve": lambda: curve_rows(folders),
            "largest": lambda: largest_rows(
                "CPU, 12 layers of width 192, texts of 256 tokens", folder=str(folders(192)), budget_mib=4 << 10
            ),
            "cuda-head": cuda_head_rows,
            "cuda-step": lambda: cuda_step_rows(large()),
            "cuda-largest": lambda: cuda_largest_rows(folders, large),
        }
        for name, rows in parts.items():
            if words and not name.startswith(tuple(words)):
                continue
            if name.startswith("cuda") and not torch.cuda.is_available():
                yield Row(name, "CUDA", "", NOT_HERE, {})
            else:
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
