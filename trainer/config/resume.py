"""What a resumed run does with each key of the config that has changed: apply it, or refuse it with a reason."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """A key that keeps its value for the whole run."""

    because: str
    only_null: bool = False
    """Only a change to or from null is refused; from one value to another it is applied."""


# The run goes on with the new value, from its next step.
APPLIED = None

MODEL = Refused("the model in the checkpoint was built with it")
PARAMETERS = Refused("the checkpoint holds the optimizer's state of the parameters that were trained, and of no others")
PACKING = Refused("whether texts are packed decides which rows share a batch")
ROWS = Refused("the rows that this run trains on and holds out follow from it")
ORDER = Refused("the order in which this run draws its rows follows from it")
RANDOM = Refused("which rows are held out, and the order of all others, follow from it")
UNIT = Refused("the weight of one regularizer means nothing to another")
CONTROLLER = Refused("the checkpoint holds a weight that was found for a target, or none", only_null=True)
GROUPS = Refused(
    "the optimizer's state in the checkpoint is in groups of one rate each, and this is one more or one less",
    only_null=True,
)

# A key follows the rule of the longest path that it begins with.
RULES: dict[str, Refused | None] = {
    "model": MODEL,
    "model.use_router": APPLIED,  # says what follows from the architecture
    "model.long_documents": ORDER,  # texts of about the same length share a batch
    "model.attention": PACKING,
    "model.dropout": APPLIED,
    "model.code_sha256": APPLIED,  # of the base model; a checkpoint's code has its own seal
    "model.freeze_static_embedding": PARAMETERS,
    "model.csr_train_base": PARAMETERS,
    "model.csr_k_start": APPLIED,
    "model.csr_k_share": APPLIED,
    "model.csr_revive_steps": APPLIED,
    "training": APPLIED,  # bf16 too: it is autocast, and weights and the optimizer's state are float32 throughout
    "training.query_learning_rate": GROUPS,
    "training.seed": RANDOM,
    "loss": APPLIED,
    "loss.type": MODEL,
    "loss.target_document_dims": CONTROLLER,
    "loss.target_query_dims": CONTROLLER,
    "loss.regularizer": UNIT,
    "datasets": ROWS,
    "datasets.sampling_strategy": ORDER,
    "datasets.epoch": ORDER,
    "datasets.length_window": ORDER,
    "datasets.queries_per_passage": APPLIED,
    "evaluation": APPLIED,
    "model_card": APPLIED,
    "hardware": APPLIED,
    "hub": APPLIED,
}


def rule_of(path: tuple[str, ...]) -> Refused | None:
    """The rule of a key; None when its new value is applied."""
    if len(path) == 3 and path[0] == "datasets" and path[-1] == "language":  # counts rows, and changes none
        return APPLIED
    end = next(end for end in range(len(path), 0, -1) if ".".join(path[:end]) in RULES)
    return RULES[".".join(path[:end])]


def why_refused(path: tuple[str, ...], old: Any, new: Any) -> str | None:
    """Why a resumed run cannot change this key from its old value to the new one; None where it goes on with the new."""
    rule = rule_of(path)
    if rule is None or (rule.only_null and None not in (old, new)):
        return None
    return rule.because
