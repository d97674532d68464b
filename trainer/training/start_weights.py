"""Mixes the trained weights with those from before training, which does better on new texts (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.config import ConfigError, one_line
from trainer.runs.run import Run
from trainer.system.files import sha256_of, written_whole


def keep_start_weights(model: nn.Module, run: Run) -> None:
    """Write the weights that training is about to change."""
    with written_whole(run.start_weights) as aside:
        save_file({name: weights.detach().cpu().contiguous() for name, weights in _trained(model)}, aside)
    run.update(start_weights={"sha256": sha256_of(run.start_weights)})


def require_start_weights(run: Run) -> None:
    """Raise ConfigError when a resumed run lacks the weights from before training, or they are not as they were."""
    kept, file = run.manifest.get("start_weights"), run.start_weights
    if kept and file.is_file() and sha256_of(file) == kept["sha256"]:
        return
    if kept:
        why, end = "has changed" if file.is_file() else "is missing", "Put it back, or end"
    else:
        why, end = "were not kept when this run was started", "End"
    raise ConfigError(
        f"training.start_share needs the weights from before training, {file}, which {why}. {end} with the trained weights "
        "alone: SET=training.start_share=null"
    )


@torch.no_grad()
def mix_in_start_weights(model: nn.Module, run: Run, share: float) -> None:
    """Move every trained weight by this share of its way back to where it was. Raises ConfigError without the file."""
    try:
        start = load_file(run.start_weights)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{run.start_weights} cannot be read: {one_line(error)}") from None
    for name, weights in _trained(model):
        weights.lerp_(start[name].to(weights), share)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
