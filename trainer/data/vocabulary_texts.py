"""Reads the corpora of `model.vocabulary_texts`, whose pieces a base model's vocabulary is cut to."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.config import ConfigError
from trainer.data.beir import RECORD, TEXTS, is_beir, read_corpus
from trainer.data.texts import IDS, Reading, is_json_lines, passage_text, read_rows, text_of

KEY = "model.vocabulary_texts"


def read_vocabulary_texts(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts of all corpora, titles in front, and what the plan says of what was not read. Raises ConfigError."""
    texts: list[str] = []
    lines: list[str] = []
    for source in sources:
        reading = Reading()
        found = [text for text in _texts_of(Path(source).expanduser(), reading) if text]
        if not found:
            raise ConfigError(f"{KEY}: {source} has no text in it. Remove it, or name another")
        texts += found
        lines += [f"{source}: {line}" for line in reading.lines()]
    return texts, lines


def _texts_of(source: Path, reading: Reading) -> Iterator[str]:
    if is_beir(source):
        yield from read_corpus(source, reading).values()
    elif source.is_file() and (is_json_lines(source) or source.suffix == ".parquet"):
        for number, row in read_rows(source, RECORD):
            column = next((column for column in TEXTS if column in row), TEXTS[0])
            title, text = text_of(row, "title", source, number, needed=False), text_of(row, column, source, number)
            reading.pass_over("columns", sorted(row.keys() - {*IDS, "title", column}))
            yield reading.compose(passage_text(title, text or ""))
    else:
        raise ConfigError(f"{KEY}: {source} is neither a folder with a corpus.jsonl nor a .jsonl or .parquet file")
