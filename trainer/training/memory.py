"""How much memory a step takes, tried with three short texts before the first step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from sentence_transformers.util import batch_to_device
from torch import Tensor

from trainer.config import Config
from trainer.encoding.fuse import is_fused, transformers_of
from trainer.models.build import vocabulary_of
from trainer.system.device import memory_of
from trainer.system.distributed import processes_here
from trainer.system.progress_bar import going_on, in_columns

# Copies of the [texts, length, vocabulary] logits alive at the peak of a stock SPLADE step: forward and backward of a
# batch of 16 × 256 with a vocabulary of 50,000 took 3,249 MiB on a CPU, and one copy is 781 MiB.
LOGIT_COPIES = 4
# Copies of a [texts, vocabulary] tensor at the peak of the fused head's backward pass, when every word is active (with 1 in
# 1,000 active it was 7): measured with 128 texts and a vocabulary of 50,000.
VECTOR_COPIES = 24
# Bytes of a query's cell where its vector is looked up: an int64, three floats and their sum's gradient. 800 queries of a
# vocabulary of 60,000 took 24.4 for each.
STATIC_QUERY = 24
# The texts that are tried, as parts of the longest that training reads.
TRIED = (1 / 16, 1 / 8, 1 / 4)
# Bytes of a trained number: weight, gradient, and Adam's two moments, in float32.
TRAINED, FROZEN = 16, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step at most, by part, for so many texts of max_seq_length tokens."""

    parts: dict[str, float]
    texts: int
    with_checkpointing: float
    """Bytes of the activations with gradient checkpointing."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def precision_of(config: Config) -> torch.dtype | None:
    """The precision of training's autocast; None without."""
    return torch.bfloat16 if config.training.bf16 else torch.float16 if config.training.fp16 else None


def estimate_memory(config: Config, columns: int, model: SparseEncoder, *, vectors: int = 0) -> MemoryEstimate:
    """Memory of the weights, the head, and the layers' activations for the texts of one step. columns: texts per row.

    vectors: how many texts a frozen network encodes before the first step. It then encodes none in a step.
    """
    training = config.training
    rows = training.per_device_train_batch_size
    if config.loss.cached:
        rows = min(rows, config.loss.mini_batch_size)
    passages, most = columns - 1, config.datasets.queries_per_passage
    queries = rows * (passages * most if most > 1 else 1)
    is_static = config.model.has_static_queries
    texts = rows * passages + (0 if is_static else queries)
    precision = precision_of(config)
    parts = {
        "weights and optimizer": float(
            sum(p.numel() * (TRAINED if p.requires_grad else FROZEN) for p in model.parameters())
        )
    }
    if config.loss.has_regularizers:
        size = precision.itemsize if precision else 4
        per_word = VECTOR_COPIES * 4 if is_fused(model) else LOGIT_COPIES * training.max_seq_length * size
        parts["head"] = (per_word * texts + STATIC_QUERY * queries * is_static) * vocabulary_of(model)
    if vectors:
        width = transformers_of(model)[0].get_embedding_dimension()
        return MemoryEstimate(parts | {"vectors": float(vectors * width * 4)}, texts, 0.0)
    transformer = transformers_of(model)[0]
    with going_on(in_columns("memory", "trying three texts")):
        per_text, once = activations_per_text(transformer, training.max_seq_length, precision)
    activations = texts * per_text + once
    shape = transformer.model.config
    layers: int = getattr(shape, "num_hidden_layers", 0) or getattr(shape, "num_layers", 1)  # the second is NorBERT4's
    width = transformer.get_embedding_dimension()
    # one layer's at a time, and what goes into each of them
    checkpointed = activations / layers + texts * training.max_seq_length * layers * width * 4
    parts["activations"] = checkpointed if config.hardware.gradient_checkpointing else activations
    return MemoryEstimate(parts, texts, checkpointed)


def memory_lines(config: Config, estimate: MemoryEstimate, device: str | None) -> Iterator[str]:
    """The estimate, and advice where it may not fit. device: where it must; None for training on another machine."""
    training, gib = config.training, 2**30
    sizes = ", ".join(f"{name} {size / gib:.1f} GiB" for name, size in estimate.parts.items())
    less = " (torch_compile keeps less)" if training.torch_compile else ""
    if "activations" not in estimate.parts:
        yield f"memory    at most about {sizes}"
        return
    yield (
        f"memory    at most about {sizes}{less}, for {estimate.texts} texts of {training.max_seq_length} tokens per step"
    )
    shares = processes_here() if device == "cpu" else 1
    if device and shares * estimate.total > (here := memory_of(device)):
        advice = "lower training.per_device_train_batch_size"
        if not config.hardware.gradient_checkpointing:
            checkpointed = f"{estimate.with_checkpointing / gib:.1f} GiB"
            advice += f", or set hardware.gradient_checkpointing=true (activations {checkpointed})"
        yield f"          there are {here / gib:.1f} GiB. If a batch of long texts does not fit, {advice}"


def activations_per_text(transformer: Transformer, tokens: int, precision: torch.dtype | None) -> tuple[float, float]:
    """Bytes that a text of so many tokens leaves in the network for the backward pass, and those that a batch leaves once.

    precision: of autocast; None without. The bytes grow with the tokens, with the pairs of tokens, or not at all (weights
    in another precision), so three lengths tell the rest.
    """
    lengths, sizes = [], []
    for least, part in enumerate(TRIED, start=1):
        features = transformer.preprocess([" ".join(["og"] * max(least, int(part * tokens)))])
        lengths.append(features["input_ids"].numel())
        sizes.append(_activations(transformer, features, precision))
    quadratic, linear, constant = np.polyfit(lengths, sizes, 2)
    return quadratic * tokens**2 + linear * tokens, max(0.0, constant)


def _activations(transformer: Transformer, features: dict[str, Tensor], precision: torch.dtype | None) -> int:
    device = transformer.model.device
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held on to, so that no place is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        return tensor.detach()  # the tensor itself would hold on to its graph, and the graph to it

    training = transformer.training
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    autocast = torch.autocast(device.type, precision, enabled=precision is not None)
    try:
        with random, hooks, autocast:
            transformer.train()(batch_to_device(features, device))
    finally:
        transformer.train(training)
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
