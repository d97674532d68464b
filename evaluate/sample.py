"""A sample of the tasks' queries and passages, for measurements that do not need all of them."""

import random
from dataclasses import dataclass
from typing import Any

from mteb.abstasks import AbsTaskRetrieval

from evaluate.search import language_of
from evaluate.tasks import load
from trainer.data.texts import passage_text
from trainer.runs.choice import hash_of, rules_of

# Enough for percentiles, few enough for minutes on a CPU.
MAX_QUERIES, MAX_PASSAGES = 1_000, 2_000


@dataclass(frozen=True)
class Sample:
    """Texts and relevance by id; `language` is an ISO 639-3 code, or None when there are several or it is not known."""

    queries: dict[str, str]
    passages: dict[str, str]
    relevant: dict[str, dict[str, int]]
    language: str | None

    @staticmethod
    def part_of(text_id: str) -> str:
        """Task, split and subset of a text."""
        return "/".join(text_id.split("/", 3)[:3])


def sample_texts(tasks: list[AbsTaskRetrieval], manifest: dict[str, Any] | None = None) -> Sample:
    """Queries at random over all tasks, the passages that are relevant for them, and others at random; always the same."""
    queries: dict[str, str] = {}
    passages: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    languages, rules = set(), rules_of(manifest or {})
    for task in tasks:
        for subset, splits in load(task).items():
            languages.add(language_of(task.metadata, subset))
            for split, data in splits.items():
                mark = f"{task.metadata.name}/{split}/{subset}/"
                queries |= {mark + row["id"]: row["text"] for row in data["queries"]}
                passages |= {mark + row["id"]: passage_text(row.get("title"), row["text"]) for row in data["corpus"]}
                for query, judged in data["relevant_docs"].items():
                    # search is not measured on queries that chose the checkpoint
                    if rules.get(hash_of(queries.get(mark + query, ""))) != "half":
                        relevant[mark + query] = {mark + passage: value for passage, value in judged.items()}
    chance = random.Random(0)
    chosen = sorted(chance.sample(sorted(queries), min(MAX_QUERIES, len(queries))))
    relevant = {query: relevant[query] for query in chosen if query in relevant}
    needed = sorted({passage for judged in relevant.values() for passage in judged} & passages.keys())
    others = sorted(passages.keys() - set(needed))
    needed += chance.sample(others, min(len(others), max(0, MAX_PASSAGES - len(needed))))
    return Sample(
        {query: queries[query] for query in chosen},
        {passage: passages[passage] for passage in needed},
        relevant,
        languages.pop() if len(languages) == 1 else None,
    )
