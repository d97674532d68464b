"""The training objective: a contrastive loss with in-batch negatives, inside what keeps the vectors sparse."""

from collections.abc import Callable, Iterable

from sentence_transformers import SparseEncoder, util
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    CSRLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch import Tensor, nn

from trainer.config import Config
from trainer.sparsity import BatchStatistics


def ranking_loss(
    model: SparseEncoder, statistics: BatchStatistics, scale: float, similarity: Callable
) -> SparseMultipleNegativesRankingLoss:
    """The library's contrastive loss; `statistics` sees the vectors it compares in training."""
    loss = SparseMultipleNegativesRankingLoss(model, scale=scale, similarity_fct=similarity)
    compute = loss.compute_loss_from_embeddings

    def measured(embeddings: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        embeddings = list(embeddings)
        if model.training:
            statistics.add(embeddings)
        return compute(embeddings, labels)

    loss.compute_loss_from_embeddings = measured
    return loss


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
    if loss.cached:
        return CachedSpladeLoss(model, ranking, mini_batch_size=loss.mini_batch_size, **weights)
    return SpladeLoss(model, ranking, **weights)


def build_csr_loss(config: Config, model: SparseEncoder, statistics: BatchStatistics) -> nn.Module:
    """Reconstruction of the dense vector plus a contrastive loss on cosines (arXiv 2503.01776)."""
    loss = config.loss
    ranking = ranking_loss(model, statistics, loss.scale or 20.0, util.cos_sim)
    return CSRLoss(model, ranking, beta=loss.beta, gamma=loss.gamma)


LOSSES: dict[str, Callable[[Config, SparseEncoder, BatchStatistics], nn.Module]] = {
    "splade": build_splade_loss,
    "csr": build_csr_loss,
}
