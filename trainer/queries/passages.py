"""The corpus, and the passages of it that are asked about, each with its language."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.config import ConfigError
from trainer.data.beir import Record, corpus_file, is_beir, read_records, unique
from trainer.data.texts import Reading, passage_text
from trainer.queries.language import CODES, ENGLISH, NAMES, tell
from trainer.system.progress_bar import ProgressReport, in_columns

LANGUAGE = "language"  # the column
# Why a passage is passed over.
SHORT, COPY, OTHER, UNTOLD = (
    "shorter than {shortest} words",
    "with the text of another",
    "in another language than bokmål, nynorsk, Danish or Swedish",
    "whose language cannot be told (--language says it for all)",
)


@dataclass(frozen=True)
class Passage:
    """A passage to ask about."""

    number: int  # in the corpus
    id: str
    title: str
    text: str
    language: str  # nb, nn, da or sv

    @property
    def full(self) -> str:
        """The text that is searched, behind its title."""
        return passage_text(self.title, self.text)


@dataclass(frozen=True)
class Corpus:
    """All passages of a file or a folder."""

    source: Path
    records: list[Record]
    reading: Reading


@dataclass
class Chosen:
    """The passages to ask about, in the order of the corpus, and what was passed over on the way."""

    passages: list[Passage]
    passed_over: Counter[str] = field(default_factory=Counter)
    languages_from: Counter[str] = field(default_factory=Counter)


def read_corpus(source: Path) -> Corpus:
    """A .jsonl, .jsonl.gz or .parquet file, or a folder in BEIR layout. Raises ConfigError for what is wrong in it."""
    if source.is_dir():
        if not is_beir(source):
            raise ConfigError(
                f"{source} is a folder without a corpus.jsonl. Name a .jsonl or .parquet file, or a BEIR folder"
            )
        source = corpus_file(source)
    elif not source.exists():
        raise ConfigError(f"there is no file or folder {source}. CORPUS is a .jsonl or .parquet file, or a BEIR folder")
    reading = Reading()
    rows = unique(read_records(source, reading, language=LANGUAGE), source)
    with ProgressReport(rows, desc=in_columns("reading", source.name), unit="passages") as progress:
        records = list(progress)
    if not records:
        raise ConfigError(f"{source}: no passages")
    for record in records:
        if any(mark in record.id for mark in "\t\r\n"):  # qrels have ids between tabs
            raise ConfigError(
                f"{source}:{record.number}: the id {record.id!r} has a tab or a line break. Write it without"
            )
    return Corpus(source, records, reading)


def parse_language(code: str | None) -> tuple[str, ...] | None:
    """The languages that --language allows: one, or for `no` both written forms of Norwegian."""
    if code is None:
        return None
    if code.lower() not in CODES:
        raise ConfigError(f"--language {code}: it is one of {', '.join(NAMES)}, or no for bokmål and nynorsk together")
    return CODES[code.lower()]


def choose(corpus: Corpus, count: int | None, seed: int, shortest: int, language: str | None) -> Chosen:
    """All passages that can be asked about, or a random sample of them. A larger sample holds the smaller one.

    Args:
        shortest: words that a passage has at least.
        language: of all passages, in place of their column and of what is told by their words.
    """
    chosen, seen = Chosen([]), set()
    for number in np.random.default_rng(seed).permutation(len(corpus.records)).tolist():
        if len(chosen.passages) == count:
            break
        record = corpus.records[number]
        if len(record.text.split()) < shortest:
            chosen.passed_over[SHORT.format(shortest=shortest)] += 1
        elif record.passage in seen:
            chosen.passed_over[COPY] += 1
        elif (told := _language_of(record, language, chosen)) is not None:
            seen.add(record.passage)
            chosen.passages.append(Passage(number, record.id, record.title, record.text, told))
    chosen.passages.sort(key=lambda passage: passage.number)
    return chosen


def _language_of(record: Record, given: str | None, chosen: Chosen) -> str | None:
    said = given or record.language.strip()
    if said and said.lower() not in CODES:
        chosen.passed_over[OTHER] += 1
        return None
    among = CODES[said.lower()] if said else (*NAMES, ENGLISH)
    told = among[0] if len(among) == 1 else tell(record.passage, among)
    if told == ENGLISH or told is None:
        chosen.passed_over[OTHER if told else UNTOLD] += 1
        return None
    source = "by its words" if len(among) > 1 else "by --language" if given else f"by the column {LANGUAGE}"
    chosen.languages_from[source] += 1
    return told


def language_words(chosen: Chosen) -> Iterator[str]:
    """For the summary: passages per language, and who said so."""
    count = Counter(passage.language for passage in chosen.passages)
    yield ", ".join(f"{language} {count[language]:,}" for language in NAMES if count[language])
    yield ", ".join(f"{number:,} {source}" for source, number in chosen.languages_from.items())
