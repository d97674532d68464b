"""Checks each query: its text, its language, whether it is copied, whether it stands there twice."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from trainer.config.errors import printable
from trainer.queries.answers import UNREADABLE, read_answer
from trainer.queries.journal import Journal
from trainer.queries.language import LEAD, LEAD_OF_QUESTION, is_other
from trainer.queries.passages import Passage

# Words and characters of the longest query. The longest of NorQuAD's and SweQUAD's 4,758 questions has 31 words.
LONGEST = {"question": (40, 300), "keywords": (12, 120)}
# Words in a row that a query and its passage may not share.
COPIED = 8
# A run of fewer words is no sentence that was copied, though it may be most of a short one.
SHORTEST_SENTENCE = 5
MOST = 0.6  # of a sentence

NO_TEXT, EMPTY, LONG, SURPLUS = (
    "not text, or with control characters",
    "without a word",
    "too long",
    "more than were asked for",
)
LANGUAGE, COPY, TWICE, LOST = (
    "another language",
    "copied from the passage",
    "the same as another",
    "passage not found again",
)


@dataclass(frozen=True)
class Query:
    """A query, and the passage that it was written for."""

    passage: Passage
    kind: str
    number: int
    text: str

    @property
    def id(self) -> str:
        """The passage's id, with the first letter of the kind and a number."""
        return f"{self.passage.id}-{self.kind[0]}{self.number}"


@dataclass(frozen=True)
class Refused:
    """What was not kept, and why."""

    passage: Passage
    kind: str
    text: Any
    reason: str


def candidates(
    passages: list[Passage], key_of: Callable[[Passage], str], journal: Journal, wanted: dict[str, int]
) -> Iterator[Query | Refused]:
    """Every query of every answer, in the order of the passages: those that pass the checks of the text, or why not."""
    seen: set[str] = set()
    for passage in passages:
        answer = journal.answers.get(key_of(passage))
        if answer is None:
            continue
        read = read_answer(answer.text)
        if read is None:
            yield Refused(passage, "answer", answer.text[:1000], UNREADABLE)
            continue
        counts: dict[str, int] = defaultdict(int)
        for kind, text in read:
            counts[kind] += 1
            clean = normalize("NFC", " ".join(text.split())) if isinstance(text, str) else text
            if counts[kind] > wanted[kind]:
                reason: str | None = SURPLUS
            else:
                reason = fault(clean, kind, passage) or (TWICE if _folded(clean) in seen else None)
            if reason:
                yield Refused(passage, kind, clean, reason)
            else:
                seen.add(_folded(clean))
                yield Query(passage, kind, counts[kind], clean)


def fault(text: Any, kind: str, passage: Passage) -> str | None:
    """What is wrong with a query by itself; None for nothing."""
    if not isinstance(text, str) or text != printable(text):  # a terminal would obey it, or no file can hold it
        return NO_TEXT
    words = words_of(text)
    most_words, most_characters = LONGEST[kind]
    if not any(any(map(str.isalpha, word)) for word in words):
        return EMPTY
    if len(words) > most_words or len(text) > most_characters:
        return LONG
    if is_other(text, passage.language, LEAD_OF_QUESTION if kind == "question" else LEAD):
        return LANGUAGE
    return COPY if is_copied(text, passage) else None


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"\w+", text.lower())


def _folded(text: str) -> str:
    return " ".join(words_of(text))


def is_copied(text: str, passage: Passage) -> bool:
    """Whether a query shares COPIED words in a row with its passage, or most of one of its sentences."""
    query = words_of(text)
    if longest_run(query, words_of(passage.full)) >= COPIED:
        return True
    for sentence in re.split(r"(?<=[.!?:])\s+|\n+", passage.text):
        words = words_of(sentence)
        run = longest_run(query, words)
        if run >= SHORTEST_SENTENCE and run >= MOST * len(words):
            return True
    return False


def longest_run(one: list[str], other: list[str]) -> int:
    """The most words in a row that two texts share."""
    best, before = 0, Counter[int]()
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(other):
        places[word].append(place)
    for word in one:
        now = Counter[int]()
        for place in places.get(word, ()):
            now[place] = before[place - 1] + 1
            best = max(best, now[place])
        before = now
    return best
