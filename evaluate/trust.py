"""Whose code an evaluation may run: a model's own only when the user says so, at a commit that the user names."""

from pathlib import Path
from typing import Any

import mteb
from huggingface_hub import snapshot_download

from trainer.config import ConfigError, is_commit, one_line
from trainer.hub.own_code import code_references, require_own_tokenizer

# mteb's loaders that only hand settings on. The others are programs: most trust a model's code, whatever the registry says.
PLAIN_LOADERS = ("mteb.models.sentence_transformer_wrapper", "mteb.models.instruct_wrapper")


def registry_entry(name: str) -> Any:
    """What mteb's registry says about a model; None when it is not in there."""
    return next((meta for meta in mteb.get_model_metas() if meta.name == name), None)


def runs_own_code(entry: Any) -> bool:
    """Whether mteb's loader of a model runs, or may run, code that comes with the model."""
    return _asks_for_trust(entry.loader_kwargs) or getattr(entry.loader, "__module__", None) not in PLAIN_LOADERS


def _asks_for_trust(settings: Any) -> bool:
    """Also in settings of settings: `model_kwargs` has a trust_remote_code of its own."""
    return isinstance(settings, dict) and any(
        (key == "trust_remote_code" and bool(value)) or _asks_for_trust(value) for key, value in settings.items()
    )


def require_trust(name: str, revision: str | None, trusted: bool) -> None:
    """Raise ConfigError when mteb would run code of a dense model that the user has not trusted at a full commit."""
    entry = registry_entry(name)
    if entry is None or not runs_own_code(entry) or (trusted and (is_commit(revision) or Path(name).exists())):
        return
    commit = entry.revision if is_commit(entry.revision) else "<commit>"
    raise ConfigError(
        f"--dense {name}: mteb loads it with code of its own. Read that code on the hub; to run it: "
        f"--dense {name}@{commit} --trust-remote-code (make: DENSE={name}@{commit} ARGS=--trust-remote-code)"
    )


def require_pinned_code(option: str, model: str, revision: str | None) -> None:
    """Raise ConfigError when a trusted model takes code from another repository: no commit of the model pins that."""
    folder = Path(model)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json"]))
    except Exception as error:  # whatever the hub and its transport raise
        raise ConfigError(f"{option} {model} cannot be loaded: {one_line(error)}") from None
    require_own_tokenizer(option, model, folder)
    for reference in sorted(code_references(folder)):
        repository, _, name = reference.rpartition("--")
        if repository:
            raise ConfigError(
                f"{option} {model} takes its code, {name}, from {repository}, which nothing pins. Copy the model into a "
                f"folder of yours with that file at its root, write {name} for {reference} in its settings, and name that"
            )
