"""One system's scores beside others': the difference per task, with bootstrap intervals where queries have scores."""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluate.scores import table_lines
from trainer.config import ConfigError
from trainer.runs.intervals import paired_interval
from trainer.runs.results import System, TaskScore

# Missing tasks named on one line; a results tree of mteb may hold a hundred. The stored part has all.
SHOWN = 8
LEFT_OUT = "left out: only one of the two has a score"


def compare(main: str, systems: dict[str, System], seed: int = 0, resamples: int = 10_000) -> dict[str, Any]:
    """The scores of all systems, and what `main` gains or loses in nDCG@10 (`delta`) against each of the others.

    Where both have scores per query, `delta` and its interval (`low`, `high`) are over the queries that both have, and
    `left_out` counts the others. A task is a tie if the interval holds zero, or the scores are equal to four decimals.
    `missing` names the tasks that are not compared, and why. Raises ConfigError where no task can be compared.
    """
    if not systems.get(main):
        raise ConfigError(f"{main} has no results to compare. Score it first: python -m evaluate mteb")
    names = [main, *(name for name in systems if name != main)]
    tasks: dict[str, dict[str, TaskScore]] = {}
    for name in names:
        for task, score in systems[name].items():
            own = systems[main].get(task, score)
            tasks.setdefault(task, {})[name] = score.on_parts_of(own)
    return {
        "main": main,
        "systems": names,
        "tasks": {task: {name: score.main for name, score in row.items()} for task, row in tasks.items()},
        "languages": {task: list(next(iter(row.values())).languages) for task, row in tasks.items()},
        "chose": {task: row[main].left_out for task, row in tasks.items() if main in row and row[main].left_out},
        "against": {other: _against(main, other, tasks, seed, resamples) for other in names[1:]},
    }


def _against(
    main: str, other: str, tasks: dict[str, dict[str, TaskScore]], seed: int, resamples: int
) -> dict[str, Any]:
    differences, missing = {}, []
    for task, row in tasks.items():
        if main in row and other in row:
            if reason := _why_not_comparable(main, row[main], other, row[other]):
                missing.append(f"{task} ({reason})")
            else:
                differences[task] = _difference(row[main], row[other], seed, resamples)
        elif main in row or other in row:
            missing.append(f"{task} ({other if main in row else main})")
    if not differences:
        raise ConfigError(
            f"{main} and {other} have no task in common. Score both on the same ones. Missing: {_shortened(missing)}"
        )
    signs = [sign_of(row) for row in differences.values()]
    return {
        "tasks": differences,
        "mean_delta": fmean(row["delta"] for row in differences.values()),
        "wins": signs.count(1),
        "losses": signs.count(-1),
        "ties": signs.count(0),
        "missing": missing,
        "mteb": sorted(
            {str(tasks[task][name].mteb_version) for task in differences for name in (main, other)} - {"None"}
        ),
    }


def sign_of(row: dict[str, float]) -> int:
    """1 for a win, -1 for a loss, 0 where the two are not told apart."""
    delta = round(row["delta"], 4)
    if delta == 0 or row.get("low", delta) <= 0 <= row.get("high", delta):
        return 0
    return 1 if delta > 0 else -1


def _why_not_comparable(main: str, own: TaskScore, other: str, their: TaskScore) -> str | None:
    """Why two scores are not of the same data, as far as their files say; None when they may be."""
    if own.revision and their.revision and own.revision != their.revision:
        return f"other data: revision {own.revision[:12]} and {their.revision[:12]}"
    if own.parts and their.parts and own.parts.keys() != their.parts.keys() and own.languages == their.languages:
        return f"other splits: {', '.join(own.parts)} and {', '.join(their.parts)}"
    if own.left_out and not their.per_query:  # their mean is over those queries too
        return f"{other} has no scores per query, and some queries chose the checkpoint"
    if own.per_query and their.per_query and not own.per_query.keys() & their.per_query.keys():
        return "no query in common"
    languages, their_languages = languages_of(own), languages_of(their)
    if languages and their_languages and languages != their_languages:  # means over different subsets of a task
        return f"{main} in {', '.join(sorted(languages))}; {other} in {', '.join(sorted(their_languages))}"
    return None


def _difference(own: TaskScore, other: TaskScore, seed: int, resamples: int) -> dict[str, float]:
    shared = own.per_query.keys() & other.per_query.keys()
    parts: dict[str, list[float]] = {}
    for query in sorted(shared):
        split, subset, _ = query.split("/", 2)
        parts.setdefault(f"{split}/{subset}", []).append(own.per_query[query] - other.per_query[query])
    values = {"delta": own.main - other.main}
    if shared and (left_out := len(own.per_query.keys() | other.per_query.keys()) - len(shared)):
        values = {"delta": fmean(map(fmean, parts.values())), "left_out": left_out}
    if parts and min(map(len, parts.values())) > 1:
        low, high = paired_interval(list(parts.values()), seed, resamples)
        values |= {"low": low, "high": high, "queries": len(shared)}
    return values


def languages_of(score: TaskScore) -> set[str]:
    """ISO 639-3 codes; empty for a folder of unknown language."""
    return {language.partition("-")[0] for language in score.languages} - {"mis"}


def baseline_name(path: Path) -> str:
    """What results from elsewhere are called: the model's name in trees that have one, or else the file's or folder's.

    mteb writes results/<model>/<revision>/<task>.json, and this project scores/<system>/<task>.json.
    """
    # resolve() would follow links, whose targets have names of their own
    path = Path(os.path.abspath(path))  # noqa: PTH100
    folder = path.parent if path.is_file() else path
    if folder.parent.parent.name == "results" or (folder / "model_meta.json").is_file():
        return folder.parent.name
    if path.is_file() and folder.parent.name != "scores":
        return path.stem
    return folder.name


def compare_lines(values: dict[str, Any]) -> Iterator[str]:
    """A table of main's tasks, and under it one line for each other system."""
    main, systems = values["main"], values["systems"]
    rows = {_label(task, values["languages"][task]): row for task, row in values["tasks"].items() if main in row}
    yield from table_lines("compare", systems, rows)
    for task, chose in values.get("chose", {}).items():
        yield f"            {task}: {_count(chose, 'query', 'queries')} chose the checkpoint and are left out"
    for other, result in values["against"].items():
        counts = [_count(result["wins"], "win", "wins"), _count(result["losses"], "loss", "losses")]
        counts += [f"{result['ties']} not told apart"] if result["ties"] else []
        details = [
            f"{task} {row['delta']:+.3f}"
            + (f" [{row['low']:+.3f}, {row['high']:+.3f}]" if "low" in row else "")
            + (f" ({_count(row['left_out'], 'query', 'queries')} {LEFT_OUT})" if "left_out" in row else "")
            for task, row in result["tasks"].items()
        ]
        yield (
            f"            against {other}: mean {result['mean_delta']:+.3f} over {len(details)} of "
            f"{_count(len(details) + len(result['missing']), 'task', 'tasks')}, {', '.join(counts)}; {', '.join(details)}"
        )
        if len(result.get("mteb", [])) > 1:
            yield f"            made by different versions of mteb: {', '.join(result['mteb'])}"
        if result["missing"]:
            yield f"            missing: {_shortened(result['missing'])}"


def _label(task: str, languages: list[str]) -> str:
    codes = [language.partition("-")[0] for language in languages if not language.startswith("mis")]
    return f"{task} ({', '.join(codes)})" if codes else task


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _shortened(missing: list[str]) -> str:
    more = len(missing) - SHOWN
    return ", ".join(missing[:SHOWN]) + (f" and {more} more" if more > 0 else "")
