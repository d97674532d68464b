"""Which device training runs on, and why."""

import resource
import sys

import torch

from trainer.config import Config, ConfigError


def choose_device(config: Config) -> tuple[str, str]:
    """The device's name and the reason for it. Raises ConfigError when the config asks for one that is not here."""
    wanted = config.hardware.device
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto":
        if not here[wanted]:
            raise ConfigError(
                f"hardware.device is {wanted}, but torch {torch.__version__} finds no such device on this machine. "
                'Run it on one that has it, or choose another: SET="hardware.device=cpu"'
            )
        return wanted, "hardware.device says so"
    device = next(name for name in ("cuda", "mps", "cpu") if here[name])
    missing = [name for name in ("cuda", "mps") if not here[name]]
    return device, "auto: " + (f"no {' and no '.join(missing)} here" if device == "cpu" else f"{device} is here")


def describe_device(device: str) -> str:
    """A device's name for the manifest."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device


def peak_memory_gib(device: str) -> float:
    """Most memory used so far in GiB: the GPU's where there is one, else the process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
