"""Every answer as soon as it is there, in a file that a killed run leaves and the next one goes on with."""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from trainer.config import ConfigError
from trainer.queries.endpoint import Answer

NAME = "answers.jsonl"


@dataclass(frozen=True)
class Tokens:
    """What was asked and answered, in tokens; `uncounted`: answers whose tokens the endpoint did not say."""

    read: int = 0
    written: int = 0
    uncounted: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.read + self.written


class Journal:
    """Answers by the key of their question. Those of other models and prompts stay in the file and are not looked at."""

    def __init__(self, folder: Path, model: str) -> None:
        """Read what is there. A last line that a kill cut off is removed; ConfigError for any other that is damaged."""
        self.file, self.model = folder / NAME, model
        self.answers: dict[str, Answer] = {}
        self.tokens = Tokens()
        self._lock = threading.Lock()
        for key, asked, answer in self._lines():
            self.answers[key] = answer
            if asked == model:
                self._count(answer)
        try:
            self._out = self.file.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"{self.file} cannot be written: {error.strerror}") from None

    def add(self, key: str, passage: str, answer: Answer) -> None:
        """Keep an answer, from any thread. It is in the file when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"key": key, "passage": passage, "model": self.model, **asdict(answer), "at": now}
        line = (json.dumps(row, ensure_ascii=True) + "\n").encode()
        with self._lock:
            try:
                if self._out.write(line) != len(line):
                    raise OSError(0, "the disk is full")
            except OSError as error:
                raise ConfigError(f"{self.file} cannot be written: {error.strerror}. Then run it again") from None
            self.answers[key] = answer
            self._count(answer)

    def close(self) -> None:
        """End with the lines on the disk."""
        os.fsync(self._out.fileno())
        self._out.close()

    def _count(self, answer: Answer) -> None:
        before, counts = self.tokens, (answer.tokens_in, answer.tokens_out)
        uncounted = before.uncounted + (None in counts)
        self.tokens = Tokens(before.read + (counts[0] or 0), before.written + (counts[1] or 0), uncounted)

    def _lines(self) -> Iterator[tuple[str, str, Answer]]:
        if not self.file.exists():
            return
        try:
            content = self.file.read_bytes()
            if torn := len(content) - (content.rfind(b"\n") + 1):
                os.truncate(self.file, len(content) - torn)
        except OSError as error:
            raise ConfigError(f"{self.file} cannot be read: {error.strerror}") from None
        for number, line in enumerate(content[: len(content) - torn].splitlines(), 1):
            try:
                row = json.loads(line)
                yield row["key"], row["model"], Answer(row["text"], row["tokens_in"], row["tokens_out"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.file}:{number}: not an answer that was kept here. Remove the line") from None
