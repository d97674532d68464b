"""Base models that bring Python code of their own: which may run, where it is converted, and how it stays with a save."""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import git_hash

from trainer.config import Config, ConfigError
from trainer.hub.cache import folder_of
from trainer.hub.download import Snapshot
from trainer.hub.own_code import (
    code_hashes,
    code_references,
    read_code,
    references_in,
    require_own_tokenizer,
    settings_files,
)
from trainer.models.norbert import SETTINGS, changes_in, convert_files
from trainer.system.files import read_json


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


def with_own_code(snapshot: Snapshot, config: Config, pin_command: str) -> BaseModel:
    """The base model with its code converted, in a folder of its own under the cache.

    Raises ConfigError when the folder holds no model, or code that the config does not trust, that is not the pinned
    commit's, or that cannot be converted; and when the copy cannot be written. pin_command: the remedy that it names.
    """
    # first of all, or the whole of / might be searched for code
    if not any((snapshot.folder / name).is_file() for name in ("config.json", "modules.json")):
        raise ConfigError(f"model.base_model: {snapshot.source} cannot be loaded: no config.json, no modules.json")
    if config.model.trust_remote_code:
        require_own_tokenizer("model.base_model:", snapshot.source, snapshot.folder)
    references = code_references(snapshot.folder)
    if not references:
        return BaseModel(snapshot.source, snapshot.commit, snapshot.folder)
    _require_trust(snapshot, config, pin_command)
    require_local_code(snapshot, references)
    _require_pinned_hashes(snapshot, config, pin_command)
    texts = {}
    for file in sorted(snapshot.folder.glob("*.py")):
        _require_pinned(file, config)
        texts[file.name] = read_code(file)
    texts = convert_files(texts, snapshot.folder)
    try:
        folder = materialise(snapshot, texts | _settings_with_own_code(snapshot.folder, texts))
    except OSError as error:
        raise ConfigError(f"the converted copy of {snapshot.source} cannot be written: {error}. Set HF_HOME") from None
    changes = {name: changes_in(text, folder / name) for name, text in texts.items()}
    converted = any(changes.values())
    code = {name: found or [] for name, found in changes.items() if found or not converted}
    return BaseModel(snapshot.source, config.model.revision, folder, code)


# ------------------------------------------------------------------------------------------- what may run
def _file_of(reference: str) -> str:
    return reference.rpartition("--")[2].split(".")[0] + ".py"


def _require_trust(snapshot: Snapshot, config: Config, pin_command: str) -> None:
    if config.model.trust_remote_code:
        return
    if snapshot.commit:
        raise ConfigError(
            f"model.base_model: {snapshot.source} comes with Python code of its own, which is not trusted yet. To see it "
            f"and decide, run: {pin_command}"
        )
    commits = [found[0] for file in snapshot.folder.glob("*.py") if (found := _commit_and_hash(file))]
    commit = next(iter(commits), "<the commit this folder is a copy of>")
    raise ConfigError(
        f"model.base_model: {config.model.base_model} comes with Python code of its own. Read it in {snapshot.folder}; "
        f'to run it, add SET="model.trust_remote_code=true model.revision={commit}", or write both into the config'
    )


def _commit_and_hash(file: Path) -> tuple[str, str] | None:
    """Commit and git hash of a file that `hf download --local-dir` fetched, from the metadata beside it."""
    metadata = file.parent / ".cache/huggingface/download" / f"{file.name}.metadata"
    if not metadata.is_file():
        return None
    commit, git_hash, *_ = metadata.read_text().split()
    return commit, git_hash


def require_local_code(snapshot: Snapshot, references: set[str]) -> None:
    """Stop when code is missing, or would be taken from another repository, at whatever commit that has now."""
    for reference in sorted(references):
        if not (snapshot.folder / _file_of(reference)).is_file():
            repository = reference.rpartition("--")[0]
            other = f" (it is to come from {repository}, which nothing pins)" if repository else ""
            raise ConfigError(
                f"model.base_model: {snapshot.folder} lacks its code, {_file_of(reference)}{other}. Copy the model into a "
                "folder of yours, put the file at its root, and point model.base_model at it"
            )


def _require_pinned_hashes(snapshot: Snapshot, config: Config, pin_command: str) -> None:
    """Stop when a file is missing, added, or not the one whose SHA-256 was pinned."""
    pinned = config.model.code_sha256
    if pinned is None:
        return
    found = code_hashes(snapshot.folder)
    for name in sorted(found.keys() | pinned):
        if found.get(name) != pinned.get(name):
            remedy = f"run: {pin_command}" if snapshot.commit else "put the file back, or change that key"
            raise ConfigError(
                f"model.base_model: {snapshot.folder / name} is not the code that was pinned: its SHA-256 is "
                f"{found.get(name, 'missing')[:16]}, that in model.code_sha256 {pinned.get(name, 'missing')[:16]}. "
                f"None of it has run. To see the difference and decide, {remedy}"
            )


def _require_pinned(file: Path, config: Config) -> None:
    """Stop when a file is not what the hub gave for the pinned commit.

    The hub's cache links each file of a commit's folder to one named by its git hash; `hf download` writes both down. Of
    any other folder nothing is known.
    """
    revision, in_hub_cache = config.model.revision, file.parent.parent.name == "snapshots"
    commit, expected = _commit_and_hash(file) or (revision, "")
    if in_hub_cache:
        commit, expected = file.parent.name, file.resolve().name
    if commit != revision:
        raise ConfigError(f"model.revision: {revision} is pinned, but {file.parent} is a copy of commit {commit}")
    if (in_hub_cache or expected) and expected != git_hash(file.read_bytes()):
        raise ConfigError(
            f"model.base_model: {file} is not what commit {commit} holds: it was edited by hand. "
            "Remove it and download it again"
        )


# ------------------------------------------------------------------------------------------- the converted copy
def _settings_with_own_code(folder: Path, texts: dict[str, str]) -> dict[str, str]:
    """The settings files that name code, by path: with the code beside them, not that of the repository it came from."""
    changed = {}
    for file in settings_files(folder):
        settings = read_json(file)
        references = set(references_in(settings))
        if not references:
            continue
        if file.name == "config.json":
            for name in texts:
                settings |= SETTINGS.get(name, {})
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        for reference in references:
            text = text.replace(json.dumps(reference), json.dumps(reference.rpartition("--")[2]))
        changed[str(file.relative_to(folder))] = text
    return changed


def materialise(snapshot: Snapshot, written: dict[str, str]) -> Path:
    """A folder under the cache with these files, and links to all others. The same input gives the same folder."""
    source = snapshot.folder.resolve()
    files = {str(file.relative_to(source)): file for file in sorted(source.rglob("*")) if file.is_file()}
    linked = {name: file for name, file in files.items() if name not in written and not name.startswith(".")}
    digest = hashlib.sha256(json.dumps([str(source), written, list(linked)]).encode()).hexdigest()
    name = re.sub(r"\W+", "_", Path(snapshot.source).name)  # transformers makes a Python module's name of it
    folder = folder_of(f"{name}_{digest[:16]}")
    if folder.is_dir():
        for name, text in written.items():
            file = folder / name
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                raise ConfigError(f"{file} was edited by hand. Remove {folder} to have it made again")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        copy = Path(aside) / "model"
        for name in (*written, *linked):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (copy / name).write_text(text, encoding="utf-8")
        for name, file in linked.items():
            (copy / name).symlink_to(file.resolve())
        try:
            copy.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


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
        file = folder / _file_of(reference)
        if "--" in reference or not file.is_file():
            raise ConfigError(f"{folder} lacks the code of its model, {file.name}. Continue from another checkpoint")
    for file in sorted(folder.glob("*.py")):
        changes_in(file.read_text(encoding="utf-8"), file)
