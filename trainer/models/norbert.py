"""Converts the Python code that NorBERT3 and NorBERT4 bring along, so that they can become sparse encoders.

The code is rewritten in a copy of the base model's folder, before it is loaded. Nothing is patched in memory, so every
save carries the converted code, and the model opens anywhere without nordsparse.
"""

import hashlib
import re
from pathlib import Path

from trainer.config import ConfigError
from trainer.models.norbert_faults import NORBERT3, NORBERT4, Change, NotFound

# By the name of the code file, which is the same in every published model of the family: what to change in it,
FAMILIES = {"modeling_gptbert.py": NORBERT4, "modeling_norbert.py": NORBERT3}
# and in config.json.
SETTINGS = {"modeling_norbert.py": {"tie_word_embeddings": True}}

# ------------------------------------------------------------------------------------------- conversion
HEADER = "# Converted by nordsparse: {changes}. sha256 of the lines below: {digest}\n"
HEADER_PATTERN = re.compile(r"\A# Converted by nordsparse: (.*)\. sha256 of the lines below: ([0-9a-f]{64})\n")
BESIDE = "beside"  # opens the header of a file that goes with a converted one


def convert_files(
    texts: dict[str, str], folder: Path, families: dict[str, tuple[Change, ...]] = FAMILIES
) -> dict[str, str]:
    """A model's code files by name, those of a known family converted; `folder` is where errors say that they are.

    The other files then get a first line too: transformers looks a model's class up by its configuration's, so of two
    models in one process with the same configuration file, both would get the code loaded first.
    """
    converted = {name: convert(text, folder / name, families[name]) for name, text in texts.items() if name in families}
    if not converted:
        return texts
    beside = " and ".join(f"{name} {_digest(text)[:16]}" for name, text in converted.items())
    others = {
        name: _with_header(text, f"{BESIDE} {beside}") if changes_in(text, folder / name) is None else text
        for name, text in texts.items()
        if name not in families
    }
    return converted | others


def convert(code: str, file: Path, changes: tuple[Change, ...]) -> str:
    """The code with every change that its revision needs, under a first line that lists them.

    Converted code comes back as it is. Raises ConfigError when a fault is neither found nor known to be absent, or when
    converted code was edited.
    """
    if changes_in(code, file) is not None:
        return code
    names = []
    for change in changes:
        try:
            changed = change.apply(code)
        except NotFound as reason:
            if change.optional:
                continue
            raise ConfigError(
                f"model.base_model: {file} is not a revision that can be converted, or was edited by hand: to mend its "
                f"{change.name} ({change.why}) {reason}. Pin another model.revision"
            ) from None
        if changed is not None:
            code = changed
            names.append(change.name)
    return _with_header(code, ", ".join(names))


def changes_in(code: str, file: Path) -> list[str] | None:
    """The changes that were made to this code; None if it was not converted. Raises ConfigError if it was edited since."""
    header = HEADER_PATTERN.match(code)
    if header is None:
        return None
    if _digest(code[header.end() :]) != header[2]:
        raise ConfigError(
            f"{file} was edited by hand after its conversion. Restore it, or train from the base model again"
        )
    return [] if header[1].startswith(BESIDE) else header[1].split(", ")


def _with_header(code: str, changes: str) -> str:
    return HEADER.format(changes=changes, digest=_digest(code)) + code


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()
