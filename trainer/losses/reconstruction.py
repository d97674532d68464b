"""The loss of CSR's autoencoder (arXiv 2503.01776), over the batch of all processes."""

import torch
from sentence_transformers.sparse_encoder.losses import CSRReconstructionLoss
from sentence_transformers.util.distributed import all_gather_with_grad
from torch import Tensor

from trainer.system.distributed import processes


class SharedReconstructionLoss(CSRReconstructionLoss):
    """The library's reconstruction loss of the batch that all processes share.

    Part of the loss is relative to the batch's variance, which differs between the rows of two processes.
    """

    residuals: Tensor | None = None
    """[texts of all processes, width]: what the code of each text of the last training batch leaves unexplained."""

    def compute_loss_from_embeddings(self, outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """outputs: for each column, what the autoencoder made of this process's [rows, width]."""
        if processes() > 1:
            names = [name for name in outputs[0] if name.startswith("decoded_") or name.endswith("_backbone")]
            outputs = [
                {name: None if output[name] is None else all_gather_with_grad(output[name]) for name in names}
                for output in outputs
            ]
        if torch.is_grad_enabled():
            self.residuals = torch.cat(
                [output["sentence_embedding_backbone"] - output["decoded_embedding_k"] for output in outputs]
            ).detach()
        return super().compute_loss_from_embeddings(outputs)
