"""CSR starts with many active dims per code, and ends with few."""

from typing import Any

from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from transformers import TrainerCallback, TrainerState

from trainer.config import Config


def k_at(step: int, of: int, config: Config) -> int:
    """Dims kept active in step number `step` (from 0) of a run: from csr_k_start down to csr_k, by equal factors.

    A code of many dims is easier to learn, and its dims do not die while they are all random; annealing the sparsity is
    from k-sparse autoencoders (arXiv 1312.5663, section 4.2.1).
    """
    model = config.model
    if model.csr_k_start is None:
        return model.csr_k
    progress = min(step / max(model.csr_k_share * of, 1), 1.0)
    return round(model.csr_k_start * (model.csr_k / model.csr_k_start) ** progress)


class ActiveDimsAnnealing(TrainerCallback):
    """Sets k before every step. Restores csr_k after it, so evaluations and checkpoints have the final k. Logs k."""

    def __init__(self, autoencoder: SparseAutoEncoder, config: Config) -> None:
        self.autoencoder, self.config = autoencoder, config

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """This step's k."""
        self.autoencoder.k = k_at(state.global_step, state.max_steps, self.config)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The final k."""
        self.autoencoder.k = self.config.model.csr_k

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """The last step's k."""
        if logs is not None and "loss" in logs:
            logs["csr_k"] = k_at(state.global_step - 1, state.max_steps, self.config)
