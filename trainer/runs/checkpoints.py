"""Checkpoints that are known to be complete, unchanged and of this run: written aside, sealed, put in place in one move."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.system.files import flush, give_usual_mode, sha256_of, write_atomically

SEAL = "complete.json"
PREFIX = "checkpoint-"
# Inside checkpoints/, so that a rename stays on one disk even where that folder is a link to another. The underscore
# keeps it out of what the library pushes to the hub during training (it ignores `_*`, but not names with a dot).
ASIDE = "_writing"
REMOVED = "_removed"


def seal(folder: Path, run_id: str, step: int) -> None:
    """Write the last file of a checkpoint: its run and step, the size and SHA-256 of every file in it.

    Hashing reads what was just written, at 0.8 GB/s on one core of an EPYC. Writing and fsync of that half gigabyte took
    2.4 s beside it and hashing 0.7 s, so a save takes a quarter longer: 1.2 s per GB, as does the check at resume.
    """
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    text = json.dumps({"run": run_id, "step": step, "files": files}, indent=1)
    write_atomically(folder / SEAL, text)


def _sealed(folder: Path) -> dict[str, Any] | None:
    """What the seal says; None when there is none, or it says nothing sensible."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        is_whole = all(isinstance(entry["bytes"], int) and entry["sha256"] for entry in sealed["files"].values())
        return sealed if is_whole and "run" in sealed else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def fault_of(folder: Path, run_id: str) -> str | None:
    """Why a checkpoint cannot be continued from, or None when every byte is as it was written."""
    sealed = _sealed(folder)
    if sealed is None:
        return f"its {SEAL} cannot be read" if (folder / SEAL).exists() else "it was not written to its end"
    if sealed["run"] != run_id:
        return "it belongs to another run"
    return _first_change(folder, sealed["files"])


def _first_change(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that is not as the seal says, and how it differs."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        try:
            if sha256_of(file) != expected["sha256"]:
                return f"{name} was changed since it was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint of a step, among the checkpoints in a folder."""
    return folder / f"{PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """Every checkpoint, the oldest first: by step, since a clock may jump and a copy has new times."""
    paths = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(paths, key=step_of)


def require_own_code(folder: Path) -> None:
    """Raise ConfigError when the code of a checkpoint's model is missing or was edited.

    Going on from an older checkpoint would not mend it, and nobody's code but the converted may run.
    """
    files = (_sealed(folder) or {"files": {}})["files"]
    if fault := _first_change(folder, {name: entry for name, entry in files.items() if name.endswith(".py")}):
        raise ConfigError(f"{folder}: of its model's code, {fault}. Put it back as it was, or remove the checkpoint")


def newest_complete(folder: Path, run_id: str, echo: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is complete, unchanged and of this run. Others are skipped with a warning.

    Raises ConfigError when its model's code is missing or edited.
    """
    for path in reversed(checkpoints_in(folder)):
        require_own_code(path)
        fault = fault_of(path, run_id)
        if fault is None:
            return path
        echo(f"Warning: {path} is skipped: {fault}")
    return None


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint when this one was written, where that is another one. It lies beside it, also in a copied run."""
    best = json.loads((checkpoint / "trainer_state.json").read_text()).get("best_model_checkpoint")
    return checkpoint.parent / Path(best).name if best and Path(best).name != checkpoint.name else None


def require_unchanged(best: Path, run_id: str) -> None:
    """Raise ConfigError when the checkpoint that training shall end with is not as it was written."""
    if fault := fault_of(best, run_id):
        raise ConfigError(
            f"{best}, the best checkpoint so far, cannot be used: {fault}. Put it back, or end with the last step: "
            "resume with SET=training.load_best_model_at_end=false"
        )


# ------------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint in. What a failure leaves there goes, and frees its space on a full disk."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(written: Path, place: Path) -> None:
    """Move a written folder to its name, on the disk before it has it; one that has that name already goes."""
    for path in (written, *written.rglob("*")):
        if path.is_file():
            give_usual_mode(path)
        flush(path)
    removed = _out_of_the_way(place)
    written.rename(place)
    flush(place.parent)
    shutil.rmtree(removed, ignore_errors=True)


def _out_of_the_way(place: Path) -> Path:
    """Rename a folder before it is removed: a kill half-way through leaves nothing with a checkpoint's name."""
    removed = place.with_name(f"{REMOVED}-{place.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if place.exists():
        place.rename(removed)
    return removed


def remove_oldest(folder: Path, keep: int, newest: Path, best: str | None) -> None:
    """Remove checkpoints up to the newest, the oldest first, until `keep` are left; the newest and the best stay."""
    written = [path for path in checkpoints_in(folder) if step_of(path) <= step_of(newest)]
    protected = {newest.name, Path(best).name if best else newest.name}
    spare = [path for path in written if path.name not in protected]
    for path in spare[: max(len(written) - max(keep, len(protected)), 0)]:
        shutil.rmtree(_out_of_the_way(path), ignore_errors=True)


def remove_leftovers(run_folder: Path, checkpoints: Path) -> None:
    """Remove what a killed run was writing or removing."""
    removed = [path for folder in (run_folder, checkpoints) for path in folder.glob(f"{REMOVED}-*")]
    for path in (checkpoints / ASIDE, run_folder / ".final", *removed):
        shutil.rmtree(path, ignore_errors=True)
    for name in ("run.json", "config.yaml", "training_texts", "start_weights"):
        for path in run_folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
