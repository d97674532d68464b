"""What is asked for on the command line, checked before anything is read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config import ConfigError
from trainer.config.schema import DatasetsConfig
from trainer.queries.ask import Limits
from trainer.queries.endpoint import Patience
from trainer.queries.journal import NAME as JOURNAL
from trainer.queries.passages import parse_language


@dataclass(frozen=True)
class Request:
    """The settings of one run."""

    corpus: Path
    llm: str
    model: str
    echo: Callable[[str], None]
    output: Path | None = None
    prompt: Path | None = None
    language: str | None = None
    passages: int | None = None
    seed: int = 42
    questions: int = 3
    keywords: int = 2
    shortest: int = 10
    found_in: int = 10
    dense: str | None = None
    dense_revision: str | None = None
    dev_share: float = 0.1
    concurrency: int = 4
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        for name, option in (("corpus", "CORPUS"), ("llm", "LLM"), ("model", "MODEL")):
            if str(getattr(self, name)) in ("", "."):
                example = "make queries CORPUS=pages.jsonl LLM=http://localhost:11434/v1 MODEL=gemma3"
                raise ConfigError(f"{option} is not given: {example}")
        parse_language(self.language)
        if not self.questions + self.keywords:
            raise ConfigError("--questions 0 --keywords 0 asks for nothing")
        if self.dense_revision and not self.dense:
            raise ConfigError("--dense-revision is for --dense, a model on the hub")

    @property
    def name(self) -> str:
        """What the data set is called: the corpus' name, as a key in a config."""
        stem = self.corpus.name.split(".")[0] if not self.corpus.is_dir() else self.corpus.resolve().name
        name = re.sub(r"\W+", "_", stem).strip("_").lower() or "corpus"
        return f"my_{name}" if name in DatasetsConfig.model_fields or name[0].isdigit() else name

    @property
    def folder(self) -> Path:
        """Where it is written. ConfigError for a folder that holds something else, which would be lost."""
        folder = self.output or Path("models") / "queries" / self.name
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file. Say another --output")
        if (folder / "corpus.jsonl").exists() and not (folder / JOURNAL).exists():
            raise ConfigError(f"{folder} holds a corpus already, which did not come from here. Say another --output")
        return folder
