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

    def folder(self, to: str) -> Path:
        """Where the files go."""
        return self.output or self.run.folder / "export" / to
