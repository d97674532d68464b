"""steps.json: which steps of `make prove` are done, what they took, and why others failed."""

import shlex
import time
from pathlib import Path
from typing import Any

from evaluate.prove.child import Outcome
from evaluate.prove.plan import Step
from trainer.system.files import read_json, write_json


class Journal:
    """The file is replaced whole after every step."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.steps: dict[str, dict[str, Any]] = read_json(file) if file.is_file() else {}

    def is_done(self, key: str, made_of: Any) -> bool:
        """Whether a step has succeeded, with the same command and from the same input."""
        known = self.steps.get(key, {})
        return known.get("status") == "done" and known.get("made_of") == made_of

    def was_done_with(self, key: str, argument: str) -> bool:
        """Whether a step has succeeded with this among its arguments, whatever the others were."""
        known = self.steps.get(key, {})
        return known.get("status") == "done" and argument in known["made_of"]

    def record(self, step: Step, made_of: Any, outcome: Outcome, status: str, why: str = "") -> None:
        """Keep how a step ended. Time adds up over the attempts of one step; memory is the most of any."""
        known = self.steps.get(step.key, {})
        if known.get("made_of") != made_of:
            known = {}
        self.write(
            step.key,
            status=status,
            why=why,
            made_of=made_of,
            command=f"python -m {shlex.join(step.command)}",
            seconds=round(known.get("seconds", 0.0) + outcome.seconds, 1),
            peak_gib=round(max(known.get("peak_gib", 0.0), outcome.peak_gib), 3),
        )

    def write(self, key: str, **values: Any) -> None:
        """Keep these values of a step, and no others."""
        self.steps[key] = {**values, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(self.file, self.steps)

    def failures(self, keys: list[str]) -> dict[str, str]:
        """Why these steps are not done, where they were tried."""
        return {key: self.steps[key]["why"] for key in keys if self.steps.get(key, {}).get("status") == "failed"}
