"""What an export is checked with: the first documents of a shard and some queries, as the model scores them."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.data.beir import read_search_set
from trainer.data.sources import QUICKSTART
from trainer.encoding.windows import Splitter, reads_in_windows, with_cut_documents
from trainer.export.check import compare_scores, compare_top_10, require_same_vectors, scores_of
from trainer.export.corpus import Passage, Shard, read_passages
from trainer.export.formats import Format
from trainer.export.vectors import Encoder, Vector, matrix_of, vectors_of

# Documents encoded before they are written: what a kill can lose, and the vectors that are in memory.
CHUNK = 256
# What is scored again: the first documents of a shard, and queries of which some are their first words. The documents
# are one chunk, so their batches are those of the files: in others, float32 may differ in the last digit.
CHECKED_DOCUMENTS, CHECKED_QUERIES, QUERY_WORDS = CHUNK, 64, 8
# How many long documents are put together from their windows again, and how far float32 may be off in other batches.
CHECKED_IN_WINDOWS, OTHER_BATCHES = 4, 1e-4


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
        documents = encoder.documents([passage.text for passage in passages])
        if reads_in_windows(encoder.model):
            require_maxima(encoder, [passage.text for passage in passages], documents)
        return cls(passages, texts, documents, encoder.queries(texts))

    def compare(self, engine: Format, terms: list[str], documents: list[Vector]) -> dict[str, Any]:
        """Figures of documents as read from an export. Raises ConfigError when they rank differently from the model."""
        (accepted, queries), read = self._queries(engine, terms), matrix_of(documents, terms)
        require_same_vectors("the queries give", self.texts, queries, accepted, rounding=engine.query_rounding)
        texts = [passage.text for passage in self.passages]
        require_same_vectors("the files give", texts, read, self.documents, rounding=engine.document_rounding)
        pairs = (self.queries, self.documents), (accepted, self.documents), (queries, read)
        scores, scores_of_accepted, scores_read = scores_of(*pairs)
        by_itself = [engine.quantisation] if engine.engine_rounds else []
        compare_scores(scores_of_accepted, scores_read, "; ".join(by_itself), remedy=engine.remedy)
        if not engine.signed and (self.queries.data < 0).any():
            by_itself.append("query weights below 0 are left out")
        return compare_scores(scores, scores_read, "; ".join(by_itself))

    def keeps_top_10(self, engine: Format, terms: list[str]) -> bool:
        """Whether every query keeps its top 10 as the engine would read it."""
        documents = [engine.read_document(engine.document("", "", v))[1] for v in vectors_of(self.documents, terms)]
        accepted, queries = self._queries(engine, terms)
        scores = scores_of((accepted, self.documents), (queries, matrix_of(documents, terms)))
        return compare_top_10(*scores)["top_10_unchanged"] == len(self.texts)

    def _queries(self, engine: Format, terms: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Without the weights that the engine does not take; and as it reads them from their records."""
        accepted = self.queries if engine.signed else self.queries.maximum(0)
        vectors = zip(self.texts, vectors_of(self.queries, terms, engine.signed), strict=True)
        return accepted, matrix_of(
            [engine.read_query(engine.query("", text, vector)) for text, vector in vectors], terms
        )


def require_maxima(encoder: Encoder, texts: list[str], found: sp.csr_matrix) -> None:
    """Raise ConfigError when a long document's vector is not the maximum of what the library gives for its windows."""
    windows = Splitter(encoder.model).split(texts)
    long = [number for number, parts in enumerate(windows) if len(parts) > 1][:CHECKED_IN_WINDOWS]
    if long:
        with with_cut_documents(encoder.model):
            exact = sp.vstack([encoder.documents(windows[number]).max(axis=0) for number in long], format="csr")
        checked = [texts[number] for number in long]
        require_same_vectors("windows give", checked, found[long], exact, OTHER_BATCHES)


def choose_scale(
    make_engine: Callable[[int], Format], encoder: Encoder, samples: list[Sample], echo: Callable[[str], None]
) -> int:
    """The first scale that keeps the top 10 of all queries in every shard's sample. Raises ConfigError when none does."""
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
