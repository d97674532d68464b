"""Checks a saved model in a process that has nothing of this project."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config import ConfigError


@contextmanager
def answer_of_a_fresh_process(script: str, model: Path, texts: Any, *options: str, failure: str) -> Iterator[Path]:
    """Run `python -I SCRIPT MODEL TEXTS.json ANSWER OPTIONS`, and give the file that it has written: ANSWER.

    The process has no code of ours, no network, no access token and no cache of code. Raises ConfigError, which begins
    with `failure` and ends with the process's last line, when it fails.
    """
    with tempfile.TemporaryDirectory() as aside:
        sample, answer = Path(aside) / "texts.json", Path(aside) / "answer"
        sample.write_text(json.dumps(texts), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": aside}
        done = subprocess.run(
            [sys.executable, "-I", script, str(model.resolve()), str(sample), str(answer), *options],
            cwd=aside, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise ConfigError(f"{failure}: {reason[:300]}")
        yield answer
