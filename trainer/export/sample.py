"""What an export is checked with: the first documents of a shard and some queries, as the model scores them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.data.beir import read_search_set
from trainer.data.sources import QUICKSTART
from trainer.export.check import Vectors, compare_scores, compare_top_10, in_query_dimensions, require_rounded
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
    def of(cls, encoder: Encoder, corpus: Path, shard: Shard, queries: list[Passage]) -> "Sample":
        """The sample of a shard; its queries are the user's where there are any."""
        passages = list(islice(shard.of_passages(read_passages(corpus)), CHECKED_DOCUMENTS))
        texts = [query.text for query in queries[:CHECKED_QUERIES]] or embedded_texts()[0]
        texts += [" ".join(passage.text.split()[:QUERY_WORDS]) for passage in passages[:CHECKED_QUERIES]]
        return cls(passages, texts, encoder.documents([passage.text for passage in passages]), encoder.queries(texts))

    def compare(self, engine: Format, terms: list[str], documents: list[Vector]) -> dict[str, Any]:
        """Figures of documents as read from an export. Raises ConfigError when they rank differently from the model."""
        model, taken, read = self._vectors(engine, terms, documents)
        off_by = Vectors(engine.query_rounding.of(taken.queries), engine.document_rounding.of(taken.documents))
        require_rounded(taken, read.scores(), off_by)
        by_itself = [engine.quantisation] if engine.engine_rounds else []
        compare_scores(taken.scores(), read.scores(), "; ".join(by_itself), remedy=engine.remedy)
        if not engine.signed and (self.queries.data < 0).any():
            by_itself.append("query weights below 0 are left out")
        return compare_scores(model.scores(), read.scores(), "; ".join(by_itself))

    def keeps_top_10(self, engine: Format, terms: list[str]) -> bool:
        """Whether every query keeps its top 10 as the engine would read it."""
        documents = [engine.read_document(engine.document("", "", v))[1] for v in vectors_of(self.documents, terms)]
        _, taken, read = self._vectors(engine, terms, documents)
        return compare_top_10(taken.scores(), read.scores())["top_10_unchanged"] == len(self.texts)

    def _vectors(self, engine: Format, terms: list[str], documents: list[Vector]) -> Iterator[Vectors]:
        """The model's, the same without query weights that the engine does not take, and those that it reads."""
        taken = self.queries if engine.signed else self.queries.maximum(0)
        texts_and_vectors = zip(self.texts, vectors_of(self.queries, terms, engine.signed), strict=True)
        queries = [engine.read_query(engine.query("", text, vector)) for text, vector in texts_and_vectors]
        read = matrix_of(queries, terms), matrix_of(documents, terms)
        return in_query_dimensions((self.queries, self.documents), (taken, self.documents), read)


def choose_scale(
    make_engine: Callable[[int], Format], encoder: Encoder, samples: list[Sample], echo: Callable[[str], None]
) -> int:
    """The first of a format's scales that keeps the top 10 of every sample's queries, which is said.

    One for all shards: `samples` are those of every shard. Raises ConfigError when none does.
    """
    scales, queries = make_engine(1).scales, sum(len(sample.texts) for sample in samples)
    for scale in scales:
        engine = make_engine(scale)
        if all(sample.keeps_top_10(engine, encoder.terms) for sample in samples):
            reason = f"of 100, 200, 500, … the first that keeps the top 10 of all {queries} checked queries in order"
            echo(f"scale     {scale:,} ({reason})")
            return scale
    raise ConfigError(f"no scale up to {scales[-1]:,} keeps the top 10 of the checked queries")


def embedded_texts() -> tuple[list[str], list[str]]:
    """Queries and documents that come with the project, to check with where the user gives none."""
    search = read_search_set(QUICKSTART / "search", "dev", "quickstart")
    return list(search.queries.values()), list(search.corpus.values())
