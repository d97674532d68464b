"""Base models that bring Python code of their own: which may run, where it is converted, and how it stays with a save."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from trainer.config import Config, ConfigError
from trainer.hub import Snapshot
from trainer.models.norbert import FAMILIES, changes_in, convert_files


@dataclass(frozen=True)
class BaseModel:
    """A base model's files, ready to be loaded. `code` says per file of Python code which changes were made to it."""

    source: str
    commit: str | None
    folder: Path
    code: dict[str, list[str]] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """What run.json records of it."""
        return {"source": self.source, "commit": self.commit, "code": self.code}


def with_own_code(snapshot: Snapshot, config: Config) -> BaseModel:
    """The base model with its code converted, in a folder of its own under the cache.

    Raises ConfigError when the config does not trust the code, when the code is not what the pinned commit holds, or
    when it cannot be converted.
    """
    if not code_references(snapshot.folder):
        return BaseModel(snapshot.source, snapshot.commit, snapshot.folder)
    _require_trust(snapshot, config)
    files = sorted(snapshot.folder.glob("*.py"))
    _require_local_code(snapshot)
    for file in files:
        _require_pinned(file, config)
    texts = convert_files({file.name: file.read_text() for file in files}, snapshot.folder)
    settings: dict[str, bool] = {}
    for name in texts.keys() & FAMILIES.keys():
        settings |= FAMILIES[name].settings
    folder = materialise(snapshot, texts, settings)
    changes = {name: changes_in(text, folder / name) for name, text in texts.items()}
    converted = any(changes.values())
    code = {name: found or [] for name, found in changes.items() if found or not converted}
    return BaseModel(snapshot.source, config.model.revision, folder, code)


# ------------------------------------------------------------------------------------------- what may run
def code_references(folder: Path) -> set[str]:
    """What the auto_map entries of a model's settings name: `module.Class`, or `owner/repository--module.Class`."""
    return {reference for file in _settings_files(folder) for reference in _references(_read_settings(file))}


def _settings_files(folder: Path) -> list[Path]:
    return [file for name in ("config.json", "tokenizer_config.json") for file in sorted(folder.rglob(name))]


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"model.base_model: {file} is not valid JSON: {error}") from None


def _references(settings: dict[str, Any]) -> Iterator[str]:
    for value in (settings.get("auto_map") or {}).values():
        yield from (part for part in (value if isinstance(value, list) else [value]) if part)


def _require_trust(snapshot: Snapshot, config: Config) -> None:
    if config.model.trust_remote_code:
        return
    notes = [_download_note(file) for file in snapshot.folder.glob("*.py")]
    commit = snapshot.commit or next((note[0] for note in notes if note), "<the commit this folder is a copy of>")
    raise ConfigError(
        f"model.base_model: {config.model.base_model} comes with Python code of its own. Read it in {snapshot.folder}; "
        f'to run it, add SET="model.trust_remote_code=true model.revision={commit}", or write both into the config'
    )


def _download_note(file: Path) -> tuple[str, str] | None:
    """Commit and git hash of a file that `hf download --local-dir` fetched, from the note it keeps."""
    note = file.parent / ".cache/huggingface/download" / f"{file.name}.metadata"
    return tuple(note.read_text().split()[:2]) if note.is_file() else None


def _require_local_code(snapshot: Snapshot) -> None:
    """Stop when code is missing, or would be taken from another repository, at whatever commit that has now."""
    for reference in sorted(code_references(snapshot.folder)):
        repository, _, name = reference.rpartition("--")
        file = name.split(".")[0] + ".py"
        if not (snapshot.folder / file).is_file():
            other = f" (its config.json takes it from {repository}, which nothing pins)" if repository else ""
            raise ConfigError(
                f"model.base_model: {snapshot.folder} lacks its code, {file}{other}. Put the file there, beside config.json"
            )


def _require_pinned(file: Path, config: Config) -> None:
    """Stop when a file is not what the hub gave for the pinned commit.

    The hub's cache names a text file by its git hash, and links to it.
    """
    commit, expected = _download_note(file) or (config.model.revision, file.resolve().name)
    if commit != config.model.revision:
        raise ConfigError(
            f"model.revision: {config.model.revision} is pinned, but {file.parent} is a copy of commit {commit}"
        )
    data = file.read_bytes()
    if (
        re.fullmatch(r"[0-9a-f]{40}", expected)
        and expected != hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    ):
        raise ConfigError(
            f"model.base_model: {file} is not what commit {commit} holds: it was edited by hand. "
            "Remove it and download it again"
        )


# ------------------------------------------------------------------------------------------- the converted copy
def materialise(snapshot: Snapshot, code: dict[str, str], settings: dict[str, bool]) -> Path:
    """A folder under the cache with this code, and links to everything else. The same input gives the same folder."""
    from huggingface_hub.constants import HF_HOME

    named = json.dumps([str(snapshot.folder.resolve()), code, settings, _settings_texts(snapshot.folder)])
    name = re.sub(r"\W+", "_", Path(snapshot.source).name)
    folder = Path(HF_HOME) / "nordsparse" / f"{name}_{hashlib.sha256(named.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        for file, text in code.items():
            if (folder / file).read_text() != text:
                raise ConfigError(f"{folder / file} was edited by hand. Remove {folder} to have it made again")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        copy = Path(aside) / "model"
        for file in sorted(snapshot.folder.rglob("*")):
            inside = file.relative_to(snapshot.folder)
            if file.is_file() and file.suffix != ".py" and not inside.parts[0].startswith("."):
                (copy / inside).parent.mkdir(parents=True, exist_ok=True)
                (copy / inside).symlink_to(file.resolve())
        for name, text in code.items():
            (copy / name).write_text(text)
        for file in _settings_files(copy):
            own = _read_settings(file)
            if own.get("auto_map"):
                file.unlink()
                own = _own_code_only(own) | (settings if file.name == "config.json" else {})
                file.write_text(json.dumps(own, indent=2))
        try:
            copy.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _settings_texts(folder: Path) -> list[str]:
    return [file.read_text() for file in _settings_files(folder)]


def _own_code_only(settings: dict[str, Any]) -> dict[str, Any]:
    """auto_map with the code beside it, not that of the repository it once came from."""
    own = {
        key: [part and part.rpartition("--")[2] for part in value]
        if isinstance(value, list)
        else value.rpartition("--")[2]
        for key, value in settings["auto_map"].items()
    }
    return settings | {"auto_map": own}


def check_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raise ConfigError when a base model's own code has weights that its files lack: they would be random numbers.

    Only for models with code of their own, whose weights are saved under the names they have in memory.
    """
    if not code_references(folder):
        return
    saved: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            saved |= set(weights.keys())
    for file in folder.glob("pytorch_model*.bin") if not saved else ():
        saved |= torch.load(file, map_location="meta", weights_only=True).keys()
    if missing := sorted(model.state_dict().keys() - saved - model.all_tied_weights_keys.keys()):
        raise ConfigError(f"model.base_model: {folder} lacks weights of its model: {', '.join(missing[:5])}")


# ------------------------------------------------------------------------------------------- saved models
def keep_code(folder: Path) -> None:
    """Copy a saved model's code to its root, the only place where from_pretrained looks for it.

    A Router saves its modules, and the code with them, one folder further down.
    """
    for file in sorted(folder.rglob("*.py")):
        if file.parent != folder:
            shutil.copyfile(file, folder / file.name)


def check_code(folder: Path) -> None:
    """Raise ConfigError when a saved model lacks its code, or the code was edited since it was converted."""
    for reference in sorted(code_references(folder)):
        file = folder / (reference.rpartition("--")[2].split(".")[0] + ".py")
        if not file.is_file():
            raise ConfigError(f"{folder} lacks the code of its model, {file.name}. Continue from another checkpoint")
    for file in sorted(folder.glob("*.py")):
        changes_in(file.read_text(), file)
