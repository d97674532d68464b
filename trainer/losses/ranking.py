"""The contrastive loss with in-batch negatives, and what a teacher's scores add to it."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import (
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor
from torch.nn import functional

from trainer.config.schema import TeacherConfig
from trainer.data.further_queries import SharedPassages
from trainer.losses.statistics import BatchStatistics
from trainer.system.distributed import processes

# Answers of a query that are compared with the passages at once: a query may have thousands.
ANSWERS_AT_ONCE = 64
Similarity = Callable[[Tensor, Tensor], Tensor]


class RankingLoss(SparseMultipleNegativesRankingLoss):
    """The library's contrastive loss over the batch of all processes, plus the distillation loss where there is a teacher.

    Rows without teacher scores (held-out rows, and pairs) have no distillation loss. In training, `statistics` sees this
    process's vectors, and `recorded_losses`, where it is a list, gets the loss.
    """

    recorded_losses: list[Tensor] | None = None

    def __init__(
        self,
        model: SparseEncoder,
        statistics: BatchStatistics,
        scale: float,
        similarities: tuple[Similarity, Similarity],
        teacher: TeacherConfig | None,
        multiplied_by: float = 1.0,
    ) -> None:
        """similarities: of all queries with all passages, and of each with its own. multiplied_by: what the loss around
        this one multiplies it by; the teacher's part is not to be.
        """
        similarity, pairwise = similarities
        super().__init__(model, scale=scale, similarity_fct=similarity, gather_across_devices=processes() > 1)
        self.statistics, self.teacher = statistics, teacher
        self.teacher_weight = teacher.weight / multiplied_by if teacher else 0.0

        def scaled(queries: Tensor, passages: Tensor) -> Tensor:
            return scale * pairwise(queries, passages)

        # means over rows, so the mean over processes is that of all their rows
        if teacher and teacher.passages == "row":
            kl = partial(SparseDistillKLDivLoss, temperature=teacher.temperature)
            self.distillation = (kl if teacher.objective == "kl" else SparseMarginMSELoss)(model, scaled)

    def compute_loss_from_embeddings(
        self, embeddings: Iterable[Tensor], labels: Tensor | None = None, shared: SharedPassages | None = None
    ) -> Tensor | dict[str, Tensor]:
        """embeddings: the queries, the positives and the negatives if any, [rows, vocabulary] each.

        labels: [rows, passages of a row], the teachers' scores, NaN in a row that has none; with loss.teacher.passages
        batch, [queries, passages of this process], counted column by column. shared: where passages have further queries,
        which then follow those of the rows.
        """
        embeddings = list(embeddings)
        if self.model.training:
            self.statistics.add(embeddings)
        if shared is None:
            contrastive = super().compute_loss_from_embeddings(embeddings, None)
        else:
            contrastive = self._over_shared_passages(embeddings[0], torch.cat(embeddings[1:]), shared)
        losses = {"base_loss": contrastive}
        if self.teacher and labels is not None:
            scores = self.teacher.score_scale * labels
            if self.teacher.passages == "batch":
                temperature = self.teacher.temperature
                distillation = self._over_the_batch(embeddings[0], torch.cat(embeddings[1:]), scores, temperature)
            else:
                distillation = self._over_rows([vectors[: len(scores)] for vectors in embeddings], scores)
            losses["distillation_loss"] = self.teacher_weight * distillation
        if self.recorded_losses is not None and self.model.training and torch.is_grad_enabled():
            self.recorded_losses.append(sum(loss.detach() for loss in losses.values()))
        return losses if len(losses) > 1 else contrastive

    def _over_rows(self, embeddings: list[Tensor], scores: Tensor) -> Tensor:
        """The library's distillation loss on the passages of each row, a mean over rows; 0 for those without scores."""
        known = scores.isfinite().all(1)
        if not known.any():
            return embeddings[0].sum() * 0.0
        loss = self.distillation.compute_loss_from_embeddings([vectors[known] for vectors in embeddings], scores[known])
        return loss * (known.sum() / len(known))

    def _over_the_batch(self, queries: Tensor, passages: Tensor, scores: Tensor, temperature: float) -> Tensor:
        """KL divergence of the softmaxes over all passages of this process, a mean over the queries of all processes."""
        student = (self.scale * self.similarity_fct(queries, passages) / temperature).log_softmax(1)
        teacher = (scores / temperature).log_softmax(1)
        total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return temperature**2 * total / self._queries_per_process(queries)

    def _queries_per_process(self, queries: Tensor) -> Tensor:
        """What a sum over a process's queries is divided by, since the gradients of processes are averaged."""
        count = torch.tensor(float(len(queries)), device=queries.device)
        return all_gather(count.reshape(1)).mean() if self.gather_across_devices else count

    def _over_shared_passages(self, queries: Tensor, passages: Tensor, shared: SharedPassages) -> Tensor:
        """The library's loss where a passage may answer several queries. Other answers to a query are left out.

        Every query counts the same, whichever process has it. queries: [queries, vocabulary]. passages: [passages,
        vocabulary], of this process.
        """
        texts, targets = shared.passages, shared.targets
        count = self._queries_per_process(queries)
        if self.gather_across_devices:
            targets = targets + get_rank() * len(texts)
            passages, texts = all_gather_with_grad(passages), all_gather(texts)
        is_answer = torch.zeros(len(queries), len(texts), dtype=torch.bool, device=texts.device)
        for answers in shared.answers.split(ANSWERS_AT_ONCE, dim=1):
            is_answer |= (answers.unsqueeze(2) == texts).any(1)
        is_answer.scatter_(1, targets.unsqueeze(1), False)
        scores = self.scale * self.similarity_fct(queries, passages)
        return functional.cross_entropy(scores.masked_fill(is_answer, -torch.inf), targets, reduction="sum") / count
