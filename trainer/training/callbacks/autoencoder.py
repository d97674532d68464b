"""What happens to CSR's autoencoder between the steps: fewer and fewer active dims, and new lives for dead ones."""

import torch
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.config import Config


def autoencoder_of(model: nn.Module) -> SparseAutoEncoder:
    """The part of a CSR model that makes the sparse code."""
    return next(module for module in model.modules() if isinstance(module, SparseAutoEncoder))


def k_at(step: int, of: int, config: Config) -> int:
    """Dims kept active in step number `step` (from 0) of a run: from csr_k_start down to csr_k, by equal factors.

    A code of many dims is easier to learn, and its dims do not die while they are all random; annealing the sparsity is
    from k-sparse autoencoders (arXiv 1312.5663, section 4.2.1).
    """
    model = config.model
    if model.csr_k_start is None:
        return model.csr_k
    way = min(step / max(model.csr_k_share * of, 1), 1.0)
    return round(model.csr_k_start * (model.csr_k / model.csr_k_start) ** way)


class AutoencoderCare(TrainerCallback):
    """Sets k before every step and restores csr_k after it, so that evaluations and checkpoints have the final k; logs the
    share of dead dims, and revives them.

    A dim is dead when it was in no text's code for the library's `dead_threshold` passes. It is pointed at what the code
    explains worst: its weights become the residual of one of the last batch's texts (Bricken et al. 2023, "Towards
    Monosemanticity"), scaled to the living dims' mean length, and its bias and the optimizer's memory of it 0. The
    auxiliary loss (arXiv 2503.01776) works on dead dims too, but only on csr_k_aux of them, and a little per step.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.autoencoder, self.config = autoencoder_of(model), config
        self.residuals: Tensor | None = None  # [texts, width] of the last batch, of all processes
        self.revived = 0

    def see(self, residuals: Tensor) -> None:
        """Called by the loss: what the code of each text leaves unexplained."""
        self.residuals = residuals.detach()

    def on_step_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """This step's k."""
        self.autoencoder.k = k_at(state.global_step, state.max_steps, self.config)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """The final k, and new lives."""
        self.autoencoder.k = self.config.model.csr_k
        every = self.config.model.csr_revive_steps
        # not at the end: a dim that nothing has trained is noise
        if every and state.global_step % every == 0 and state.global_step + every <= state.max_steps:
            self.revive(kwargs["optimizer"])

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs) -> None:
        """Dead dims, k, and how many dims were revived so far."""
        if logs is not None and "loss" in logs:
            logs["csr_dead_share"] = self.dead().float().mean().item()
            logs["csr_k"] = k_at(state.global_step - 1, state.max_steps, self.config)
            logs["csr_revived"] = self.revived

    def dead(self) -> Tensor:
        """[dims]: whether each was in no code lately."""
        return self.autoencoder.stats_last_nonzero > self.autoencoder.dead_threshold

    @torch.no_grad()
    def revive(self, optimizer: torch.optim.Optimizer) -> None:
        """Point dead dims at the texts that are reconstructed worst, one each."""
        code, dead = self.autoencoder, self.dead()
        if self.residuals is None or not dead.any():
            return
        worst = self.residuals[self.residuals.norm(dim=1).argsort(descending=True)].to(code.encoder.weight.dtype)
        dims = dead.nonzero().squeeze(1)[: len(worst)]
        alive = code.encoder.weight[~dead]
        length = alive.norm(dim=1).mean() if len(alive) else code.encoder.weight.norm(dim=1).mean()
        code.encoder.weight[dims] = nn.functional.normalize(worst[: len(dims)], dim=1) * length
        code.latent_bias[dims] = 0
        code.stats_last_nonzero[dims] = 0
        state = getattr(optimizer, "optimizer", optimizer).state
        for parameter in (code.encoder.weight, code.latent_bias):
            for memory in state.get(parameter, {}).values():
                if torch.is_tensor(memory) and memory.shape == parameter.shape:
                    memory[dims] = 0
        self.revived += len(dims)
