"""Removes the paths of this machine from what is published."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import FROM_SCRATCH, is_local

# What stands in the place of a path. No hub name is written so.
REMOVED = "<local>"
# Keys of the config and of run.json whose values may name files; a list's items have its key.
FILE_KEYS = ("base_model", "vocabulary_texts", "source", "model", "cache", "search", "mteb_tasks")
# Written like an absolute path, or like one below home or the working directory.
ROOTED = ("/", "~", "./", "../")

Keys = tuple[str, ...]


class LocalPaths:
    """The paths that a config and a run's manifest name, and how texts and values read without them."""

    def __init__(self, *values: Any) -> None:
        named = [(keys, text) for value in values for keys, text in _texts(value, ()) if _names_files(keys, text)]
        self.keys = sorted({".".join(keys) for keys, _ in named})  # where they stood
        # longest first: one may be the beginning of another; a word without a slash may stand for something else in a text
        self.within = sorted({_without_language(text) for _, text in named if "/" in text}, key=len, reverse=True)

    def without(self, value: Any, keys: Keys = ()) -> Any:
        """The same value, with REMOVED wherever it names a local path."""
        if isinstance(value, dict):
            return {self.without(key): self.without(child, (*keys, key)) for key, child in value.items()}
        if isinstance(value, list):
            return [self.without(child, keys) for child in value]
        if not isinstance(value, str) or "prompts" in keys:  # the model needs a prompt, whatever it looks like
            return value
        return REMOVED if _names_files(keys, value) else self.in_text(value)

    def in_text(self, text: str) -> str:
        """A text in which the known paths, and absolute ones that exist, are replaced."""
        for path in self.within:
            text = text.replace(path, REMOVED)
        return re.sub(r"(?<![\w/:.~<-])~?/[^\s`\"'()|,;<>]+", _replaced, text)


def _replaced(match: re.Match) -> str:
    path = match[0].rstrip(".:")
    return REMOVED + match[0][len(path) :] if _exists(path) else match[0]


def _texts(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Every text of nested values, with the keys above it."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _texts(child, (*keys, key))
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child, keys)
    elif isinstance(value, str) and "prompts" not in keys:
        yield keys, value


def _names_files(keys: Keys, text: str) -> bool:
    """Whether the text at these keys is a path of this machine."""
    if not keys or keys[-1] not in FILE_KEYS:
        return text.startswith(ROOTED) or ("/" in text and _exists(text))
    if keys[-1] == "mteb_tasks":  # groups and tasks are words; a folder has a slash, a language, or is there
        return "/" in text or ":" in text or _exists(text)
    return text != FROM_SCRATCH and is_local(text)


def _without_language(text: str) -> str:
    return re.sub(r":[a-z]{2}$", "", text)


def _exists(text: str) -> bool:
    try:
        return Path(_without_language(text)).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no file can have the name, or there is no such home
        return False
