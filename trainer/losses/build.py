"""Builds the loss that a config asks for: a contrastive loss, inside what keeps the vectors sparse."""

from collections.abc import Callable

from sentence_transformers import SparseEncoder, util
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, CSRLoss
from sentence_transformers.sparse_encoder.losses import SpladeLoss as StockSpladeLoss
from torch import Tensor, nn

from trainer.config import Config
from trainer.losses.ranking import RankingLoss
from trainer.losses.reconstruction import SharedReconstructionLoss
from trainer.losses.regularizers import Regularizer, document_frequency_price, flops, idf_flops, l1
from trainer.losses.splade import SpladeLoss
from trainer.losses.statistics import BatchStatistics


def build_loss(
    config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None = None
) -> nn.Module:
    """The loss the config asks for, around one contrastive loss. idf: [vocabulary], for loss.regularizer idf-flops."""
    return LOSSES[config.loss.type](config, model, statistics, idf)


def build_splade_loss(
    config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None
) -> StockSpladeLoss:
    """Contrastive loss on dot products plus regularizers on documents and queries (arXiv 2109.10086)."""
    loss = config.loss
    similarities = util.dot_score, util.pairwise_dot_score
    ranking = RankingLoss(model, statistics, loss.scale or 1.0, similarities, loss.teacher)
    functions = {"flops": flops, "df-flops": flops, "l1": l1}
    function = idf_flops(idf) if loss.regularizer == "idf-flops" else functions[loss.regularizer]
    price = document_frequency_price if loss.regularizer == "df-flops" else None
    parts = {
        # 0 rather than None: None means the same and makes the library warn; with a target it is found in training
        "document_regularizer_weight": loss.document_regularizer_weight or 0.0,
        "query_regularizer_weight": loss.query_regularizer_weight or 0.0,
        "document_regularizer": Regularizer(model, function, loss.document_dims_cap, price),
        "query_regularizer": Regularizer(model, function, price=price),
    }
    if loss.cached:
        return CachedSpladeLoss(model, ranking, mini_batch_size=loss.mini_batch_size, **parts)
    return SpladeLoss(model, ranking, **parts)


def build_csr_loss(config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None) -> nn.Module:
    """Reconstruction of the dense vector plus a contrastive loss on cosines (arXiv 2503.01776)."""
    loss = config.loss
    similarities = util.cos_sim, util.pairwise_cos_sim
    ranking = RankingLoss(model, statistics, loss.scale or 20.0, similarities, loss.teacher, loss.gamma or 1.0)
    csr = CSRLoss(model, ranking, beta=loss.beta, gamma=loss.gamma)
    csr.reconstruction_loss = SharedReconstructionLoss(model, loss, ranking.scale)
    return csr


LOSSES: dict[str, Callable[[Config, SparseEncoder, BatchStatistics, Tensor | None], nn.Module]] = {
    "splade": build_splade_loss,
    "csr": build_csr_loss,
}
