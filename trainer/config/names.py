"""What a config names: keys, files, repositories of the hub and their revisions."""

import os
import re
from collections.abc import Iterator

from trainer.config.tree import Path_

Contradiction = tuple[Path_, str]  # the key to change, and what is wrong with it: the text that follows its name

FILE_ENDINGS = (".jsonl", ".json", ".parquet")


def is_local(source: str) -> bool:
    """Whether a source names files rather than a hub repository (owner/name)."""
    return (
        exists(source)
        or source.startswith((".", "/", "~"))
        or source.endswith(FILE_ENDINGS)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    )


def exists(name: str) -> bool:
    """Whether there is such a file or folder."""
    return os.path.exists(name)  # noqa: PTH110 Path.exists raises for a name that is too long


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which cannot move."""
    return bool(revision and re.fullmatch(r"[0-9a-f]{40}", revision))


def missing_revision(path: Path_, source: str, revision: str | None) -> Iterator[Contradiction]:
    """A repository is named with its revision. path: of the key that names it."""
    if not is_local(source) and revision is None:
        yield path, f"is the repository {source}, which needs '{dotted((*path[:-1], 'revision'))}' (a commit is best)"


def dotted(path: Path_) -> str:
    """A key as messages write it."""
    return ".".join(map(str, path))
