"""What keeps vectors sparse: regularizers on the mean activation, the same however a batch is cut into parts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from trainer.system.distributed import processes

# Share of the newest step in the running mean. It stands on about six steps, so on each of a few data sets that take
# turns. With 0.1 it lagged behind a model whose activations fell to a tenth in fifteen steps, and pressed them to 0.
NEWEST = 0.3


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

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor], cap: int | None = None) -> None:
        super().__init__()
        self.model, self.function, self.cap = model, function, cap
        self.running: Tensor | None = None  # [vocabulary], of the first batch on
        self.steps = 0
        self._sums: Tensor | None = None  # [vocabulary + 2]: sums of values, active dims and rows of this step

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """embeddings: [rows, vocabulary] of this process; counted when the model is training."""
        if self.running is None:
            self.running = torch.zeros(embeddings.shape[1], device=embeddings.device)
        penalised = embeddings if self.cap is None else over_cap(embeddings, self.cap)
        if self.model.training and torch.is_grad_enabled():
            self._add(embeddings.detach(), penalised.detach())
        slope, value = torch.func.grad_and_value(self.function)(self.running)
        return value + slope @ (penalised.mean(0, dtype=torch.float32) - self.running)

    def _add(self, vectors: Tensor, penalised: Tensor) -> None:
        counts = torch.stack([(vectors > 0).sum().float(), vectors.new_full((), len(vectors), dtype=torch.float32)])
        sums = torch.cat([penalised.sum(0, dtype=torch.float32), counts])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def finish_step(self, *, read: bool = True) -> Step | None:
        """Update the running mean with the rows of all processes since the last call. Called once per optimizer step.

        read: return the step's sums, for which the CPU waits for a GPU.
        """
        sums = self._sums
        assert sums is not None, "no batch since the last step"
        if processes() > 1:
            distributed.all_reduce(sums)
        mean, rows = sums[:-2] / sums[-1], sums[-1]
        self.steps += 1
        self.running = self.running + max(NEWEST, 1 / self.steps) * (mean - self.running)
        step = torch.stack([rows, sums[-2] / rows, self.function(self.running)])
        self._sums = None
        return Step(*step.tolist()) if read else None

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""
        return {"running": self.running, "steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from the state of a checkpoint."""
        self.running = state["running"].to(self.model.device)
        self.steps = int(state["steps"])

    def get_config_dict(self) -> dict[str, int | None]:
        """For the library's model card."""
        return {"cap": self.cap}
