"""The training objective: a contrastive loss with in-batch negatives, inside what keeps the vectors sparse."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sentence_transformers import SparseEncoder, util
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    CSRLoss,
    CSRReconstructionLoss,
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import (
    SpladeLoss as StockSpladeLoss,
)
from sentence_transformers.util.distributed import all_gather_with_grad
from torch import Tensor, nn

from trainer.config import Config
from trainer.config.schema import TeacherConfig
from trainer.data.tokens import PLACE
from trainer.losses.regularizers import Penalty, flops, idf_flops, l1
from trainer.losses.statistics import BatchStatistics
from trainer.system.distributed import processes


class RankingLoss(SparseMultipleNegativesRankingLoss):
    """The library's contrastive loss over the batch of all processes, plus what the encoder is taught, if it is.

    Rows without a teacher's labels (those of evaluation, and pairs) are taught nothing. In training, `statistics` sees this
    process's vectors, and `noted`, where it is a list, gets the loss.
    """

    noted: list[Tensor] | None = None

    def __init__(
        self,
        model: SparseEncoder,
        statistics: BatchStatistics,
        scale: float,
        similarities: tuple[Callable, Callable],
        teacher: TeacherConfig | None,
    ):
        """similarities: of all queries with all passages, and of each with its own."""
        similarity, pairwise = similarities
        super().__init__(model, scale=scale, similarity_fct=similarity, gather_across_devices=processes() > 1)
        self.statistics = statistics
        self.taught = build_distillation(model, teacher, lambda a, b: scale * pairwise(a, b)) if teacher else None

    def compute_loss_from_embeddings(
        self, embeddings: Iterable[Tensor], labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """embeddings: the queries, the positives and the negatives if any, [rows, vocabulary] each."""
        embeddings = list(embeddings)
        if self.model.training:
            self.statistics.add(embeddings)
        contrastive = super().compute_loss_from_embeddings(embeddings, None)
        found = {"base_loss": contrastive}
        if self.taught is not None and labels is not None:
            found["distillation_loss"] = self.taught(embeddings, labels)
        if self.noted is not None and self.model.training and torch.is_grad_enabled():
            self.noted.append(sum(part.detach() for part in found.values()))
        return found if len(found) > 1 else contrastive


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


class SpladeLoss(StockSpladeLoss):
    """The library's, for batches whose passages go through the network in passes of their own."""

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """sentence_features: as TokenCollator makes them, or one entry for each column."""
        queries, *documents = embed(self.model, sentence_features)
        ranking = self.loss.compute_loss_from_embeddings([queries, *documents], labels)
        losses = dict(ranking) if isinstance(ranking, dict) else {"base_loss": ranking}
        for route, vectors in (("document", torch.cat(documents)), ("query", queries)):
            penalty = getattr(self, f"{route}_regularizer").compute_loss_from_embeddings(vectors)
            losses[f"{route}_regularizer_loss"] = penalty * getattr(self, f"{route}_regularizer_weight")
        return losses


def embed(model: nn.Module, features: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The vectors [rows, vocabulary] of each column: of the queries, the positives, and the negatives if any."""
    features = list(features)
    vectors = [model(each)["sentence_embedding"] for each in features]
    places = [each[PLACE] for each in features if PLACE in each]
    if not places:
        return vectors
    queries, *passages = vectors
    in_order = torch.cat(passages)[torch.cat(places).argsort()]
    return [queries, *in_order.split(len(queries))]


def build_loss(
    config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None = None
) -> nn.Module:
    """The loss the config asks for, around one contrastive loss. idf: [vocabulary], for loss.penalty idf-flops."""
    if config.loss.type == "csr":
        return build_csr_loss(config, model, statistics)
    return build_splade_loss(config, model, statistics, idf)


def build_splade_loss(
    config: Config, model: SparseEncoder, statistics: BatchStatistics, idf: Tensor | None
) -> StockSpladeLoss:
    """Contrastive loss on dot products plus penalties on documents and queries (arXiv 2109.10086)."""
    loss = config.loss
    similarities = util.dot_score, util.pairwise_dot_score
    ranking = RankingLoss(model, statistics, loss.scale or 1.0, similarities, loss.teacher)
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
    ranking = RankingLoss(model, statistics, loss.scale or 20.0, similarities, loss.teacher)
    csr = CSRLoss(model, ranking, beta=loss.beta, gamma=loss.gamma)
    csr.reconstruction_loss = SharedReconstructionLoss(model, beta=loss.beta)
    return csr
