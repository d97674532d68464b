"""Further queries for the passages of a batch: a passage goes through the network once for all queries that it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The names of the features that go with the queries of a batch.
ROWS, TARGETS, ANSWERS, PASSAGES = NAMES = "rows", "targets", "answers", "passages"


@dataclass(frozen=True)
class SharedPassages:
    """Which passages of a batch answer which of its queries. Passages are counted column by column."""

    rows: int
    """Rows of the batch. Their queries come first, the further ones after them."""
    targets: Tensor
    """[queries]: the passage that answers a query."""
    answers: Tensor
    """[queries, answers]: numbers of the texts that answer a query anywhere in the data set, and its own; -1 fills up."""
    passages: Tensor
    """[passages]: the number of each passage's text."""

    @classmethod
    def of(cls, features: dict[str, Any]) -> "SharedPassages | None":
        """What comes with these queries; None where every passage has its row's query alone."""
        if ROWS not in features:
            return None
        return cls(*(features[name] for name in NAMES))


def answers_of(ids: Sequence[np.ndarray]) -> np.ndarray:
    """[pairs, 2]: each different query with every text that answers it, sorted. Its own text is one of them.

    ids: [rows, columns] of each subset, numbered together.
    """
    pairs = np.concatenate([each[:, :2] for each in ids])
    own = np.repeat(np.unique(pairs[:, 0])[:, None], 2, axis=1)
    return np.unique(np.concatenate([pairs, own]), axis=0)


class FurtherQueries:
    """Finds queries of other rows that the passages of a batch answer, at random, the same ones for the same batch."""

    def __init__(self, ids: np.ndarray, read: np.ndarray, answers: np.ndarray, most: int, seed: int) -> None:
        """
        Args:
            ids: [rows, columns] of query, positive and perhaps negative; two cells have the same number exactly when they
                hold the same text.
            read: [rows, columns - 1] the same for what is read of each passage, which may be a window of it.
            answers: what answers_of gives for these and perhaps other rows.
            most: queries that a passage may have, that of its own row counted.
        """
        self.ids, self.read, self.answers, self.most, self.seed = ids, read, answers, most, seed
        # a query that stands in several rows with the same passage is one query
        _, first = np.unique(np.stack([read[:, 0], ids[:, 0]]), axis=1, return_index=True)
        self.by_text = first[np.argsort(read[first, 0], kind="stable")]
        self.texts = read[self.by_text, 0]

    def rows_for(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose queries are added to the batch of these rows, and which of its passages answers each."""
        if self.most == 1:
            return np.zeros(0, int), np.zeros(0, int)
        rng = np.random.default_rng([self.seed, *rows.tolist()])
        asked = set(self.ids[rows, 0].tolist())
        found: list[int] = []
        targets: list[int] = []
        for place, text in enumerate(self.read[rows].T.ravel().tolist()):
            start, end = np.searchsorted(self.texts, [text, text + 1])
            others = [row for row in self.by_text[start:end].tolist() if self.ids[row, 0] not in asked]
            room = self.most - (place < len(rows))
            for row in rng.permutation(others)[:room].tolist():
                asked.add(self.ids[row, 0])
                found.append(row)
                targets.append(place)
        return np.array(found, int), np.array(targets, int)

    def features(self, rows: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """The rows whose queries a batch of these rows has, and what SharedPassages reads."""
        further, targets = self.rows_for(rows)
        queries = np.concatenate([rows, further])
        anchors = self.ids[queries, 0]
        starts, ends = (np.searchsorted(self.answers[:, 0], anchors, side) for side in ("left", "right"))
        answers = np.full((len(queries), (ends - starts).max()), -1)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            answers[number, : end - start] = self.answers[start:end, 1]
        arrays = {
            TARGETS: np.concatenate([np.arange(len(rows)), targets]),
            ANSWERS: answers,
            PASSAGES: self.ids[rows, 1:].T.ravel(),
        }
        return queries, {ROWS: len(rows)} | {name: torch.from_numpy(array) for name, array in arrays.items()}
