"""What keeps vectors sparse: regularizers on the mean activation, the same however a batch is cut into parts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from trainer.system.distributed import processes

# Share of the newest step in the running mean. It stands on about six steps, so on each of a few data sets that take
# turns. With 0.1 it lagged behind a model whose activations fell to a tenth in fifteen steps, and pressed them to 0.
NEWEST = 0.3
# The same of the share of texts with a word: it stands on about forty steps, as one text in a hundred is to count.
NEWEST_SHARE = 0.05
# DF-FLOPS: the share of texts at which a word costs half of the most, and how steeply the price rises (the paper's values).
HALF_PRICE_SHARE, STEEPNESS = 0.1, 10.0
# What every word costs, or words below that share would be free: no weight would bring documents to a target.
LEAST_PRICE = 0.05


# ------------------------------------------------------------------------------------------- penalties
def flops(mean: Tensor) -> Tensor:
    """Σ m_j²: what a pair of vectors is expected to cost in an inverted index (arXiv 2004.05665). mean: [vocabulary]."""
    return mean.square().sum()


def l1(mean: Tensor) -> Tensor:
    """Σ m_j: the length of a vector, wherever its dims are (SNRM, doi 10.1145/3269206.3271800). mean: [vocabulary]."""
    return mean.sum()


def idf_flops(idf: Tensor) -> Callable[[Tensor], Tensor]:
    """Σ (max idf / idf_j) · m_j²: FLOPS where common words cost more, since a query without a network gives them little
    (IDF-aware FLOPS, arXiv 2411.04403). idf: [vocabulary], more than 0."""
    price = idf.max() / idf
    return lambda mean: (price.to(mean.device) * mean.square()).sum()


def document_frequency_price(share: Tensor) -> Tensor:
    """What a word costs by the share of texts with it: long posting lists cost most (after DF-FLOPS, arXiv 2505.15070).

    share, result: [vocabulary], 0 to 1. The paper's 1 / (1 + (x^log_α(2) - 1)^β), but at least LEAST_PRICE.
    """
    rarer = share.clamp(min=1e-9) ** (math.log(2) / math.log(HALF_PRICE_SHARE)) - 1  # from 0, where x is 1, upwards
    return LEAST_PRICE + (1 - LEAST_PRICE) / (1 + rarer**STEEPNESS)


def over_cap(vectors: Tensor, cap: int) -> Tensor:
    """The vectors, with zeros for those of no more than `cap` active dims: short enough (ℓ0 mask, arXiv 2504.14839)."""
    return vectors * ((vectors > 0).sum(1, keepdim=True) > cap)


# ------------------------------------------------------------------------------------------- over a whole run
@dataclass
class Step:
    """Sums over the rows of all processes in one optimizer step."""

    rows: float
    active_dims: float
    """Mean over the rows."""
    penalty: float
    """Of the running mean: that of the step's own mean would depend on the number of rows."""


class Regularizer(nn.Module):
    """A convex penalty F of the mean activation μ of a route's vectors, in the library's place of FlopsLoss.

    F(mean of a batch) is not an estimate of F(μ): for FLOPS, E |m|² = |μ|² + tr(Σ) / rows, so half the rows press harder,
    and the square of a mean over a part of a batch (a device, an accumulated batch) is another number again. Here F is
    replaced by its tangent at the running mean r of earlier steps:

        F(r) + ∇F(r) · (m - r)        gradient with respect to row i of n:  ∇F(r) / n

    This is linear in the rows. The parts of a step add up to the whole step's gradient, over accumulated batches, GradCache
    and processes (which average gradients), without a collective in the backward pass; and since r does not depend on the
    step's rows, its expectation is ∇F(r) · dμ for any number of rows. Following an inner expectation by a running mean is
    stochastic compositional gradient descent (arXiv 1411.3803, algorithm 1). r starts at 0, where FLOPS is flat: the
    first step has no penalty, and the weight's warm-up starts at 0 too.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[Tensor], Tensor],
        cap: int | None = None,
        price: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """function: of m. cap: for over_cap. price: what m_j² is multiplied by, from the shares of texts with each word."""
        super().__init__()
        self.model, self.function, self.cap, self.price = model, function, cap, price
        self.running: Tensor | None = None  # [vocabulary], of the first batch on
        self.share: Tensor | None = None  # [vocabulary], with a price: running share of texts with the word
        self.steps = 0
        # [vocabulary + 2]: sums of values, active dims and rows of this step; with a price, behind them, texts by word
        self._sums: Tensor | None = None

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """embeddings: [rows, vocabulary] of this process; counted when the model is training."""
        if self.running is None:
            self.running = torch.zeros(embeddings.shape[1], device=embeddings.device)
            self.share = self.running.clone() if self.price else None
        penalised = embeddings if self.cap is None else over_cap(embeddings, self.cap)
        if self.model.training and torch.is_grad_enabled():
            self._add(embeddings.detach(), penalised.detach())
        slope, value = torch.func.grad_and_value(self._penalty)(self.running)
        return value + slope @ (penalised.mean(0, dtype=torch.float32) - self.running)

    def _penalty(self, mean: Tensor) -> Tensor:
        return self.function(mean if self.price is None else self.price(self.share).sqrt() * mean)

    def _add(self, vectors: Tensor, penalised: Tensor) -> None:
        active = vectors > 0
        counts = torch.stack([active.sum().float(), vectors.new_full((), len(vectors), dtype=torch.float32)])
        by_word = [] if self.price is None else [active.sum(0, dtype=torch.float32)]
        sums = torch.cat([penalised.sum(0, dtype=torch.float32), counts, *by_word])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def finish_step(self, *, read: bool = True) -> Step | None:
        """Update the running mean with the rows of all processes since the last call. Called once per optimizer step.

        read: return the step's sums, for which the CPU waits for a GPU.
        """
        sums = self._sums
        assert sums is not None and self.running is not None, "no batch since the last step"
        if processes() > 1:
            distributed.all_reduce(sums)
        words = len(self.running)
        values, (active, rows), texts = sums[:words], sums[words : words + 2], sums[words + 2 :]
        self.steps += 1
        self.running = self.running + max(NEWEST, 1 / self.steps) * (values / rows - self.running)
        if self.share is not None:
            self.share = self.share + max(NEWEST_SHARE, 1 / self.steps) * (texts / rows - self.share)
        step = torch.stack([rows, active / rows, self._penalty(self.running)])
        self._sums = None
        return Step(*step.tolist()) if read else None

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""
        share = {} if self.share is None else {"share": self.share}
        return {"running": self.running, "steps": torch.tensor(self.steps)} | share

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from the state of a checkpoint."""
        self.running = state["running"].to(self.model.device)
        self.share = state["share"].to(self.model.device) if self.price else None
        self.steps = int(state["steps"])

    def get_config_dict(self) -> dict[str, int | None]:
        """For the library's model card."""
        return {"cap": self.cap}
