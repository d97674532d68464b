"""Reads JSON lines, and folders in BEIR layout: corpus.jsonl, queries.<split>.jsonl, qrels.<split>.tsv."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import ConfigError, one_line


@dataclass(frozen=True)
class SearchSet:
    """Queries to search a corpus with, and how well passages answer them: grades of 1 or more, by query and passage."""

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, dict[str, int]]


def read_json_lines(file: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of each line; raises ConfigError with file:line."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{file}:{number}: not JSON: {error.msg}") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
                    raise ConfigError(f"{file}:{number}: JSON that cannot be read: {one_line(error, 60)}") from None
                if not isinstance(row, dict):
                    raise ConfigError(f'{file}:{number}: a line must be an object, {{"column": "text", …}}')
                yield number, row
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not text in UTF-8 (byte {error.start})") from None


def text_of(row: dict, column: str, file: Path, number: int, *, needed: bool = True) -> str | None:
    """A column's text; raises ConfigError when the column is not there or holds something else."""
    if column not in row:
        if not needed:
            return None
        raise ConfigError(f"{file}:{number}: there is no column '{column}'. The line has: {', '.join(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{file}:{number}: column '{column}' holds {json.dumps(value)[:40]}, not text")
    if value and not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(
            f"{file}:{number}: column '{column}' holds half a character (a lone surrogate \\ud800-\\udfff)"
        )
    return value


def is_beir(folder: Path) -> bool:
    """Whether a folder holds a corpus in BEIR layout."""
    return (folder / "corpus.jsonl").is_file()


def has_split(folder: Path, split: str) -> bool:
    """Whether the folder has relevance judgements for a split."""
    return (folder / f"qrels.{split}.tsv").is_file()


def passage_text(title: str | None, text: str) -> str:
    """What of a passage is read: its title in front of its text, as in BEIR."""
    return f"{title or ''} {text}".strip()


def read_corpus(folder: Path) -> dict[str, str]:
    """Passage texts, with their titles, by id."""
    file = folder / "corpus.jsonl"
    corpus = {}
    for number, row in read_json_lines(file):
        title = text_of(row, "title", file, number, needed=False)
        text = text_of(row, "text", file, number) or ""
        corpus[_id_of(row, file, number)] = passage_text(title, text)
    if not corpus:
        raise ConfigError(f"{file}: no passages")
    return corpus


def read_search_set(folder: Path, split: str, name: str) -> SearchSet:
    """Queries, passages and relevance of one split. A relevance of 0 or less counts as not relevant."""
    corpus = read_corpus(folder)
    file = folder / f"queries.{split}.jsonl"
    queries = {_id_of(row, file, n): text_of(row, "text", file, n) or "" for n, row in read_json_lines(file)}
    relevant: dict[str, dict[str, int]] = {}
    file = folder / f"qrels.{split}.tsv"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not text in UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines[1:], 2):
        query, _, rest = line.partition("\t")
        passage, _, score = rest.partition("\t")
        if not re.fullmatch(r"\s*-?[0-9]+\s*", score):
            raise ConfigError(f"{file}:{number}: expected query-id, corpus-id and a whole number, between tabs")
        if query not in queries:
            raise ConfigError(f"{file}:{number}: query '{query}' is not in queries.{split}.jsonl")
        if passage not in corpus:
            raise ConfigError(f"{file}:{number}: passage '{passage}' is not in corpus.jsonl")
        if int(score) > 0:
            relevant.setdefault(query, {})[passage] = int(score)
    if not relevant:
        raise ConfigError(f"{file}: no relevant passage for any query")
    return SearchSet(name, {query: queries[query] for query in relevant}, corpus, relevant)


def _id_of(row: dict, file: Path, number: int) -> str:
    if "_id" not in row:
        raise ConfigError(f"{file}:{number}: there is no '_id'. The line has: {', '.join(row)}")
    return str(row["_id"])
