"""From the config's training section to SparseEncoderTrainingArguments."""

import re
from collections.abc import Iterable

from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import nn

from trainer.config import Config
from trainer.data.roles import ANCHOR, NEGATIVE, POSITIVE, side_of
from trainer.runs.run import Run

# Keys of the training section that are not arguments of the library: the trainer itself applies them.
OWN_KEYS = {"query_learning_rate", "max_seq_length", "start_share"}
# One that is, but is applied to the networks alone (trainer/models/compiled.py); the library would compile head and all.
APPLIED_HERE = {"torch_compile"}


def routes_of(config: Config) -> dict[str, str]:
    """The route of queries and of documents through the model; empty where one serves both."""
    return {side: side for side in ("query", "document")} if config.model.has_static_queries else {}


def build_arguments(
    config: Config,
    run: Run,
    model: SparseEncoder,
    loss: nn.Module,
    device: str,
    *,
    best_metric: str | None,
    roles: Iterable[str] = (ANCHOR, POSITIVE, NEGATIVE),
) -> SparseEncoderTrainingArguments:
    """The library's arguments.

    Args:
        best_metric: picks the best checkpoint; None when nothing is evaluated.
        roles: the columns of texts that the rows have.
    """
    values = config.training.model_dump(exclude=OWN_KEYS | APPLIED_HERE)
    values["load_best_model_at_end"] = config.training.load_best_model_at_end and best_metric is not None
    return SparseEncoderTrainingArguments(
        output_dir=str(run.checkpoints),
        **values,
        eval_strategy="steps" if best_metric else "no",
        save_strategy="steps",
        metric_for_best_model=best_metric,
        greater_is_better=best_metric is not None and not best_metric.endswith("loss"),
        use_cpu=device == "cpu",
        tf32=True if config.hardware.tf32 else None,
        # transformers' new name for gradient checkpointing; the re-entrant kind breaks DDP
        activation_checkpointing=config.hardware.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.hardware.gradient_checkpointing else None,
        # or each step's copy of its batch would wait until the GPU has done all of the step before
        accelerator_config={"non_blocking": config.training.dataloader_pin_memory},
        router_mapping={role: side_of(role) for role in roles} if routes_of(config) else {},
        # A query's vector and its document's come from different parameters (Router), in separate forward passes: DDP may
        # not take those of the last pass for all. GradCache has a backward pass for every forward pass: there it must.
        ddp_broadcast_buffers=False,  # the trainer shares the one buffer that changes, CSR's count of dead dims
        ddp_find_unused_parameters=config.loss.cached,
        learning_rate_mapping=query_rate_mapping(config, loss),
        push_to_hub=config.hub.push,
        hub_model_id=config.hub.repo,
        hub_private_repo=config.hub.private,
        report_to="none",  # our own callback writes to TensorBoard
        logging_nan_inf_filter=False,  # a non-finite loss stops the run, it is not averaged away
    )


def query_rate_mapping(config: Config, loss: nn.Module) -> dict[str, float]:
    """A pattern that matches the static query weights and nothing else, with their learning rate.

    The library searches the pattern in every parameter's name. The obvious `.*\\.query\\..*` also finds
    `attention.self.query`, so the pattern is the weight's whole name.
    """
    rate = config.training.query_learning_rate
    if rate is None:
        return {}
    weights = {id(module.weight) for module in loss.modules() if isinstance(module, SparseStaticEmbedding)}
    names = [name for name, parameter in loss.named_parameters() if id(parameter) in weights]
    return {f"^{re.escape(name)}$": rate for name in names}
