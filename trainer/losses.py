"""The training objective: a contrastive loss with in-batch negatives, inside what keeps the vectors sparse."""

from collections.abc import Callable, Iterable

from sentence_transformers import SparseEncoder, util
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    CSRLoss,
    CSRReconstructionLoss,
    FlopsLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.util.distributed import all_gather_with_grad
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from trainer.config import Config
from trainer.distributed import processes
from trainer.sparsity import BatchStatistics


def ranking_loss(
    model: SparseEncoder, statistics: BatchStatistics, scale: float, similarity: Callable
) -> SparseMultipleNegativesRankingLoss:
    """The library's contrastive loss over the batch of all processes; `statistics` sees this one's vectors in training."""
    loss = SparseMultipleNegativesRankingLoss(
        model, scale=scale, similarity_fct=similarity, gather_across_devices=processes() > 1
    )
    compute = loss.compute_loss_from_embeddings

    def measured(embeddings: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        embeddings = list(embeddings)
        if model.training:
            statistics.add(embeddings)
        return compute(embeddings, labels)

    loss.compute_loss_from_embeddings = measured
    return loss


class SharedFlopsLoss(FlopsLoss):
    """FLOPS loss (arXiv 2004.05665) of the batch that all processes share: the squared length of its mean vector.

    The square of a mean over a part of the batch is another number: twice as many processes with half the rows each
    would press for more sparsity.
    """

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """embeddings: this process's [rows, vocabulary], of as many rows as every other's."""
        mean = embeddings.mean(0)
        if processes() > 1:
            mean = all_reduce(mean) / processes()
        return mean.square().sum()


class SharedReconstructionLoss(CSRReconstructionLoss):
    """Reconstruction loss (arXiv 2503.01776) of the batch that all processes share: part of it is relative to the batch's
    variance, which is another one for each process's rows."""

    def compute_loss_from_embeddings(self, outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """outputs: for each column, what the autoencoder made of this process's [rows, width]."""
        if processes() > 1:
            names = [name for name in outputs[0] if name.startswith("decoded_") or name.endswith("_backbone")]
            outputs = [
                {name: None if output[name] is None else all_gather_with_grad(output[name]) for name in names}
                for output in outputs
            ]
        return super().compute_loss_from_embeddings(outputs)


def build_loss(config: Config, model: SparseEncoder, statistics: BatchStatistics) -> nn.Module:
    """The loss the config asks for, around one contrastive loss."""
    return LOSSES[config.loss.type](config, model, statistics)


def build_splade_loss(config: Config, model: SparseEncoder, statistics: BatchStatistics) -> nn.Module:
    """Contrastive loss on dot products plus FLOPS loss on documents and queries (arXiv 2109.10086)."""
    loss = config.loss
    ranking = ranking_loss(model, statistics, loss.scale or 1.0, util.dot_score)
    weights = {
        "document_regularizer_weight": loss.document_regularizer_weight,
        # 0 rather than None: None means the same and makes the library warn
        "query_regularizer_weight": loss.query_regularizer_weight or 0.0,
    }
    weights |= {"document_regularizer": SharedFlopsLoss(model), "query_regularizer": SharedFlopsLoss(model)}
    if loss.cached:
        return CachedSpladeLoss(model, ranking, mini_batch_size=loss.mini_batch_size, **weights)
    return SpladeLoss(model, ranking, **weights)


def build_csr_loss(config: Config, model: SparseEncoder, statistics: BatchStatistics) -> nn.Module:
    """Reconstruction of the dense vector plus a contrastive loss on cosines (arXiv 2503.01776)."""
    loss = config.loss
    ranking = ranking_loss(model, statistics, loss.scale or 20.0, util.cos_sim)
    csr = CSRLoss(model, ranking, beta=loss.beta, gamma=loss.gamma)
    csr.reconstruction_loss = SharedReconstructionLoss(model, beta=loss.beta)
    return csr


LOSSES: dict[str, Callable[[Config, SparseEncoder, BatchStatistics], nn.Module]] = {
    "splade": build_splade_loss,
    "csr": build_csr_loss,
}
