"""Which queries chose a run's checkpoint, as its manifest says, and what is reported of the others."""

import hashlib
from collections.abc import Mapping
from statistics import fmean
from typing import Any

# The mean nDCG@10 over all searches that is reported, and the one that picks the best checkpoint, on other queries.
REPORTED, SCORE = "search_ndcg@10", "choosing_ndcg@10"


def hash_of(query: str) -> str:
    """Tells a query's text from others, in a manifest that shall not hold texts."""
    return hashlib.sha256(query.encode()).hexdigest()[:12]


def choosers_of(manifest: dict[str, Any]) -> list[str]:
    """Which queries chose a run's checkpoint, for its card and report."""
    return [
        f"{choice['queries']:,} queries of {choice['search']} ("
        + (f"half of {choice['split']}" if choice["rule"] == "half" else f"the split {choice['split']}")
        + (", which are reported too)" if choice["also_reported"] else ")")
        if "hashes" in choice
        else f"the queries of {choice['search']}, which are reported too"
        for choice in manifest.get("checkpoint_chosen_by", [])
    ]


# ------------------------------------------------------------------------------------------- what is reported afterwards
def rules_of(manifest: dict[str, Any]) -> dict[str, str]:
    """What chose a run's checkpoint: a half, or all of a split, by the hash of each query that did."""
    choices = manifest.get("checkpoint_chosen_by", [])
    return {known: choice["rule"] for choice in choices for known in choice.get("hashes", "").split()}


def reported(
    manifest: dict[str, Any], task: str, hashes: Mapping[str, str], per_query: Mapping[str, float]
) -> tuple[dict[str, float], str]:
    """Scores by `split/subset/query` without those of queries that chose a run's checkpoint, and what is said of it.

    hashes: of the texts of these queries, so that they are known in a copy of their set too. Where all queries of a split
    chose, they stay.
    """
    rules = rules_of(manifest)
    rules_by_query = {name: rules.get(hashes.get(name, "")) for name in per_query}
    others = {name: value for name, value in per_query.items() if rules_by_query[name] != "half"}
    notes = []
    if left_out := len(per_query) - len(others):
        notes.append(f"{len(others):,} queries; {left_out:,} others chose the checkpoint and are left out")
    nano = any("hashes" not in choice for choice in manifest.get("checkpoint_chosen_by", []))
    if "all" in rules_by_query.values() or (nano and task.startswith("MultilingualNano")):
        notes.append("these queries also chose the checkpoint, so the score is optimistic")
    if (
        manifest.get("best_checkpoint")
        and "checkpoint_chosen_by" not in manifest
        and any(q.startswith("dev/") for q in others)
    ):
        notes.append("an earlier version trained the run and may have chosen its checkpoint by these queries")
    return others, "; ".join(notes)


def part_of(query: str) -> str:
    """`split/subset` of `split/subset/query id`."""
    return "/".join(query.split("/", 2)[:2])


def means_of_parts(per_query: Mapping[str, float]) -> dict[str, float]:
    """The mean score of every `split/subset`."""
    parts: dict[str, list[float]] = {}
    for name, value in per_query.items():
        parts.setdefault(part_of(name), []).append(value)
    return {part: fmean(values) for part, values in parts.items()}
