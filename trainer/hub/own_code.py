"""Which Python code of its own a model's settings name, beside the classes of the libraries."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.system.files import read_json, sha256_of

SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "modules.json",
    "router_config.json",
)


def code_references(folder: Path) -> set[str]:
    """The classes that a model's settings name outside its libraries: `module.Class`, or `owner/repo--module.Class`."""
    return {reference for file in settings_files(folder) for reference in references_in(read_json(file))}


def code_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each Python file of a model, by its path in the folder."""
    return {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*.py"))}


def settings_files(folder: Path) -> list[Path]:
    """The files of a model in which code can be named."""
    return [file for name in SETTINGS for file in sorted(folder.rglob(name))]


def references_in(settings: Any) -> Iterator[str]:
    """auto_map of transformers; `type` of sentence-transformers' modules.json, `types` of its router_config.json."""
    if isinstance(settings, list):
        named: list[Any] = [module.get("type") for module in settings if isinstance(module, dict)]
    else:
        auto_map, types = settings.get("auto_map") or {}, settings.get("types") or {}
        named = [*(auto_map.values() if isinstance(auto_map, dict) else auto_map), *types.values()]
    for value in named:
        for reference in value if isinstance(value, list) else [value]:
            if reference and not reference.startswith("sentence_transformers."):
                yield reference
