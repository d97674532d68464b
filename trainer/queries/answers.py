"""Reads what a language model answered: data, never instructions. JSON is looked for in whatever stands around it."""

import json
from typing import Any, NamedTuple

KINDS = {"questions": "question", "keywords": "keywords"}
UNREADABLE = "no JSON with questions or keywords in the answer"


class Candidate(NamedTuple):
    """A query as the model wrote it, before any check; `text` may be anything that JSON can hold."""

    kind: str
    text: Any


def read_answer(text: str) -> list[Candidate] | None:
    """The queries of an answer; None where it has no JSON object with a list of them.

    Of several objects the last counts: some models think aloud first, and draft.
    """
    found, start = None, 0
    decoder = json.JSONDecoder()
    while (start := text.find("{", start)) >= 0:
        try:
            held, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        if isinstance(held, dict) and any(isinstance(held.get(name), list) for name in KINDS):
            found = held
    if found is None:
        return None
    lists = {name: found[name] for name in KINDS if isinstance(found.get(name), list)}
    return [Candidate(KINDS[name], held) for name, those in lists.items() for held in those]
