"""Uploads a folder to the Hugging Face hub in one commit, with one clear line for what can go wrong."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config import ConfigError, one_line
from trainer.system.progress_bar import going_on, in_columns


def access_tokens() -> list[str]:
    """The values that must be in no file: of the environment, and of a login."""
    from huggingface_hub import get_token

    tokens = {get_token(), *map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))}
    return sorted(token for token in tokens if token)


def require_repo_name(repo: str) -> None:
    """Raise ConfigError unless it is `owner/name`, as the hub writes it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not repo:
        raise ConfigError("say where to upload to: REPO=owner/name (--repo)")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo {repo}: {one_line(error)}") from None
    if "/" not in repo:
        raise ConfigError(f"--repo {repo}: a repository is written owner/name")


def require_token(repo: str) -> None:
    """Raise ConfigError when there is no access token to upload with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(
            f"there is no access token for {repo}. Set HF_TOKEN to one that may write there, or run: hf auth login"
        )


def upload(files: dict[str, Path], repo: str, *, public: bool, message: str, echo: Callable[[str], None]) -> str:
    """Make the repository hold these files and nothing else, in one commit; its address and commit.

    Raises ConfigError, one line, for what the user can mend. Until the commit, the revision before is what others get.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import enable_progress_bars

    require_token(repo)
    if sys.stderr.isatty():  # gigabytes take their time
        enable_progress_bars()
    api = HfApi()
    with explained(repo, "nothing was uploaded"):
        api.create_repo(repo, private=not public, exist_ok=True)
        before = api.model_info(repo)
    if not public and not before.private:
        raise ConfigError(
            f"{repo} is public, so nothing was uploaded. To upload to it all the same: PUBLIC=1 (--public)"
        )
    held = (before.sha or "an empty one")[:12]
    again = f"the revision before, {held}, is in place: a commit arrives whole or not at all. To go on, run this again"
    stale = sorted({file.rfilename for file in before.siblings or ()} - files.keys() - {".gitattributes"})
    if stale:
        echo(f"removing  what the revision before had besides: {', '.join(stale)}")
    # upload_folder would split a large folder into several commits, and others would see halves of two models.
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in stale),
        *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
    ]
    echo(f"uploading {len(files)} files to {repo} ({'public' if public else 'private'}), in one commit")
    progress = contextlib.nullcontext() if sys.stderr.isatty() else going_on(in_columns("uploading", repo, 11))
    with explained(repo, again), progress:
        commit = api.create_commit(repo, operations, commit_message=message, parent_commit=before.sha)
    if public and before.private:
        with explained(repo, "the files have arrived, but only you can see them: open the repository in its settings"):
            api.update_repo_settings(repo, private=False)
    return f"{api.endpoint}/{repo} at {commit.oid}"


@contextlib.contextmanager
def explained(repo: str, state: str) -> Iterator[None]:
    """One line for what the hub or the way to it refuses; `state` says what the repository holds now."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ConfigError(f"HF_HUB_OFFLINE is set, so the hub is not asked for {repo}. Unset it to upload") from None
    except (OSError, httpx2.HTTPError, RuntimeError, ValueError) as error:
        if (cause := _cause_of(error)) is None:
            raise
        response = getattr(cause, "response", None)
        reason = _refusal(response.status_code, repo) if response is not None else _broken(cause, repo)
        raise ConfigError(f"{reason}. {state[0].upper()}{state[1:]}") from None
    except KeyboardInterrupt:
        raise ConfigError(f"interrupted. {state[0].upper()}{state[1:]}") from None


def _cause_of(error: BaseException | None) -> BaseException | None:
    """The hub's reply or the broken connection behind an error: huggingface_hub wraps those of single files."""
    import httpx2

    while error is not None and not isinstance(error, (httpx2.HTTPError, OSError)):
        error = error.__cause__ or error.__context__
    return error


def _refusal(status: int, repo: str) -> str:
    overtaken = f"somebody else changed {repo} in the meantime ({status})"
    known = {
        401: "the hub does not know the access token (401). Set HF_TOKEN to a valid one, or run: hf auth login --force",
        403: f"the access token may not write to {repo} (403). Use one with write access to {repo.partition('/')[0]}",
        404: f"there is no model repository {repo} that the access token may see (404): the name may be taken by "
        "something else. Choose another, or use a token of its owner",
        409: overtaken,
        412: overtaken,
        429: "the hub asks to wait, there were too many requests (429)",
    }
    return known.get(status, f"the hub answered {status} for {repo}")


def _broken(error: BaseException, repo: str) -> str:
    reason = one_line(error, 120).rstrip(".") or type(error).__name__
    return f"the way to the hub broke off while uploading to {repo} ({reason})"
