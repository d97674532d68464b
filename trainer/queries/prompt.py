"""The prompt: a text file with placeholders, which a user may replace by one of their own."""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from trainer.config import ConfigError, did_you_mean
from trainer.hub.cache import digest
from trainer.queries.language import NAMES
from trainer.queries.passages import Passage

NEEDED = ("passage", "language", "questions", "keywords")
ALLOWED = (*NEEDED, "title")
# {"questions": …} of the JSON that is asked for is none: a quotation mark follows its brace.
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """A text with {passage}, {title}, {language}, {questions} and {keywords} in it, and how many queries it asks for."""

    name: str
    text: str
    questions: int
    keywords: int

    @classmethod
    def read(cls, file: Path | None, questions: int, keywords: int) -> "Prompt":
        """The prompt of a file, or the one that comes with the project. ConfigError for what is wrong in it."""
        name = str(file) if file else "the project's own"
        try:
            text = (file or files("trainer.queries") / "prompt.txt").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text in UTF-8"
            raise ConfigError(f"--prompt {file}: cannot be read: {reason}") from None
        found = PLACEHOLDER.findall(text)
        for word in found:
            if word not in ALLOWED:
                raise ConfigError(f"{name}: unknown placeholder {{{word}}}.{did_you_mean(word, ALLOWED)}")
        if missing := [f"{{{word}}}" for word in NEEDED if word not in found]:
            raise ConfigError(f"{name}: the placeholder {' and '.join(missing)} is missing. Add it to the prompt")
        return cls(name, text, questions, keywords)

    @property
    def sha256(self) -> str:
        """What tells this text from another."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, passage: Passage) -> str:
        """What the model is asked about a passage. Braces in the passage stay as they are."""
        values = {
            "passage": passage.text,
            "title": passage.title,
            "language": NAMES[passage.language],
            "questions": str(self.questions),
            "keywords": str(self.keywords),
        }
        return PLACEHOLDER.sub(lambda found: values[found[1]], self.text)

    def key(self, passage: Passage, model: str) -> str:
        """Names one question to one model in the journal: other words of the passage or the prompt give another key."""
        return digest(model, self.fill(passage))
