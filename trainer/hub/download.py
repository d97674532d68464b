"""Downloads from the Hugging Face hub, with one clear line when it cannot be reached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config import ConfigError, is_local, one_line
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
    kind: Literal["model", "dataset"],
    why: str,
    key: str,
) -> Snapshot:
    """The files of a hub repository (or of the local folder that `source` names); of a model, MODEL_FILES.

    A copy in the Hugging Face cache is used when the hub cannot be reached. `why` and `key` go into the error: what the
    repository is needed for, and which config key to point at a local copy.
    """
    if is_local(source):
        folder = Path(source).expanduser()
        if not folder.exists():
            hint = "" if "/" in source else "; a hub repository is written owner/name"
            raise ConfigError(f"{key}: there is no file or folder {source} ({why}){hint}")
        return Snapshot(source, folder, None)

    from huggingface_hub import errors, snapshot_download

    try:
        downloaded = snapshot_download(
            source,
            repo_type=kind,
            revision=revision,
            allow_patterns=MODEL_FILES if kind == "model" else None,
            tqdm_class=bytes_of(source),
        )
        folder = Path(downloaded)
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
    return Snapshot(source, folder, folder.name)


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
