"""Mixes the trained weights with those from before training, which does better on new texts (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.config import ConfigError, one_line
from trainer.system.files import written_whole


def keep_start_weights(model: nn.Module, file: Path) -> None:
    """Write the weights that training is about to change. Raises ConfigError when they cannot be written."""
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model)}
    try:
        with written_whole(file) as aside:
            save_file(weights, aside)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be written: {one_line(error)}") from None


def require_start_weights(file: Path) -> None:
    """Raise ConfigError when a resumed run lacks the weights from before training, or a part of their file."""
    try:
        with safe_open(file, "pt"):  # compares the file's size with what its header says
            return
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file}, which training.start_share needs, cannot be read: {one_line(error)}. Put it back, or train "
            "anew under a new name"
        ) from None


@torch.no_grad()
def mix_in_start_weights(model: nn.Module, file: Path, share: float) -> None:
    """Move every trained weight by this share of its way back to where it was before training."""
    start = load_file(file)
    for name, weights in _trained(model):
        weights.lerp_(start[name].to(weights), share)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
