"""Stops at weights that a model's files lack: transformers starts them at random numbers, and only logs it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from trainer.config import ConfigError, one_line

# Tensors named in a message; the others are counted.
SHOWN = 4


@contextmanager
def whole_weights(where: str, name: str, *, own_code: bool = False) -> Iterator[None]:
    """Raises ConfigError, with the tensors' names, when the files of a model that is loaded inside lack weights of it.

    transformers itself says which, whatever library it loads for: it knows older names, tied weights, and what is made
    without a file. where: the key that names the model; name: its value. own_code: whether models with code of their own
    are held to it too, though they may make weights themselves.
    """

    def report(*, model: PreTrainedModel, loading_info: Any, **others: Any) -> None:
        if own_code or not model.is_remote_code():
            _require_all(loading_info.missing_keys, loading_info.unexpected_keys, type(model).__name__, where, name)
        log(model=model, loading_info=loading_info, **others)

    log = modeling_utils.log_state_dict_report
    modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = log


@contextmanager
def loading(where: str, name: str, as_what: str = "", *, own_code: bool = False) -> Iterator[None]:
    """Raises ConfigError for whatever a model that is loaded inside raises, and where its files lack weights of it."""
    try:
        with whole_weights(where, name, own_code=own_code):
            yield
    except ConfigError:
        raise
    except Exception as error:  # a folder that is no such model, or a model's own code, fails in any way
        raise ConfigError(f"{where}: {name} cannot be loaded{as_what}: {one_line(error)}") from None


def _require_all(missing: Collection[str], unread: Collection[str], kind: str, where: str, name: str) -> None:
    if not kind.endswith("ForSequenceClassification"):  # without a classifier, nothing reads what BERT's pooler gives
        missing, unread = ([each for each in tensors if "pooler." not in each] for tensors in (missing, unread))
    if missing:
        others = f" (its files have others that are not read: {_shortened(unread)})" if unread else ""
        raise ConfigError(
            f"{where}: {name} lacks weights of {kind}, which would start as random numbers: {_shortened(missing)}{others}. "
            "Name a model that was saved whole, with its head"
        )


def _shortened(tensors: Collection[str]) -> str:
    more = len(tensors) - SHOWN
    return ", ".join(sorted(tensors)[:SHOWN]) + (f" and {more} more" if more > 0 else "")
