"""The head on a GPU, at NorBERT4-large's width, and the rate of a large matrix product there. Needs CUDA."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.speed.process import answer
from tests.oracles import splade_head
from trainer.encoding.fused_head import splade_max

TEXTS, LENGTH, WIDTH, WORDS = 32, 512, 960, 51_200
BIAS = -3.95
PEAK = 8192  # rows and columns of the matrix product whose rate counts as the GPU's
# Several times an H100's second-level cache of 50 MiB, written between two measurements to empty it.
FLUSH_BYTES = 256 << 20


def milliseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median time on the GPU, after calls that compile, tune and warm up."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure() -> dict[str, Any]:
    """Milliseconds and MiB beside the inputs, of eager logits, the fused head and one matrix product, in bf16.

    peak_tflops: 10¹² operations a second of a product of two 8192 × 8192 matrices.
    """
    torch.manual_seed(0)
    hidden = torch.randn(TEXTS, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(WORDS, WIDTH, device="cuda") * WIDTH**-0.5).bfloat16().requires_grad_()
    bias = torch.full((WORDS,), BIAS, device="cuda", requires_grad=True)
    mask = torch.ones(TEXTS, LENGTH, device="cuda", dtype=torch.long)
    outer = torch.randn(TEXTS, WORDS, device="cuda") / WORDS
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for name, head in (("eager", splade_head), ("fused", splade_max)):

            def both(head=head):
                head(hidden, weight, bias, mask).backward(outer)
                hidden.grad = weight.grad = bias.grad = None

            found[f"{name}_ms"] = milliseconds(both)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            found[f"{name}_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        with torch.no_grad():
            found["forward_ms"] = milliseconds(lambda: splade_max(hidden, weight, bias, mask))
            flat, product = hidden.view(-1, WIDTH), hidden.new_empty(TEXTS * LENGTH, WORDS)
            found["product_ms"] = milliseconds(lambda: torch.mm(flat, weight.t(), out=product))
            left, right = (torch.randn(PEAK, PEAK, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            found["peak_tflops"] = 2 * PEAK**3 / milliseconds(lambda: left @ right) / 1e9
    return found


if __name__ == "__main__":
    answer(measure)
