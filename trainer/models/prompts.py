"""What stands in front of every query and of every document: a model's own prompts, or those of the config."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.schema import ModelConfig
from trainer.system.files import read_json

SETTINGS = "config_sentence_transformers.json"
# The names a saved model may have for the prompt of a side. The library looks for them in this order, but takes the empty
# prompt that it makes up for "document" before a "passage" that was saved.
NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}


def saved_settings(folder: Path | None) -> dict[str, Any]:
    """What a saved model says of its prompts; empty where it says nothing, as a masked language model does."""
    if folder is None or not (folder / SETTINGS).is_file():
        return {}
    settings = read_json(folder / SETTINGS)
    return settings if isinstance(settings, dict) else {}


def own_prompts(folder: Path | None) -> dict[str, str]:
    """A saved model's prompts for queries and for documents, "" where it has none.

    Its default_prompt_name is for `encode` alone: `encode_query` and `encode_document` never use it.
    """
    return by_side(saved_settings(folder).get("prompts") or {})


def by_side(prompts: dict[str, str | None]) -> dict[str, str]:
    """The prompt of queries and that of documents among a model's prompts."""
    return {side: next((text for name in names if (text := prompts.get(name))), "") for side, names in NAMES.items()}


def prompts_of(source: str, folder: Path | None, config: ModelConfig | None) -> dict[str, str]:
    """The prompts of the model called `source`, in `folder`: its own, but those of model.prompts for the base model."""
    given = config.prompts if config and source == config.base_model else None
    return own_prompts(folder) | (given.model_dump(exclude_none=True) if given else {})


def base_prompts(config: ModelConfig, folder: Path | None) -> dict[str, str]:
    """The prompts that are trained with; `folder` holds the base model, if there is one.

    Queries of inference-free SPLADE have none: its words would be words of every query, always with the same weights.
    """
    prompts = prompts_of(config.base_model, folder, config)
    return prompts | {"query": ""} if config.has_static_queries else prompts


def prompt_lines(config: ModelConfig, folder: Path | None, prompts: dict[str, str]) -> Iterator[str]:
    """The prompts that are trained with, who says so, and those of the base model's that are not used.

    Nothing where nobody says anything. folder: the base model, None for one from scratch or when a run goes on.
    """
    given = config.prompts.model_dump(exclude_none=True) if config.prompts else {}
    said = {
        "the base model's own": quoted({side: text for side, text in prompts.items() if side not in given}),
        "model.prompts": quoted({side: text for side, text in prompts.items() if side in given}),
    }
    words = [f"{texts} ({who})" for who, texts in said.items() if texts]
    unused = quoted({side: text for side, text in own_prompts(folder).items() if text != prompts.get(side)})
    if words or unused:
        yield f"prompts   {', '.join(words) or 'none'}"
    if unused:
        looked_up = " (its queries are only looked up)" * config.has_static_queries
        yield f"          not used, though the base model has it: {unused}{looked_up}"
    saved = saved_settings(folder)
    default = (saved.get("prompts") or {}).get(saved.get("default_prompt_name"))
    if default and default not in prompts.values():
        yield f"          not used, for it is neither a query's nor a document's: {quoted({'default': default})}"


def in_front(prompt: str, texts: list[str]) -> list[str]:
    """The texts as the model reads them."""
    return [prompt + text for text in texts] if prompt else texts


def quoted(prompts: dict[str, str]) -> str:
    """The prompts there are, in words; empty where there are none."""
    return ", ".join(f"{side} {json.dumps(text, ensure_ascii=False)}" for side, text in prompts.items() if text)
