"""Downloads from the Hugging Face hub, with one clear line when it cannot be reached."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config import ConfigError, is_commit, is_local, one_line
from trainer.system.progress_bar import ProgressReport, in_columns

# Weights once (safetensors, or the older .bin), the tokenizer, the code; no ONNX, TensorFlow or Flax copies.
MODEL_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.safetensors",
    "*/*.safetensors",
    "pytorch_model*.bin",
    "*.py",
    "*/*.json",
]
# What says which code a model brings, and the code.
CODE_FILES = ["*.json", "*.py"]
Kind = Literal["model", "dataset"]


class HubUnreachable(ConfigError):
    """A repository that is neither in the cache nor to be had now."""


@dataclass(frozen=True)
class Snapshot:
    """A repository's files in a local folder. `commit` is None for a folder the user pointed at."""

    source: str
    folder: Path
    commit: str | None


def fetch(
    source: str,
    revision: str | None,
    *,
    kind: Kind,
    why: str,
    key: str,
    patterns: list[str] = MODEL_FILES,
) -> Snapshot:
    """The files of a hub repository (or of the local folder that `source` names); of a model, those that fit the patterns.

    A copy in the Hugging Face cache is used when the hub cannot be reached. `why` and `key` go into the error: what the
    repository is needed for, and which config key to point at a local copy.
    """
    if is_local(source):
        folder = Path(source).expanduser()
        if not folder.exists():
            hint = "" if "/" in source else "; a hub repository is written owner/name"
            raise ConfigError(f"{key}: there is no file or folder {source} ({why}){hint}")
        return Snapshot(source, folder, None)

    from huggingface_hub import snapshot_download

    with _one_line_per_error(source, revision, kind, why, key):
        downloaded = snapshot_download(
            source,
            repo_type=kind,
            revision=revision,
            allow_patterns=patterns if kind == "model" else None,
            tqdm_class=bytes_of(source),
        )
    folder = Path(downloaded)
    return Snapshot(source, folder, folder.name)


def newest_commit(source: str, revision: str, *, kind: Kind, why: str, key: str) -> str:
    """The commit that a branch or tag of a hub repository stands for now. The hub is asked, never the cache."""
    from huggingface_hub import HfApi

    with _one_line_per_error(source, revision, kind, why, key):
        commit = HfApi().repo_info(source, repo_type=kind, revision=revision, timeout=30).sha
    if not is_commit(commit):
        raise ConfigError(f"{key}: the hub names no commit for {source} at {revision} ({why})")
    return str(commit)


@contextlib.contextmanager
def _one_line_per_error(source: str, revision: str | None, kind: Kind, why: str, key: str) -> Iterator[None]:
    """Raise ConfigError for what the hub or the way to it refuses; HubUnreachable when there is no way."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{key}: the {kind} repository {source} has no revision {revision} ({why})") from None
    except errors.GatedRepoError:
        raise ConfigError(
            f"{key}: {source} ({why}) asks you to accept its terms on the hub first; then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{key}: the hub has no {kind} repository {source} that you may read ({why}). Check the name, or set HF_TOKEN"
        ) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    except _connection_errors() as error:
        reason = one_line(error, 120).rstrip(".")
        at = f" --revision {revision}" if revision else ""
        repo_type = " --repo-type dataset" if kind == "dataset" else ""
        raise HubUnreachable(
            f"cannot download {source} ({why}): {reason}. "
            f"Fetch it where the hub is reachable (hf download {source}{repo_type}{at} --local-dir DIR) "
            f"and set {key}=DIR"
        ) from None


def bytes_of(source: str) -> type[ProgressReport]:
    """The library's bars as one, of the bytes from the network, under the repository's name."""
    shown: list[ProgressReport] = []

    class Fetching(ProgressReport):
        def __init__(self, *args: Any, desc: str | None = None, unit: str = "it", **options: Any) -> None:
            name = in_columns("fetching", source, 11)
            super().__init__(*args, desc=name, unit=unit, disable=unit != "B" or bool(shown), **options)
            shown.extend([self] * (unit == "B"))

        def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """The name stays."""

        set_description = set_description_str

    return Fetching


def why_unreachable(dataset: str) -> str | None:
    """Why a data set repository cannot be had from the hub now, or None when it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, timeout=10)
    except _connection_errors() as error:
        return one_line(error, 120) or type(error).__name__
    return None


def _connection_errors() -> tuple[type[Exception], ...]:
    import httpx2  # what huggingface_hub speaks to the hub with
    from huggingface_hub import errors

    return (OSError, httpx2.HTTPError, errors.OfflineModeIsEnabled)
