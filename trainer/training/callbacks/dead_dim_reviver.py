"""Dims of CSR's autoencoder that no text activates any more get new weights."""

from typing import Any

import torch
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from trainer.config import Config
from trainer.losses.reconstruction import SharedReconstructionLoss


class DeadDimReviver(TrainerCallback):
    """Revives dead dims every csr_revive_steps steps, and logs their share.

    A dim is dead when it was in no text's code for the library's `dead_threshold` passes. Its weights become the residual
    of one of the last batch's texts, of those whose code explains least (Bricken et al. 2023, "Towards Monosemanticity"),
    scaled to the living dims' mean length. Its bias and the optimizer's state for it become 0. The auxiliary loss
    (arXiv 2503.01776) works on dead dims too, but only on csr_k_aux of them, and a little per step.
    """

    def __init__(self, autoencoder: SparseAutoEncoder, loss: SharedReconstructionLoss, config: Config) -> None:
        """loss: keeps the residuals of the last batch."""
        self.autoencoder, self.loss, self.every = autoencoder, loss, config.model.csr_revive_steps
        self.revived = 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Revive now and then, but not at the end: a dim that nothing has trained is noise."""
        if self.every and state.global_step % self.every == 0 and state.global_step + self.every <= state.max_steps:
            self.revive(kwargs["optimizer"])

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """The share of dead dims, and how many were revived so far."""
        if logs is not None and "loss" in logs:
            logs["csr_dead_share"] = self.dead().float().mean().item()
            logs["csr_revived"] = self.revived

    def dead(self) -> Tensor:
        """[dims]: whether each was in no code lately."""
        return self.autoencoder.stats_last_nonzero > self.autoencoder.dead_threshold

    @torch.no_grad()
    def revive(self, optimizer: torch.optim.Optimizer) -> None:
        """Point dead dims at the texts that are reconstructed worst, one each."""
        autoencoder, dead, residuals = self.autoencoder, self.dead(), self.loss.residuals
        if residuals is None or not dead.any():
            return
        worst = residuals[residuals.norm(dim=1).argsort(descending=True)].to(autoencoder.encoder.weight.dtype)
        dims = dead.nonzero().squeeze(1)[: len(worst)]
        living = autoencoder.encoder.weight[~dead]
        length = (living if len(living) else autoencoder.encoder.weight).norm(dim=1).mean()
        autoencoder.encoder.weight[dims] = nn.functional.normalize(worst[: len(dims)], dim=1) * length
        autoencoder.latent_bias[dims] = 0
        autoencoder.stats_last_nonzero[dims] = 0
        state = getattr(optimizer, "optimizer", optimizer).state
        for parameter in (autoencoder.encoder.weight, autoencoder.latent_bias):
            for moment in state.get(parameter, {}).values():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moment[dims] = 0
        self.revived += len(dims)
