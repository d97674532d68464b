"""The loss of CSR's autoencoder (arXiv 2503.01776), over the batch of all processes."""

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import CSRReconstructionLoss
from sentence_transformers.util import cos_sim
from sentence_transformers.util.distributed import all_gather_with_grad
from torch import Tensor
from torch.nn import functional

from trainer.config.schema import LossConfig
from trainer.system.distributed import processes

# What the autoencoder's output calls the dense vector, and its code.
DENSE, CODE = "sentence_embedding_backbone", "sentence_embedding"


class SharedReconstructionLoss(CSRReconstructionLoss):
    """The library's reconstruction loss of the batch that all processes share.

    Part of the loss is relative to the batch's variance, which differs between the rows of two processes. With
    loss.similarity_weight, another part compares the codes of each query and all passages as their dense vectors are
    compared: the KL divergence of the two softmaxes. So the dense model is the codes' teacher (arXiv 2010.11386).
    """

    residuals: Tensor | None = None
    """[texts of all processes, width]: what the code of each text of the last training batch leaves unexplained."""

    def __init__(self, model: SparseEncoder, loss: LossConfig, scale: float) -> None:
        """scale: cosines of codes are multiplied by it, here as in the contrastive loss."""
        super().__init__(model, beta=loss.beta)
        self.weight, self.temperature, self.scale = loss.similarity_weight, loss.similarity_temperature, scale

    def compute_loss_from_embeddings(self, outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """outputs: for each column, queries first, what the autoencoder made of this process's [rows, width]."""
        if processes() > 1:
            wanted = (DENSE, CODE) if self.weight else (DENSE,)
            names = [name for name in outputs[0] if name.startswith("decoded_") or name in wanted]
            outputs = [
                {name: None if output[name] is None else all_gather_with_grad(output[name]) for name in names}
                for output in outputs
            ]
        if torch.is_grad_enabled():
            self.residuals = torch.cat([output[DENSE] - output["decoded_embedding_k"] for output in outputs]).detach()
        losses = super().compute_loss_from_embeddings(outputs)
        if self.weight:
            losses["similarity_loss"] = self.weight * self._similarity_loss(outputs)
        return losses

    def _similarity_loss(self, outputs: list[dict[str, Tensor]]) -> Tensor:
        """How much the codes' similarities to all passages differ from the dense vectors', a mean over queries."""

        def similarities(name: str) -> Tensor:
            queries, *passages = (output[name].float() for output in outputs)
            return cos_sim(queries, torch.cat(passages))

        teacher = (similarities(DENSE).detach() / self.temperature).log_softmax(1)
        student = (self.scale * similarities(CODE)).log_softmax(1)
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
