"""Stops at weights that a model's files lack: transformers starts them at random numbers, and only logs it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from trainer.config import ConfigError

# Tensors named in a message; the others are counted.
SHOWN = 4
# sentence-transformers reads the last hidden states, so what BERT's pooler makes of them goes nowhere; a classifier reads
# what it makes.
UNREAD, CLASSIFIER = "pooler.", "ForSequenceClassification"
HEADS = ("ForMaskedLM", "LMHeadModel")


@contextmanager
def whole_weights(where: str, name: str) -> Iterator[None]:
    """Raises ConfigError, with the tensors' names, when the files of a model that is loaded inside lack weights of it.

    transformers itself says which, whatever library it loads for: it knows older names, tied weights, and what is made
    without a file. Models with code of their own are passed over, since they may make weights themselves. where: the key
    that names the model; name: what the key says.
    """

    def report(*, model: PreTrainedModel, loading_info: Any, **others: Any) -> None:
        if not type(model).__module__.startswith("transformers_modules."):
            _stop_at(loading_info.missing_keys, loading_info.unexpected_keys, type(model), where, name)
        echo(model=model, loading_info=loading_info, **others)

    echo = modeling_utils.log_state_dict_report
    modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = echo


def _stop_at(missing: Iterable[str], unread: Iterable[str], kind: type[PreTrainedModel], where: str, name: str) -> None:
    reads_all = kind.__name__.endswith(CLASSIFIER)
    missing, unread = (
        sorted(tensor for tensor in tensors if reads_all or UNREAD not in tensor) for tensors in (missing, unread)
    )
    if not missing:
        return
    only_head = kind.__name__.endswith(HEADS) and not any(
        tensor.startswith(f"{kind.base_model_prefix}.") for tensor in missing
    )
    remedy = (
        "Name a model that was saved with its masked-language-model head" if only_head else "Its files are not whole"
    )
    raise ConfigError(
        f"{where}: {name} lacks weights of {kind.__name__}, which would start as random numbers: {_shortened(missing)}"
        + (f". It has others that are not read: {_shortened(unread)}" if unread else "")
        + f". {remedy}"
    )


def _shortened(tensors: list[str]) -> str:
    more = len(tensors) - SHOWN
    return ", ".join(tensors[:SHOWN]) + (f" and {more} more" if more > 0 else "")
