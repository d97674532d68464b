"""Writes the folder in BEIR layout, and beside it what was refused and how all of it came to be."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.hub.cache import digest
from trainer.queries.check import Query, Refused
from trainer.queries.passages import Corpus
from trainer.system.files import write_json, written_whole

SPLITS = ("train", "dev")
REFUSED, MANIFEST = "refused.jsonl", "queries.json"


def divide(queries: list[Query], dev_share: float, seed: int) -> dict[str, list[Query]]:
    """Queries by split. A passage is in one of them alone, and stays there when further passages are asked about.

    At least one passage is held out where a share is wanted and there are two.
    """
    places = {query.passage.id: _place(query.passage.full, seed) for query in queries}
    held_out = {passage for passage, place in places.items() if place < dev_share}
    if dev_share and not held_out and len(places) > 1:
        held_out = {min(places, key=lambda passage: places[passage])}
    if len(held_out) == len(places) > 1:
        held_out.remove(max(places, key=lambda passage: places[passage]))
    return {
        split: [query for query in queries if (query.passage.id in held_out) == (split == "dev")] for split in SPLITS
    }


def _place(text: str, seed: int) -> float:
    """A number from 0 to 1 that a text always has."""
    return int(digest(str(seed), text), 16) / 16**32


def write_folder(
    folder: Path, corpus: Corpus, splits: dict[str, list[Query]], refused: list[Refused], manifest: dict[str, Any]
) -> None:
    """corpus.jsonl, queries.jsonl, qrels, refused.jsonl and the manifest, each whole or not at all."""
    records = corpus.records
    try:
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        _lines(folder / "corpus.jsonl", ({"_id": r.id, "title": r.title, "text": r.text} for r in records))
        those = (query for split in SPLITS for query in splits[split])
        _lines(folder / "queries.jsonl", ({"_id": query.id, "text": query.text} for query in those))
        for split in SPLITS:
            _judgements(folder / "qrels" / f"{split}.tsv", splits[split])
        rows = ({"passage": r.passage.id, "kind": r.kind, "text": r.text, "reason": r.reason} for r in refused)
        _lines(folder / REFUSED, rows)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    write_json(folder / MANIFEST, manifest)


def _lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with written_whole(file) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _judgements(file: Path, queries: list[Query]) -> None:
    if not queries:  # a file without judgements could not be read
        file.unlink(missing_ok=True)
        return
    with written_whole(file) as aside, aside.open("w", encoding="utf-8") as out:
        out.write("query-id\tcorpus-id\tscore\n")
        out.writelines(f"{query.id}\t{query.passage.id}\t1\n" for query in queries)
