"""Which device training runs on, and why."""

import ctypes
import os
import resource
import sys
import timeit
from functools import cache
from pathlib import Path

import torch

from trainer.config import Config, ConfigError
from trainer.system.distributed import is_first, processes, processes_here

# A product in bfloat16 that takes more of float32's time than this is slower, whatever else the machine is doing.
SLOWER = 1.5
# The product that is timed: 384 × 384 numbers take under a millisecond, and 0.1 s where bfloat16 is emulated.
WIDTH, ROUNDS = 384, 20


def choose_device(config: Config) -> tuple[str, str]:
    """The device's name and the reason for it. Raises ConfigError when the config asks for what this machine cannot do."""
    device, reason = find_device(config.hardware.device)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus > 1 and processes() == 1:
        raise ConfigError(
            f"this machine has {gpus} GPUs. Say how many to train on: PROCS={gpus} (--processes {gpus}), "
            "or CUDA_VISIBLE_DEVICES=0 for one"
        )
    if gpus and processes_here() > gpus:
        raise ConfigError(f"{processes_here()} processes need as many GPUs, and this machine has {gpus}: PROCS={gpus}")
    if device == "mps" and processes() > 1:
        raise ConfigError(
            'several processes cannot share the GPU of a Mac. Start one, or set SET="hardware.device=cpu"'
        )
    if device == "cpu" and config.training.bf16 and is_first():
        if (share := bfloat16_time()) > SLOWER:
            raise ConfigError(
                f"training.bf16: on this CPU a matrix product takes {share:.1f} times as long in bfloat16 as in float32 "
                '(measured now). Switch it off: SET="training.bf16=false"'
            )
        reason += f"; a matrix product in bfloat16 takes {share:.1f} times as long as in float32"
    for key, wanted in (("training.fp16", config.training.fp16), ("hardware.tf32", config.hardware.tf32)):
        if wanted and device != "cuda":
            raise ConfigError(f"{key} is for CUDA, and training runs on {device} ({reason})")
    return device, reason


def find_device(wanted: str) -> tuple[str, str]:
    """The device that `auto`, or a name, stands for on this machine, and the reason."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto":
        if not here[wanted]:
            raise ConfigError(
                f"hardware.device is {wanted}, but torch {torch.__version__} finds no such device on this machine. "
                'Run it on one that has it, or choose another: SET="hardware.device=cpu training.bf16=false"'
            )
        return wanted, "hardware.device says so"
    device = next(name for name in ("cuda", "mps", "cpu") if here[name])
    missing = [name for name in ("cuda", "mps") if not here[name]]
    return device, "auto: " + (f"no {' and no '.join(missing)} here" if device == "cpu" else f"{device} is here")


@cache
def bfloat16_time() -> float:
    """Time of a matrix product in bfloat16 on this CPU, as a multiple of its time in float32: the fastest of some each.

    In one thread: several wait for each other on a machine that is busy, which says nothing about either.
    """

    def fastest(kind: torch.dtype) -> float:
        factor = torch.ones(WIDTH, WIDTH, dtype=kind)
        return min(timeit.repeat(lambda: torch.mm(factor, factor), number=1, repeat=ROUNDS))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    share = fastest(torch.bfloat16) / fastest(torch.float32)
    torch.set_num_threads(threads)
    return share


def describe_device(device: str) -> str:
    """A device's name for the manifest."""
    if device == "cuda":
        return f"{processes()} × {torch.cuda.get_device_name()}"
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads" + (f" × {processes()} processes" if processes() > 1 else "")
    return device


def give_back_unused_memory() -> None:
    """Return what is free within the heap to the system, where its C library can (glibc).

    Batches of all lengths leave it in pieces: 10 MB more of them after every 1,000 steps of the quickstart.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def memory_of(device: str) -> int:
    """Bytes of memory that training can have there: the GPU's, what macOS recommends for it, or the machine's."""
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory
    if device == "mps":
        return torch.mps.recommended_max_memory()
    whole, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"  # a container's
    return whole if allowed == "max" else min(whole, int(allowed))


def peak_memory_gib(device: str) -> float:
    """Most memory used so far in GiB: the GPU's where there is one, else the process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
