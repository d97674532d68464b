"""Reads folders in BEIR layout: corpus.jsonl, queries[.<split>].jsonl, qrels/<split>.tsv or qrels.<split>.tsv."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from trainer.config import ConfigError
from trainer.data.texts import (
    IDS,
    WITHOUT_TEXT,
    Reading,
    have_text,
    id_of,
    listed,
    passage_text,
    read_lines,
    read_rows,
    text_of,
)

TEXTS = ("text", "contents")
RECORD = (*IDS, "title", *TEXTS)
JUDGEMENT = "expected query-id, corpus-id and a whole number, between tabs, or TREC's four columns"
ADD_OR_REMOVE = "Add it there, or remove this line"


@dataclass(frozen=True)
class SearchSet:
    """Queries to search a corpus with, and how well passages answer them: grades of 1 or more, by query and passage.

    `chooser` holds the queries that choose the checkpoint of a training, which may be the same ones; None: nothing chooses.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, dict[str, int]]
    reading: Reading = field(default_factory=Reading, compare=False)
    split: str = ""
    chooser: "SearchSet | None" = None

    @property
    def also_chooses(self) -> bool:
        """Whether the queries that are reported also choose the checkpoint."""
        return self.chooser is not None and self.chooser.queries == self.queries


class Record(NamedTuple):
    """A passage or a query as it stands in a file."""

    number: int
    id: str
    title: str
    text: str
    language: str = ""  # as a column says it, where that is asked for

    @property
    def passage(self) -> str:
        """The text that is encoded, behind its title."""
        return passage_text(self.title, self.text)


class Files(NamedTuple):
    """What is read of a folder for one split."""

    corpus: Path
    queries: Path
    judgements: Path


# ------------------------------------------------------------------------------------------- the folder
def is_beir(folder: Path) -> bool:
    """Whether a folder holds a corpus in BEIR layout."""
    return bool(_candidates(folder, "corpus.jsonl"))


def corpus_file(folder: Path) -> Path:
    """The file that holds the corpus of such a folder. Raises ConfigError when it is there twice."""
    return _only(folder, "corpus.jsonl")


def has_split(folder: Path, split: str) -> bool:
    """Whether the folder has relevance judgements for a split."""
    return bool(_candidates(folder, *_judgements_of(split)))


def files_of(folder: Path, split: str) -> Files:
    """The files of a split, by BEIR's own names or ours. Raises ConfigError when one is missing, or is there twice."""
    return Files(
        _only(folder, "corpus.jsonl"),
        _only(folder, f"queries.{split}.jsonl", "queries.jsonl"),
        _only(folder, *_judgements_of(split)),
    )


def files_beside(folder: Path, *splits: str) -> list[str]:
    """Names of the folder's other files."""
    read = {file for split in splits for file in files_of(folder, split)}
    found = sorted(file for depth in ("*", "*/*") for file in folder.glob(depth) if file.is_file() and file not in read)
    names = (str(file.relative_to(folder)) for file in found)
    return [name for name in names if not name.startswith(".") and "/." not in name]


def _judgements_of(split: str) -> tuple[str, str]:
    return f"qrels/{split}.tsv", f"qrels.{split}.tsv"


def _candidates(folder: Path, *names: str) -> list[Path]:
    return [file for name in names for file in (folder / name, folder / f"{name}.gz") if file.is_file()]


def _only(folder: Path, *names: str) -> Path:
    found = _candidates(folder, *names)
    if not found:
        raise ConfigError(f"{folder} has no {' or '.join(names)}. It holds: {listed(files_beside(folder))}")
    if len(found) > 1:
        both = " and ".join(str(file.relative_to(folder)) for file in found)
        raise ConfigError(f"{folder} has {both}, which stand for the same. Remove or rename one of them")
    return found[0]


# ------------------------------------------------------------------------------------------- passages and queries
def read_records(file: Path, reading: Reading, language: str | None = None) -> Iterator[Record]:
    """Passages or queries of a .jsonl or .parquet file, one after the other: `_id` or `id`, `text`, perhaps `title`.

    `contents` stands for `text` too. Texts come in NFC; ids as they are, since they are keys.

    language: a column that may say the language of a row.
    """
    for number, row in read_rows(file, (*RECORD, *([language] if language else []))):
        id_column, name = id_of(row, file, number)
        column = next((column for column in TEXTS if column in row), TEXTS[0])
        title = text_of(row, "title", file, number, needed=False) or ""
        text = text_of(row, column, file, number) or ""
        said = text_of(row, language, file, number, needed=False) if language else None
        if others := row.keys() - {id_column, "title", column, language}:
            reading.pass_over("columns", sorted(others))
        yield Record(number, name, reading.compose(title), reading.compose(text), said or "")


def unique(records: Iterable[Record], file: Path) -> Iterator[Record]:
    """The records; ConfigError at the first whose id another has."""
    numbers: dict[str, int] = {}
    for record in records:
        first = numbers.setdefault(record.id, record.number)
        if first != record.number:
            raise ConfigError(
                f"{file}:{record.number}: the id '{record.id}' is also that of {file}:{first}. Give each an id of its own"
            )
        yield record


def read_corpus(folder: Path, reading: Reading) -> dict[str, str]:
    """Passage texts, with their titles, by id."""
    file = corpus_file(folder)
    corpus = {record.id: record.passage for record in unique(read_records(file, reading), file)}
    if not corpus:
        raise ConfigError(f"{file}: no passages")
    return corpus


# ------------------------------------------------------------------------------------------- judgements
def read_search_set(folder: Path, split: str, name: str, corpus: dict[str, str] | None = None) -> SearchSet:
    """Queries, passages and relevance of one split. A relevance of 0 or less counts as not relevant.

    A query belongs to a split when a passage is relevant for it there. corpus: the folder's, when it was read before.
    """
    reading = Reading()
    _, queries_file, judgements_file = files_of(folder, split)
    if corpus is None:
        corpus = read_corpus(folder, reading)
        reading.notes[WITHOUT_TEXT] = _without_text(corpus.values())
    queries = {record.id: record.text for record in unique(read_records(queries_file, reading), queries_file)}
    judged = _read_judgements(judgements_file, queries_file, queries, corpus, reading)
    relevant = {query: {p: grade for p, grade in grades.items() if grade > 0} for query, grades in judged.items()}
    relevant = {query: grades for query, grades in relevant.items() if grades}
    if not relevant:
        raise ConfigError(f"{judgements_file}: no relevant passage for any query. Grades of 1 or more say relevant")
    reading.notes[WITHOUT_TEXT] += _without_text(queries[query] for query in relevant)
    # in a file that splits share, the other queries are theirs
    own = judged if queries_file.name.startswith("queries.jsonl") else queries
    reading.counts["queries without a relevant passage"] = len(own) - len(relevant)
    return SearchSet(name, {query: queries[query] for query in relevant}, corpus, relevant, reading, split)


def _without_text(texts: Iterable[str]) -> int:
    there = have_text(pa.array(texts, pa.large_string()))
    return len(there) - there.true_count


def _read_judgements(
    file: Path, queries_file: Path, queries: dict[str, str], corpus: dict[str, str], reading: Reading
) -> dict[str, dict[str, int]]:
    """Grades by query and passage. A judgement that stands twice counts once; two that differ are an error."""
    judged: dict[str, dict[str, int]] = {}
    for place, (number, query, passage, grade) in enumerate(_judgements(file)):
        if grade is None:  # no number: a header, where it names neither a query nor a passage
            if place > 0 or query in queries or passage in corpus:
                raise ConfigError(f"{file}:{number}: {JUDGEMENT}")
            continue
        if query not in queries:
            raise ConfigError(f"{file}:{number}: query '{query}' is not in {queries_file.name}. {ADD_OR_REMOVE}")
        if passage not in corpus:
            raise ConfigError(f"{file}:{number}: passage '{passage}' is not in corpus.jsonl. {ADD_OR_REMOVE}")
        grades = judged.setdefault(query, {})
        if passage in grades:
            if grades[passage] != grade:
                first = next(n for n, *pair, _ in _judgements(file) if pair == [query, passage])
                raise ConfigError(
                    f"{file}:{number}: passage '{passage}' has grade {grade} for query '{query}', and {grades[passage]} "
                    f"in {file}:{first}. Remove one of them"
                )
            reading.counts["judgements that stand there twice"] += 1
        grades[passage] = grade
    return judged


def _judgements(file: Path) -> Iterator[tuple[int, str, str, int | None]]:
    """Line, query, passage and grade (None: no number) of three columns between tabs, or of TREC's four."""
    for number, line in read_lines(file):
        if not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if len(fields) != 4 and (len(fields) != 3 or "\t" not in line):
            raise ConfigError(f"{file}:{number}: {JUDGEMENT}")
        is_grade = re.fullmatch(r"\s*-?[0-9]{1,9}(\.0+)?\s*", fields[-1])
        yield number, fields[0], fields[-2], int(float(fields[-1])) if is_grade else None
