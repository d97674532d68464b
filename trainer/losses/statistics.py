"""Statistics of sparse vectors during training: active dims, FLOPS, and the signs of collapse."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RouteStatistics:
    """Vectors of one route (queries or documents) seen since the last reset."""

    active_dims: list[Tensor] = field(default_factory=list)
    active_in: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    """[vocabulary]: number of texts in which each dimension is active."""
    value_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    """[vocabulary]: sum of values."""
    texts: int = 0

    def add(self, vectors: Tensor) -> None:
        """vectors: [texts, vocabulary]."""
        active = vectors > 0
        self.active_dims.append(active.sum(1))
        self.active_in = self.active_in + active.sum(0)
        self.value_sum = self.value_sum + vectors.sum(0, dtype=torch.float32)
        self.texts += len(vectors)

    def summary(self) -> dict[str, float]:
        """Mean and 95th percentile of active dims, share of dims never active, and the busiest dim's share of texts."""
        active = torch.cat(self.active_dims).float()
        return {
            "active_dims_mean": active.mean().item(),
            "active_dims_p95": active.quantile(0.95).item(),
            "active_dims_min": active.min().item(),
            "active_share": active.mean().item() / len(self.active_in),
            "never_active_share": (self.active_in == 0).float().mean().item(),
            "busiest_dim_share": (self.active_in.max() / self.texts).item(),
            "busiest_dim": int(self.active_in.argmax()),
        }


@dataclass
class BatchStatistics:
    """What the loss saw since the last reset. The loss adds, the callbacks read and reset."""

    queries: RouteStatistics = field(default_factory=RouteStatistics)
    documents: RouteStatistics = field(default_factory=RouteStatistics)
    cosines: list[Tensor] = field(default_factory=list)
    enabled: bool = True

    @torch.no_grad()
    def add(self, embeddings: list[Tensor]) -> None:
        """embeddings: the batch's queries, then its positives, then its negatives if any; each [batch, vocabulary]."""
        if not self.enabled:
            return
        queries, *documents = (vectors.detach() for vectors in embeddings)
        self.queries.add(queries)
        for vectors in documents:
            self.documents.add(vectors)
        positives = documents[0]
        if len(positives) > 1:
            unit = torch.nn.functional.normalize(positives.float(), dim=1)
            # the mean over pairs i ≠ j, from the length of the sum: (|Σ u|² - Σ |u|²) / (n (n - 1))
            total, own = unit.sum(0).square().sum(), unit.square().sum()
            self.cosines.append((total - own) / (len(unit) * (len(unit) - 1)))

    def summary(self) -> dict[str, dict[str, float]]:
        """Statistics per route, FLOPS and the mean cosine between documents; empty before the first batch."""
        if not self.documents.texts:
            return {}
        mean_query = self.queries.value_sum / self.queries.texts
        mean_document = self.documents.value_sum / self.documents.texts
        rates = (self.queries.active_in / self.queries.texts) @ (self.documents.active_in / self.documents.texts)
        return {
            "query": self.queries.summary(),
            "document": self.documents.summary(),
            "both": {
                # expected multiplications per query-document pair, as in arXiv 2004.05665
                "flops": rates.item(),
                "query_flops_loss": mean_query.square().sum().item(),
                "document_flops_loss": mean_document.square().sum().item(),
                "document_cosine_mean": torch.stack(self.cosines).mean().item() if self.cosines else 0.0,
            },
        }

    def reset(self) -> None:
        """Forget what was seen."""
        self.queries, self.documents, self.cosines = RouteStatistics(), RouteStatistics(), []
