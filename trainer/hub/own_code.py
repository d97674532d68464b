"""Which Python code of its own a model's settings name, beside the classes of the libraries."""

import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.system.files import read_json, sha256_of

SETTINGS = (
    "config.json",
    "config.*.json",  # read in place of config.json, where that names it for a version of transformers
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "modules.json",
    "router_config.json",
)
# Settings of sentence-transformers' Transformer, and the keys by which it takes the tokenizer from somewhere else.
TRANSFORMER_SETTINGS = "sentence_*_config.json"
TOKENIZER_KEYS = ("tokenizer_name_or_path", "processor_name")


def code_references(folder: Path) -> set[str]:
    """The classes that a model's settings name outside its libraries: `module.Class`, or `owner/repo--module.Class`."""
    return {reference for file in settings_files(folder) for reference in references_in(read_json(file))}


def code_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each Python file of a model, by its path in the folder."""
    return {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*.py"))}


def read_code(file: Path) -> str:
    """The text of a Python file. Raises ConfigError unless Python reads it as UTF-8 too: in another encoding (UTF-7), what
    a reader takes for a comment may be code."""
    try:
        with file.open("rb") as lines:
            encoding, _ = tokenize.detect_encoding(lines.readline)
        if encoding in ("utf-8", "utf-8-sig"):
            return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, SyntaxError):
        pass
    raise ConfigError(f"model.base_model: the code in {file} is not text in UTF-8. Use another commit")


def settings_files(folder: Path) -> list[Path]:
    """The files of a model in which code can be named."""
    return [file for name in SETTINGS for file in sorted(folder.rglob(name))]


def references_in(settings: Any) -> Iterator[str]:
    """auto_map of transformers; `type` of sentence-transformers' modules.json, `types` of its router_config.json."""
    if isinstance(settings, dict):
        yield from _names_in(settings.get("auto_map"))
        modules = settings.get("types")
    else:
        listed = settings if isinstance(settings, list) else []
        modules = [module.get("type") for module in listed if isinstance(module, dict)]
    yield from (name for name in _names_in(modules) if not name.startswith("sentence_transformers."))


def _names_in(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _names_in(each)


def require_own_tokenizer(where: str, name: str, folder: Path) -> None:
    """Raise ConfigError when a trusted model takes its tokenizer, and the tokenizer's code, from another repository."""
    for file in sorted(folder.rglob(TRANSFORMER_SETTINGS)):
        settings = read_json(file)
        for key in TOKENIZER_KEYS:
            if isinstance(settings, dict) and (other := settings.get(key)):
                raise ConfigError(
                    f"{where} {name} takes its tokenizer from {other}, which nothing pins. Copy the model into a folder of "
                    f"yours with that tokenizer in it, remove {key} from {file.name}, and name that"
                )
