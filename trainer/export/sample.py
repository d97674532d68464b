"""What an export is checked with: the first documents of a shard and some queries, as the model scores them."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.export.check import Rule, Weights, compare, embedded_queries, exactly, swaps_of, used_by
from trainer.export.corpus import Passage, Shard, read_passages
from trainer.export.formats import Format
from trainer.export.vectors import Encoder, Vector, matrix_of, vectors_of

# Documents encoded before they are written: what a kill can lose, and the vectors that are in memory.
CHUNK = 256
# What is scored again: the first documents of a shard, and queries of which some are their first words. The documents
# are one chunk, so that they are encoded in the batches in which they were, or will be, for the files: in others, float32
# may differ in the last digit, which rounding to whole numbers can make a step of.
CHECKED_DOCUMENTS, CHECKED_QUERIES, QUERY_WORDS = CHUNK, 64, 8


@dataclass(frozen=True)
class Sample:
    """Texts, and the vectors that the model gives them: [texts, dimensions]."""

    passages: list[Passage]
    texts: list[str]
    documents: sp.csr_matrix
    queries: sp.csr_matrix

    @classmethod
    def of(cls, encoder: Encoder, corpus: Path, part: Shard, given: list[Passage]) -> "Sample":
        """The sample of a shard; its queries are the user's where there are any."""
        passages = list(islice(part.of_passages(read_passages(corpus)), CHECKED_DOCUMENTS))
        texts = [query.text for query in given[:CHECKED_QUERIES]] or embedded_queries()
        texts += [" ".join(passage.text.split()[:QUERY_WORDS]) for passage in passages[:CHECKED_QUERIES]]
        documents = encoder.documents([passage.text for passage in passages])
        return cls(passages, texts, documents, encoder.queries(texts))

    def compare(self, form: Format, terms: list[str], queries: list[Vector], documents: list[Vector]) -> dict[str, Any]:
        """Figures of the vectors read from an export. Raises ConfigError when they rank differently from the model."""
        asked, held, found = self._rows(terms, queries, documents)
        of_queries, of_documents = Weights.of(asked, form.query_rounding), Weights.of(held, form.document_rounding)
        return compare(of_queries, of_documents, found, _rule(form, asked, held))

    def stays_in_order(self, form: Format, terms: list[str]) -> bool:
        """Whether every query keeps its best ten as they would be read, but for what the engine itself does."""
        documents = [form.read_document(form.document("", "", v))[1] for v in vectors_of(self.documents, terms)]
        queries = [form.read_query(form.query("", "", v)) for v in vectors_of(self.queries, terms, form.signed)]
        asked, held, found = self._rows(terms, queries, documents)
        swaps = swaps_of(asked @ held.T, found, _rule(form, asked, held))
        return all(swap.gap <= swap.explained for swap in swaps)

    def _rows(
        self, terms: list[str], queries: list[Vector], documents: list[Vector]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The model's queries and documents in the dimensions that queries have, and scores as read from an export."""
        asked, held, read_queries, read_documents = used_by(
            self.queries, self.documents, matrix_of(queries, terms), matrix_of(documents, terms)
        )
        return asked, held, read_queries @ read_documents.T


def _rule(form: Format, queries: np.ndarray, documents: np.ndarray) -> Rule:
    own = [form.quantisation] * form.fixed + ["query weights below 0 are left out"] * (not form.signed)
    return Rule(
        Weights.of(queries, form.query_rounding if form.fixed else form.left_out),
        Weights.of(documents, form.document_rounding if form.fixed else exactly),
        engine="; ".join(own),
        remedy=form.remedy,
    )


def choose_scale(
    make_form: Callable[[int], Format], encoder: Encoder, samples: list[Sample], say: Callable[[str], None]
) -> int:
    """The first of a format's scales that keeps the best ten of every sample's queries in order, which is said.

    One for all shards: `samples` are those of every shard. Raises ConfigError when none does.
    """
    scales = make_form(1).scales
    for scale in scales:
        form = make_form(scale)
        if all(sample.stays_in_order(form, encoder.terms) for sample in samples):
            queries = sum(len(sample.texts) for sample in samples)
            say(f"scale     {scale:,} (of {scales[0]}, {scales[1]}, {scales[2]}, … the first that keeps the top 10 of all "
                f"{queries} checked queries in order)")  # fmt: skip
            return scale
    raise ConfigError(f"no scale up to {scales[-1]:,} keeps the top 10 of the checked queries in order")
