"""Stops at weights that a model's files lack: transformers starts them at random numbers, and only logs it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from trainer.config import ConfigError, one_line

# Tensors named in a message; the others are counted.
SHOWN = 4


@contextmanager
def whole_weights(where: str, name: str, *, own_code: bool = False, without_head: bool = False) -> Iterator[None]:
    """Raises ConfigError, with the tensors' names, when the files of a model that is loaded inside lack weights of it.

    transformers itself says which, whatever library it loads for: it knows older names, tied weights, and what is made
    without a file. where: the key that names the model; name: its value. own_code: whether models with code of their own
    are held to it too, though they may make weights themselves. without_head: the files need only hold the encoder.
    """

    def report(*, model: PreTrainedModel, loading_info: Any, **others: Any) -> None:
        if own_code or not model.is_remote_code():
            of_head = {each for each in loading_info.missing_keys if _is_of_head(model, each)}
            missing = loading_info.missing_keys - of_head if without_head else loading_info.missing_keys
            _require_all(missing, loading_info.unexpected_keys, type(model).__name__, where, name, missing <= of_head)
        log(model=model, loading_info=loading_info, **others)

    log = modeling_utils.log_state_dict_report
    modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = log


@contextmanager
def loading(
    where: str, name: str, as_what: str = "", *, own_code: bool = False, without_head: bool = False
) -> Iterator[None]:
    """Raises ConfigError for whatever a model that is loaded inside raises, and where its files lack weights of it."""
    try:
        with whole_weights(where, name, own_code=own_code, without_head=without_head):
            yield
    except ConfigError:
        raise
    except Exception as error:  # a folder that is no such model, or a model's own code, fails in any way
        raise ConfigError(f"{where}: {name} cannot be loaded{as_what}: {one_line(error)}") from None


def _is_of_head(model: PreTrainedModel, tensor: str) -> bool:
    """Whether a tensor belongs to what a masked language model has above its encoder."""
    prefix = model.base_model_prefix
    return (
        type(model).__name__.endswith("ForMaskedLM")
        and hasattr(model, prefix or " ")
        and not tensor.startswith(f"{prefix}.")
    )


def _require_all(
    missing: Collection[str], unread: Collection[str], kind: str, where: str, name: str, head_alone: bool
) -> None:
    if not kind.endswith("ForSequenceClassification"):  # without a classifier, nothing reads what BERT's pooler gives
        missing, unread = ([each for each in tensors if "pooler." not in each] for tensors in (missing, unread))
    if missing:
        others = f" (its files have others that are not read: {_shortened(unread)})" if unread else ""
        remedy = ", or set model.head=fit to fit one" if head_alone else ""
        raise ConfigError(
            f"{where}: {name} lacks weights of {kind}, which would start as random numbers: {_shortened(missing)}{others}. "
            f"Name a model that was saved whole, with its head{remedy}"
        )


def _shortened(tensors: Collection[str]) -> str:
    more = len(tensors) - SHOWN
    return ", ".join(sorted(tensors)[:SHOWN]) + (f" and {more} more" if more > 0 else "")
