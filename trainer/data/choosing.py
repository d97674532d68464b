"""Queries that choose the checkpoint apart from those that are reported: the split `validation`, or half of the queries."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainer.config import ConfigError
from trainer.data.beir import SearchSet, has_split, read_search_set
from trainer.runs.choice import hash_of

# Queries that each half must have: what is chosen on fewer says nothing.
MIN_QUERIES = 10


def half_of(query: str) -> Literal["dev", "test"]:
    """dev, the half that chooses, when the SHA-256 of the query's id is even; test is reported.

    The id alone counts: a query that a task has in several languages is in the same half in each.
    """
    return "dev" if hashlib.sha256(query.encode()).digest()[-1] % 2 == 0 else "test"


def search_splits(folder: Path, reported: str | None = None) -> list[str]:
    """The split of a folder that is searched in training, dev unless another is wanted, and `validation` beside it, which
    chooses the checkpoint; empty when the folder has neither."""
    return [split for split in dict.fromkeys((reported or "dev", "validation")) if has_split(folder, split)]


def read_search_splits(
    folder: Path, splits: list[str], name: str, corpus: dict[str, str] | None = None
) -> list[SearchSet]:
    """The split that is reported and, where there is one, the split that chooses, over the same passages."""
    sets: list[SearchSet] = []
    for split in splits:
        sets.append(read_search_set(folder, split, name, sets[0].corpus if sets else corpus))
    return sets


def divide(found: SearchSet, validation: SearchSet | None = None) -> SearchSet:
    """The search set with the queries that choose the checkpoint apart from those that are reported.

    The queries of a split `validation` choose, or else one half of the queries. Where a half has fewer than MIN_QUERIES,
    all of them choose and are reported. Raises ConfigError when the split `validation` has no query of its own.
    """
    if validation is not None:
        reported = set(found.queries.values())
        own = [query for query, text in validation.queries.items() if text not in reported]
        if not own:
            raise ConfigError(
                f"{found.name}: the queries of the split validation are those of {found.split}. Give it others, which "
                "choose the checkpoint, or remove it"
            )
        return replace(found, reading=found.reading + validation.reading, chooser=_with_queries(validation, own))
    choosing = [query for query in found.queries if half_of(query) == "dev"]
    reported_half = [query for query in found.queries if half_of(query) == "test"]
    if min(len(choosing), len(reported_half)) < MIN_QUERIES:
        return replace(found, chooser=found)
    return replace(_with_queries(found, reported_half), chooser=_with_queries(found, choosing))


def _with_queries(found: SearchSet, queries: list[str]) -> SearchSet:
    """The search set with these queries only."""
    return replace(
        found,
        queries={query: found.queries[query] for query in queries},
        relevant={query: found.relevant[query] for query in queries},
    )


def is_half(found: SearchSet) -> bool:
    """Whether one half of the split's queries chooses the checkpoint, and the other half is reported."""
    return found.chooser is not None and found.chooser.split == found.split and not found.also_chooses


def choice_of(found: SearchSet) -> dict[str, Any]:
    """What a run's manifest keeps of a search set that chooses its checkpoint."""
    chooser = found.chooser
    assert chooser is not None, found.name
    return {
        "search": found.name,
        "split": chooser.split,
        "rule": "half" if is_half(found) else "all",
        "queries": len(chooser.queries),
        "hashes": " ".join(sorted({hash_of(query) for query in chooser.queries.values()})),
        "also_reported": found.also_chooses,
    }


def choice_words(found: SearchSet) -> str:
    """Which queries choose the checkpoint, behind the number of those that are reported."""
    if found.chooser is None:
        return ""
    if found.also_chooses:
        return "; these queries also choose the checkpoint, so their score is optimistic"
    whose = f"half of {found.split}" if is_half(found) else f"the split {found.chooser.split}"
    return f"; {len(found.chooser.queries):,} others choose the checkpoint ({whose})"
