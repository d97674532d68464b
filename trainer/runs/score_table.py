"""Systems' scores side by side, as report and model card show them."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trainer.runs.results import System

# Scores that differ by less are the same measurement, rounded by whoever wrote it down.
ROUNDING = 5e-4


@dataclass(frozen=True)
class ScoreTable:
    """nDCG@10 by task and system, the evaluated system first; a task that a system has not run is absent.

    `languages` are a task's; `notes` say how systems searched, each with its tasks.
    """

    main: str
    systems: list[str]
    scores: dict[str, dict[str, float]]
    languages: dict[str, tuple[str, ...]]
    notes: list[str]

    @property
    def common(self) -> list[str]:
        """Tasks that every system has."""
        return [task for task, row in self.scores.items() if row.keys() >= set(self.systems)]

    def mean(self, system: str) -> float:
        """A system's mean over the common tasks; NaN when there are none."""
        return fmean(self.scores[task][system] for task in self.common) if self.common else math.nan

    @property
    def means(self) -> dict[str, float]:
        """Every system's mean."""
        return {name: self.mean(name) for name in self.systems}


def build_table(main: str, systems: dict[str, System], compare: dict[str, Any] | None) -> ScoreTable:
    """All systems' scores; for their tasks also those of systems from elsewhere that `main` was compared with.

    compare: what evaluate.compare has written. Scores that it leaves out, being of other languages, are left out here.
    """
    scores: dict[str, dict[str, float]] = {}
    languages: dict[str, tuple[str, ...]] = {}
    notes: dict[str, list[str]] = {}
    for name, system in systems.items():
        for task, score in system.items():
            scores.setdefault(task, {})[name] = score.main
            languages[task] = score.languages
            if score.note:
                notes.setdefault(f"{name}: {score.note}", []).append(task)
    compare = compare or {"against": {}, "tasks": {}}
    for name, other in compare["against"].items():
        for task, row in compare["tasks"].items():
            if task in other["tasks"]:
                scores[task].setdefault(name, row[name])
            elif main in row and name in row:
                scores[task].pop(name, None)
    order = sorted({system for row in scores.values() for system in row}, key=lambda name: (name != main, name))
    notes_with_tasks = [f"{note} ({', '.join(tasks)})" for note, tasks in notes.items()]
    return ScoreTable(main, order, dict(sorted(scores.items())), languages, notes_with_tasks)


def is_current(compare: dict[str, Any], systems: dict[str, System]) -> bool:
    """Whether a comparison was made from the scores that the run's folder holds now."""
    own, rows = systems.get(compare["main"], {}), compare["tasks"]
    return own.keys() == {task for task, row in rows.items() if compare["main"] in row} and all(
        abs(rows[task].get(name, math.inf) - score.on_parts_of(own[task]).main) < ROUNDING
        for name, system in systems.items()
        for task, score in system.items()
        if task in own
    )
