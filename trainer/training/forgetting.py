"""Searches at which a model is worse than it was before training: it has forgotten something."""

import json
from collections.abc import Callable
from statistics import fmean

from trainer.runs.intervals import paired_interval
from trainer.runs.run import Run
from trainer.system.files import read_json, write_atomically

# What run.json calls such a warning.
SIGN = "worse than before training"

# nDCG@10 of each query, by search.
QueryScores = dict[str, dict[str, float]]


def forgotten(before: QueryScores, after: QueryScores) -> dict[str, str]:
    """A message for each search whose nDCG@10 fell, if its 95 % interval (paired bootstrap over queries) is below 0."""
    messages = {}
    for name in before.keys() & after.keys():
        queries = sorted(before[name].keys() & after[name].keys())
        changes = [after[name][query] - before[name][query] for query in queries]
        if len(changes) < 2 or fmean(changes) >= 0:
            continue
        low, high = paired_interval([changes])
        if high < 0:
            start, end = (fmean(scores[name][query] for query in queries) for scores in (before, after))
            messages[name] = (
                f"{name} finds less than before training: nDCG@10 {start:.3f} → {end:.3f}, {end - start:+.3f} "
                f"[{low:+.3f}, {high:+.3f}] over {len(queries):,} queries. Take fewer steps, a lower learning rate, or "
                "training.start_share"
            )
    return dict(sorted(messages.items()))


def keep_query_scores(run: Run, when: str, scores: QueryScores) -> None:
    """Write the scores of single queries into the run folder, beside those of before."""
    known = read_json(run.query_scores) if run.query_scores.is_file() and when == "after" else {}
    write_atomically(run.query_scores, json.dumps(known | {when: scores}))


def warn_of_forgetting(run: Run, before: dict[str, float], echo: Callable[[str], None]) -> list[str]:
    """Say at which searches the model has become worse, and write it into run.json. Returns their names.

    before: empty if the scores before training are not comparable.
    """
    scores = read_json(run.query_scores) if before and run.query_scores.is_file() else {}
    found = forgotten(scores.get("before", {}), scores.get("after", {}))
    others = [each for each in run.manifest.get("warnings", []) if each["sign"] != SIGN]
    run.update(warnings=[*others, *({"sign": SIGN, "message": message} for message in found.values())])
    for message in found.values():
        echo(f"Warning: {message}")
    return list(found)
