"""What a user asks to be exported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.export.corpus import Shard
from trainer.runs.run import Run


@dataclass(frozen=True)
class Request:
    """A finished run, what to encode with it, and where to. A format takes what it needs."""

    run: Run
    corpus: Path | None
    queries: Path | None
    output: Path | None
    shard: Shard
    scale: int | None  # of whole numbers; None has it chosen
    echo: Callable[[str], None]
    long_documents: str | None = None  # cut or windows; None: as the run's config says

    @property
    def in_windows(self) -> bool:
        """Whether documents longer than the model reads are read in windows."""
        return (self.long_documents or self.run.config().model.long_documents) == "windows"

    def folder(self, to: str) -> Path:
        """Where the files go."""
        return self.output or self.run.folder / "export" / to
