"""Warnings of collapse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerState

from trainer.encoding.vocabulary import token_of
from trainer.losses.statistics import BatchStatistics
from trainer.models.build import autoencoder_of


@dataclass(frozen=True)
class Sign:
    """One sign of collapse: when it shows, and what to say."""

    name: str
    shows: Callable[[dict[str, dict[str, float]]], bool]
    message: str
    from_start: bool = False  # whether it is a bad sign even while the regulariser's weight is warmed up


SIGNS = (
    Sign(
        "dense documents",
        lambda s: s["document"]["active_share"] > 0.2,
        "documents are dense: {document[active_dims_mean]:.0f} active dims on average, {document[active_share]:.0%} of "
        "the vocabulary. {advice}",
    ),
    Sign(
        "empty queries",
        lambda s: s["query"]["active_dims_min"] == 0,
        "a query has zero active dims, so it finds nothing. Lower loss.query_regularizer_weight or raise "
        "loss.target_query_dims, or look for queries of unknown words only",
        from_start=True,
    ),
    Sign(
        "empty documents",
        lambda s: s["document"]["active_dims_mean"] < 1,
        "documents have no active dims left, and no gradient brings one back. Stop, and train anew with a larger "
        "loss.target_document_dims, a smaller loss.document_regularizer_weight or a lower learning rate",
        from_start=True,
    ),
    Sign(
        "a dim in every document",
        lambda s: s["document"]["busiest_dim_share"] > 0.95,
        "dimension {busiest_term} is active in {document[busiest_dim_share]:.0%} of the documents, so it "
        "tells nothing apart. {rarer}",
    ),
    Sign(
        "documents alike",
        lambda s: s["both"]["document_cosine_mean"] > 0.9,
        "documents look alike: their mean cosine is {both[document_cosine_mean]:.2f}. Lower the learning rate",
    ),
)


# How a model that is not CSR, and one that is, becomes sparser.
SPARSER = "Raise loss.document_regularizer_weight or lower loss.target_document_dims", "Lower model.csr_k"
# How its words become rarer.
RARER = (
    "Train anew with loss.regularizer: df-flops; where it is set, raise loss.document_regularizer_weight or lower "
    "loss.target_document_dims",
    SPARSER[1],
)


class Watchdog(TrainerCallback):
    """Warns of collapse, naming the step. Runs before TensorBoardLog, which resets the statistics.

    Dense and similar documents are normal while the regulariser's weight is warmed up (the library's quadratic schedule
    over the first third of training), so the watchdog looks for them from then on.
    """

    WARM_FROM = 1 / 3

    def __init__(self, statistics: BatchStatistics, echo: Callable[[str], None]) -> None:
        self.statistics, self.echo = statistics, echo
        self.warnings: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Look at what was seen since the last log."""
        summary = self.statistics.summary() if logs and "loss" in logs else {}
        warm = state.global_step >= self.WARM_FROM * state.max_steps
        for sign in SIGNS if summary else ():
            if not (warm or sign.from_start) or not sign.shows(summary):
                continue
            known = next((w for w in self.warnings if w["sign"] == sign.name), None)
            if known:
                known["last_step"] = state.global_step
                continue
            model, dimension = kwargs.get("model"), int(summary["document"]["busiest_dim"])
            token = token_of(model, dimension) if model is not None else None
            busiest_term = f"{dimension} ('{token}')" if token else str(dimension)
            is_csr = model is not None and autoencoder_of(model) is not None
            message = sign.message.format(
                **summary, busiest_term=busiest_term, advice=SPARSER[is_csr], rarer=RARER[is_csr]
            )
            self.warnings.append(
                {"sign": sign.name, "step": state.global_step, "last_step": state.global_step, "message": message}
            )
            self.echo(f"Warning: step {state.global_step}: {message}")
