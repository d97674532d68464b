"""Two systems' stored rankings fused by mteb, so nothing is encoded again: by reciprocal rank, and by weighted scores."""

from collections.abc import Iterator
from statistics import fmean
from typing import Any, Literal

from mteb.models import HybridSearch

from evaluate.scores import mean_ndcg, table_lines
from evaluate.search import SearchSystem
from trainer.config import ConfigError
from trainer.data.choosing import MIN_QUERIES, half_of
from trainer.runs.results import EvalFolder, Ranking

# Rankings of one task, by split/subset.
Parts = dict[str, Ranking]

# The weights of the first system that are tried, in twentieths: 0.00, 0.05, … 1.00.
STEPS = 20


def hybrid(folder: EvalFolder, first: str, second: str, tasks: list[str]) -> dict[str, Any]:
    """nDCG@10 of both systems and of their two fusions on every task, from the rankings in the folder.

    A hash of a query's id puts it in `dev`, as those that chose the checkpoint, or in `test`. The weight of `first` is the
    best on dev. A task with fewer than 10 queries in either has scores of `all` queries alone, and the reason in `why`.
    Raises ConfigError when a system has not been run on a task, or the two not on the same data.
    """
    scores = {task: _fuse_task(folder, first, second, task) for task in tasks}
    tests = [values["test"] for values in scores.values() if "test" in values]
    return {
        "first": first,
        "second": second,
        "tasks": scores,
        "mean_test": {name: fmean(test[name] for test in tests) for name in (tests[0] if tests else ())},
    }


def _fuse_task(folder: EvalFolder, first: str, second: str, task: str) -> dict[str, Any]:
    systems = {name: folder.rankings(name, task) for name in (first, second)}
    one, two = ({part: ranking.relevant for part, ranking in parts.items()} for parts in systems.values())
    if one != two:
        raise ConfigError(f"{first} and {second} were run on different data of {task}. Run both again")
    systems["rrf"] = fuse(systems[first], systems[second], "rrf")
    dev, test = ({name: queries_of(parts, split) for name, parts in systems.items()} for split in ("dev", "test"))
    counts = [sum(len(ranking.relevant) for ranking in split[first].values()) for split in (dev, test)]
    values = {
        "dev_queries": counts[0],
        "test_queries": counts[1],
        "weight": None,
        "all": {name: mean_ndcg(parts) for name, parts in systems.items()},
    }
    if min(counts) < MIN_QUERIES:
        return values | {"why": f"{counts[0]} dev and {counts[1]} test queries; a weight needs {MIN_QUERIES} of each"}
    weight = choose_weight(dev[first], dev[second])
    for split in (dev, test):
        split["weighted"] = fuse(split[first], split[second], "rsf", weight)
    scores = [{name: mean_ndcg(parts) for name, parts in split.items()} for split in (dev, test)]
    return values | {"weight": weight, "dev": scores[0], "test": scores[1]}


def choose_weight(first: Parts, second: Parts) -> float:
    """The weight of the first with the best nDCG@10; of equally good ones that nearest to 0.5, then the lower."""
    step = max(
        range(STEPS + 1),
        key=lambda step: (mean_ndcg(fuse(first, second, "rsf", step / STEPS)), -abs(step - STEPS // 2)),
    )
    return step / STEPS


def fuse(first: Parts, second: Parts, strategy: Literal["rrf", "rsf"], weight: float = 0.5) -> Parts:
    """Rankings by mteb's reciprocal rank fusion or relative score fusion; the second system has the rest of the weight.

    rsf scales each query's scores to 0 … 1 over the passages that are stored (the best 100). A passage only one of them
    found gets 0 from the other, so at weight 1 the second's passages come last, but are not gone.
    """
    # mteb asks for systems to search with. Its fuse() takes what they found, so these two are never called.
    idle = [SearchSystem("first"), SearchSystem("second")]
    search = HybridSearch(idle, weights=[weight, 1 - weight], fusion_strategy=strategy)
    return {
        part: Ranking(
            {
                query: dict(search.fuse([ranking.found.get(query, {}), second[part].found.get(query, {})]))
                for query in ranking.relevant
            },
            ranking.relevant,
        )
        for part, ranking in first.items()
    }


def queries_of(parts: Parts, split: Literal["dev", "test"]) -> Parts:
    """The rankings of the queries in dev or test; a part without such a query is left out."""
    rankings = {}
    for part, ranking in parts.items():
        relevant = {query: judged for query, judged in ranking.relevant.items() if half_of(query) == split}
        if relevant:
            rankings[part] = Ranking({query: ranking.found.get(query, {}) for query in relevant}, relevant)
    return rankings


def hybrid_lines(values: dict[str, Any]) -> Iterator[str]:
    """A table of the test queries, and a line for every task that is too small for one."""
    first, second = values["first"], values["second"]
    names = [first, second, "rrf", "weighted"]
    chosen = {task: row for task, row in values["tasks"].items() if row["weight"] is not None}
    if chosen:
        rows = {f"{task} ({row['test_queries']:,} test queries)": row["test"] for task, row in chosen.items()}
        rows[f"mean over {len(chosen)} of {len(values['tasks'])} tasks"] = values["mean_test"]
        weights = [f"  weight of {first}", *(f"  {row['weight']:.2f}" for row in chosen.values()), ""]
        for line, weight in zip(table_lines("hybrid", names, rows), weights, strict=True):
            yield line + weight
    for task, row in values["tasks"].items():
        if row["weight"] is None:
            scores = ", ".join(f"{name} {row['all'][name]:.4f}" for name in names[:3])
            yield f"hybrid      {task}, all queries: {scores}; no weight: {row['why']}"
