"""The training objective: a contrastive loss with in-batch negatives, inside what keeps the vectors sparse."""

from collections.abc import Callable, Iterable

import torch
from sentence_transformers import SparseEncoder, util
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    CSRLoss,
    CSRReconstructionLoss,
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.util.distributed import all_gather_with_grad
from torch import Tensor, nn

from trainer.config import Config
from trainer.config.schema import TeacherConfig
from trainer.distributed import processes
from trainer.penalties import Penalty, flops, idf_flops, l1
from trainer.sparsity import BatchStatistics


def ranking_loss(
    model: SparseEncoder,
    statistics: BatchStatistics,
    scale: float,
    similarities: tuple[Callable, Callable],
    teacher: TeacherConfig | None,
) -> SparseMultipleNegativesRankingLoss:
    """The library's contrastive loss over the batch of all processes; `statistics` sees this one's vectors in training.

    similarities: of all queries with all passages, and of each with its own. With a teacher, what the encoder is taught
    adds to it, for rows that have labels (evaluation rows and pairs have none).
    """
    similarity, pairwise = similarities
    loss = SparseMultipleNegativesRankingLoss(
        model, scale=scale, similarity_fct=similarity, gather_across_devices=processes() > 1
    )
    compute = loss.compute_loss_from_embeddings
    taught = build_distillation(model, teacher, lambda a, b: scale * pairwise(a, b)) if teacher else None

    def measured(embeddings: Iterable[Tensor], labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        embeddings = list(embeddings)
        if model.training:
            statistics.add(embeddings)
        contrastive = compute(embeddings, None)
        if taught is None or labels is None:
            return contrastive
        return {"base_loss": contrastive, "distillation_loss": taught(embeddings, labels)}

    loss.compute_loss_from_embeddings = measured
    return loss


def build_distillation(model: SparseEncoder, teacher: TeacherConfig, similarity: Callable) -> Callable:
    """(embeddings, labels) -> the weighted loss. labels: [rows, 2], the teacher's scores of positive and negative.

    A mean over rows, so that the mean over processes is that of all their rows.
    """
    if teacher.objective == "kl":
        loss = SparseDistillKLDivLoss(model, similarity_fct=similarity, temperature=teacher.temperature)
    else:
        loss = SparseMarginMSELoss(model, similarity_fct=similarity)

    def taught(embeddings: list[Tensor], labels: Tensor) -> Tensor:
        return teacher.weight * loss.compute_loss_from_embeddings(embeddings, teacher.score_scale * labels)

    return taught


class SharedReconstructionLoss(CSRReconstructionLoss):
    """Reconstruction loss (arXiv 2503.01776) of the batch that all processes share: part of it is relative to the batch's
    variance, which is another one for each process's rows. `see` is told what the code leaves unexplained, in training."""

    see: Callable[[Tensor], None] | None = None

    def compute_loss_from_embeddings(self, outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """outputs: for each column, what the autoencoder made of this process's [rows, width]."""
        if processes() > 1:
            names = [name for name in outputs[0] if name.startswith("decoded_") or name.endswith("_backbone")]
            outputs = [
                {name: None if output[name] is None else all_gather_with_grad(output[name]) for name in names}
                for output in outputs
            ]
        if self.see is not None and torch.is_grad_enabled():
            self.see(
                torch.cat([found["sentence_embedding_backbone"] - found["decoded_embedding_k"] for found in outputs])
            )
        return super().compute_loss_from_embeddings(outputs)


def build_loss(
    config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None = None
) -> nn.Module:
    """The loss the config asks for, around one contrastive loss. idf: [vocabulary], for loss.penalty idf-flops."""
    if config.loss.type == "csr":
        return build_csr_loss(config, model, statistics)
    return build_splade_loss(config, model, statistics, idf)


def build_splade_loss(
    config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None
) -> SpladeLoss:
    """Contrastive loss on dot products plus penalties on documents and queries (arXiv 2109.10086)."""
    loss = config.loss
    similarities = util.dot_score, util.pairwise_dot_score
    ranking = ranking_loss(model, statistics, loss.scale or 1.0, similarities, loss.teacher)
    function = {"flops": flops, "l1": l1}.get(loss.penalty) or idf_flops(idf)
    parts = {
        # 0 rather than None: None means the same and makes the library warn; with a target it is found in training
        "document_regularizer_weight": loss.document_regularizer_weight or 0.0,
        "query_regularizer_weight": loss.query_regularizer_weight or 0.0,
        "document_regularizer": Penalty(model, function, loss.document_dims_cap),
        "query_regularizer": Penalty(model, function),
    }
    if loss.cached:
        return CachedSpladeLoss(model, ranking, mini_batch_size=loss.mini_batch_size, **parts)
    return SpladeLoss(model, ranking, **parts)


def build_csr_loss(config: Config, model: SparseEncoder, statistics: BatchStatistics) -> nn.Module:
    """Reconstruction of the dense vector plus a contrastive loss on cosines (arXiv 2503.01776)."""
    loss = config.loss
    similarities = util.cos_sim, util.pairwise_cos_sim
    ranking = ranking_loss(model, statistics, loss.scale or 20.0, similarities, loss.teacher)
    csr = CSRLoss(model, ranking, beta=loss.beta, gamma=loss.gamma)
    csr.reconstruction_loss = SharedReconstructionLoss(model, beta=loss.beta)
    return csr
