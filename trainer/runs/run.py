"""The run folder models/<name>/: everything of one training run, and the manifest that says how it came about."""

import hashlib
import importlib.metadata
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config import Config, ConfigError, LoadedConfig, is_commit, load_config, render, why_refused
from trainer.system.files import sha256_of, write_atomically

MODELS = Path("models")
REQUIREMENTS = Path(__file__).parents[2] / "docker" / "requirements"
# How long a network file system may take to show another machine a new file: NFS keeps what it knows for 3 to 60 s.
SHARED_SECONDS = 60.0
# What makes a model: a hash of these tells whether two folders hold the same one.
MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")
PACKAGES = (
    "torch",
    "sentence-transformers",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "numpy",
    "pyarrow",
)


class Run:
    """One run folder. run.json is written first, and replaced atomically at every change.

    Of several processes that train together only the first writes; in the others, `is_mine` is False.
    """

    def __init__(self, folder: Path, is_mine: bool = True) -> None:
        self.folder, self.is_mine = folder, is_mine
        self.name = folder.name
        self.manifest_file = folder / "run.json"
        self.checkpoints = folder / "checkpoints"  # training state, one folder per saved step
        self.logs = folder / "logs"  # TensorBoard's event files
        self.final = folder / "final"  # the trained model
        self.start_weights = (
            folder / "start_weights.safetensors"
        )  # with training.start_share: those from before training
        self.query_scores = folder / "query_scores.json"  # nDCG@10 of each query, before and after training
        self.training_texts = folder / "training_texts.parquet"  # every different text, by data set
        self.manifest: dict[str, Any] = {}
        self._before: dict[Path, str] = {}  # files of a run that is resumed, as they were

    @property
    def id(self) -> str:
        """Tells this run's checkpoints from those of another."""
        return self.manifest["id"]

    @classmethod
    def create(cls, loaded: LoadedConfig, name: str | None = None, overrides: Sequence[str] = ()) -> "Run":
        """A new run folder. Raises ConfigError when there is one already: nothing trained is overwritten."""
        run = cls(MODELS / (name or loaded.name))
        if run.manifest_file.exists() and not cls.open(loaded, name).is_empty():
            again = loaded.name if loaded.file.parent.name == "configs" else loaded.file
            raise ConfigError(
                f"{run.folder} exists. To continue it: make resume CONFIG={again}. "
                f"To train anew: remove the folder, or copy the config under a new name."
            )
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.manifest = {
                "id": uuid.uuid4().hex,
                "name": run.name,
                "status": "starting",
                "started": _now(),
                "command": f"python -m trainer {shlex.join(sys.argv[1:])}",
                "config_file": str(loaded.file),
                "overrides": list(overrides),
                "git_commit": git_commit(),
                "image": os.environ.get("NORDSPARSE_IMAGE"),  # docker/run says it: a container does not know its image
                "lock": lock_hash(),
                "python": sys.version.split()[0],
                "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
            }
            run.update()
            write_atomically(run.folder / "config.yaml", render(loaded))
        except OSError as error:
            raise cannot_be_written(run.folder, error) from None
        return run

    @classmethod
    def open(cls, loaded: LoadedConfig, name: str | None = None) -> "Run":
        """An existing run folder, to continue."""
        run = cls(MODELS / (name or loaded.name))
        if not run.manifest_file.exists():
            raise ConfigError(f"{run.folder} holds no run to resume. Start one: make train CONFIG={loaded.name}")
        run._read()
        return run

    @classmethod
    def follow(cls, loaded: LoadedConfig, name: str | None, manifest: dict[str, Any]) -> "Run":
        """The run that the first process opened, as another process sees it: never written.

        Raises ConfigError when models/ is not one folder for all of them.
        """
        run = cls(MODELS / (name or loaded.name), is_mine=False)
        run.manifest = manifest
        deadline = time.monotonic() + SHARED_SECONDS
        while not run._is_on_disk():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{run.folder} on {socket.gethostname()} is not the folder that the first process writes to. "
                    f"Training over several machines needs one {MODELS}/ that all of them share"
                )
            time.sleep(0.2)
        return run

    def _is_on_disk(self) -> bool:
        try:
            return json.loads(self.manifest_file.read_text(encoding="utf-8"))["id"] == self.id
        except (OSError, ValueError, KeyError):
            return False

    def _read(self) -> None:
        try:
            self.manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.manifest_file} cannot be read: {error}. Remove the folder to train anew"
            ) from None

    @classmethod
    def finished(cls, name: str) -> "Run":
        """A run that ended with a model. Raises ConfigError when there is none."""
        run = cls(MODELS / name)
        if not run.manifest_file.exists():
            raise ConfigError(f"{run.folder} holds no trained model. Train it first: make train CONFIG={name}")
        run._read()
        status = run.manifest.get("status")
        if status != "finished" or not run.final.is_dir():
            raise ConfigError(
                f"{run.folder} holds no finished run (its status is '{status}'). To finish it: make resume CONFIG={name}"
            )
        return run

    def config(self) -> Config:
        """The resolved config of the run."""
        return load_config(self.folder / "config.yaml").config

    def go_on_with(self, loaded: LoadedConfig, overrides: Sequence[str], echo: Callable[[str], None]) -> None:
        """Take over what was changed in the config (read with these overrides) since the run started, and say it.

        Raises ConfigError when a key changed that keeps its value for the whole run: trainer/config/resume.py. Until
        training begins, take_back undoes it.
        """
        started = load_config(self.folder / "config.yaml").config
        changed = list(differences(started.model_dump(), loaded.config.model_dump()))
        for path, old, new in changed:
            if not self._stood_for(path, old, new) and (reason := why_refused(path, old, new)):
                raise ConfigError(
                    f"{loaded.where(*path)}: '{'.'.join(path)}' was {old} when {self.folder} was started, and is {new} "
                    f"now. A resume cannot change it: {reason}. Put it back, or copy the config under a new name"
                )
        changes = [{"key": ".".join(path), "from": old, "to": new} for path, old, new in changed]
        for change in changes:
            echo(f"changed   {change['key']}: {change['from']} → {change['to']}")
        files = (self.manifest_file, self.folder / "config.yaml")
        self._before = {file: file.read_text(encoding="utf-8") for file in files if file.exists()}
        self.manifest.pop("error", None)
        self.manifest.setdefault("changes", []).extend(changes)
        try:
            self.update(status="starting", overrides=list(overrides))
            write_atomically(self.folder / "config.yaml", render(loaded))
        except OSError as error:
            raise cannot_be_written(self.folder, error) from None

    def _stood_for(self, path: tuple[str, ...], old: Any, new: Any) -> bool:
        """Whether a branch or tag became the commit that it stood for: a run may be pinned after its start.

        Of the rows, whose mining models count too, their fingerprints decide when they are loaded.
        """
        if path[-1] != "revision" or is_commit(str(old)) or not is_commit(str(new)):
            return False
        return path[0] != "model" or (self.manifest.get("base_model") or {}).get("commit") == new

    def take_back(self) -> bool:
        """Make a run that a resume was refused for what it was. False when it has trained since, or is a new one."""
        for file, text in self._before.items():
            write_atomically(file, text)
        return bool(self._before)

    def changes_from(self, step: int) -> list[dict[str, Any]]:
        """The changes of keys so far with the step after which each holds, when training goes on from this one.

        One that an earlier resume made later in the run holds from here, too; from step 0 on the run is another.
        """
        changes = self.manifest.get("changes", []) if step else []
        return [change | {"step": min(change.get("step", step), step)} for change in changes]

    def is_empty(self) -> bool:
        """Whether the run ended before its first step, so that a new one loses nothing."""
        ended = self.manifest.get("status") in ("failed", "interrupted")
        return ended and not self.final.exists() and not any(self.checkpoints.glob("checkpoint-*"))

    def update(self, **values: Any) -> None:
        """Set values in the manifest and write it; other readers see the old file or the new one, never half of one."""
        if values.get("status") == "running":
            self._before = {}
        self.manifest.update(values, updated=_now())
        if self.is_mine:
            write_atomically(self.manifest_file, json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")


def cannot_be_written(folder: Path, error: OSError) -> ConfigError:
    """The one line for a run folder that cannot be written, with the remedy where it belongs to somebody else."""
    remedy = ""
    if isinstance(error, PermissionError):
        owner, user = MODELS.stat(), f"{os.getuid()}:{os.getgid()}"
        remedy = f": sudo chown -R {user} {MODELS}"
        if "NORDSPARSE_COMMIT" in os.environ:  # in a container
            owners = f"{owner.st_uid}:{owner.st_gid}"
            remedy = f". {MODELS} belongs to {owners}: set CONTAINER_USER={owners}"
    return ConfigError(f"{folder} cannot be written: {error.strerror}{remedy}")


def differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, old value, new value) of every leaf that differs between two configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path, old, new


def git_commit() -> str | None:
    """The checkout's commit, with '+changes' when files differ from it; in an image, that of the checkout it was built
    from. None where neither is known."""
    if built_from := os.environ.get("NORDSPARSE_COMMIT"):
        return built_from if built_from != "unknown" else None
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        return f"{commit}+changes" if changed.strip() else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def lock_hash() -> str:
    """SHA-256 of the requirement files that the packages here were installed from, as in the label of an image."""
    kind = "cpu" if importlib.metadata.version("torch").endswith("+cpu") else "cuda"
    files = [REQUIREMENTS / name for name in ("base.txt", f"torch-{kind}.txt")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def hash_of_model(folder: Path) -> str:
    """The same for two folders that hold the same model, whatever their cards, evaluations and reports say."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if inside.parts[0] not in ("eval", "report") and file.suffix in MODEL_FILES and file.is_file():
            digest.update(str(inside).encode() + bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
