"""Checkpoints that are known to be complete and to belong to this run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

SEAL = "complete.json"


def seal(folder: Path, run_id: str, step: int) -> None:
    """Write the last file of a checkpoint: which run and step it is of, and the size of every file in it."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    aside = folder / f".{SEAL}"
    with aside.open("w") as handle:
        json.dump({"run": run_id, "step": step, "files": files}, handle, indent=1)
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


def newest_complete(folder: Path, run_id: str, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is complete and of this run. Others are skipped with a warning."""
    steps = sorted(
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    )
    for _, path in reversed(steps):
        fault = fault_of(path, run_id)
        if fault is None:
            return path
        say(f"Warning: {path} is skipped: {fault}")
    return None
