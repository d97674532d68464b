"""Checkpoints that are known to be complete and to belong to this run."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from trainer.config import ConfigError

SEAL = "complete.json"


def seal(folder: Path, run_id: str, step: int) -> None:
    """Write the last file of a checkpoint: its run and step, the size of every file in it, the hash of every code file."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in (SEAL, f".{SEAL}")]
    files = {str(file.relative_to(folder)): file.stat().st_size for file in found}
    code = {name: _hash(folder / name) for name in files if name.endswith(".py")}
    aside = folder / f".{SEAL}"
    with aside.open("w") as handle:
        json.dump({"run": run_id, "step": step, "files": files, "code": code}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, folder / SEAL)


def fault_of(folder: Path, run_id: str) -> str | None:
    """Why a checkpoint cannot be continued from, or None when it can."""
    try:
        found = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, json.JSONDecodeError):
        return f"its {SEAL} cannot be read"
    if found.get("run") != run_id:
        return "it belongs to another run"
    for name, size in found["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def require_own_code(folder: Path) -> None:
    """Raise ConfigError when the code of a checkpoint's model is missing or was edited.

    Going on from an older checkpoint would not mend it, and nobody's code but the converted may run.
    """
    try:
        code = json.loads((folder / SEAL).read_text()).get("code", {})
    except (OSError, json.JSONDecodeError):
        return
    for name, expected in code.items():
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"{folder} lacks the code of its model, {name}. Put it back, or remove the checkpoint")
        if _hash(file) != expected:
            raise ConfigError(f"{file} was edited by hand. Put it back as it was, or remove the checkpoint")


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def newest_complete(folder: Path, run_id: str, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is complete and of this run. Others are skipped with a warning.

    Raises ConfigError when its model's code is missing or edited.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        require_own_code(path)
        fault = fault_of(path, run_id)
        if fault is None:
            return path
        say(f"Warning: {path} is skipped: {fault}")
    return None
