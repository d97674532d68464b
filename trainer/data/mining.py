"""Fills missing negatives: for each query, passages that look like an answer and are none."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.config.schema import MiningConfig, ModelConfig
from trainer.data.bm25 import BM25Index
from trainer.data.negatives import count_negatives
from trainer.data.roles import negative_roles, negatives_of, passages_of
from trainer.data.rows import Rows
from trainer.hub.cache import cached_table, cached_tables, cached_vectors, digest, folder_of, identity
from trainer.hub.download import Snapshot, fetch
from trainer.models.prompts import prompts_of, quoted
from trainer.models.weights import loading
from trainer.system.progress_bar import encoding, going_on, in_columns

# Part of the cache's key: raised when other negatives come out of the same rows and settings.
VERSION = "2"
# Share of two passages' different words that they have in common, from which one is a copy of the other.
NEAR_DUPLICATE = 0.8
QUERIES_PER_PART, TEXTS_PER_PART = 5_000, 20_000
# Further negatives that a model is asked for, since near duplicates are passed over afterwards.
SPARE = 10
MINED = pa.schema([("query", pa.int64()), ("negative", pa.int64()), ("passed_over", pa.int64())])


@dataclass(frozen=True)
class Search:
    """What negatives are looked for in: the passages that are trained on."""

    queries: list[str]
    passages: list[str]
    positives: list[list[int]]  # of each query, its own positives among the passages
    languages: list[str]  # of each query
    passage_languages: list[set[str]]


def fill_negatives(
    name: str, rows: Rows, everything: list[pa.Table], settings: MiningConfig, base: ModelConfig | None = None
) -> tuple[Rows, dict]:
    """The rows, in which those without a negative now have some, and counts for the plan and the manifest.

    A row gets the negatives that are found for its query, at most settings.per_query; where none is found it stays a
    pair. Negatives are passages of these rows, so none is held out. Results are stored under HF_HOME.

    Args:
        everything: all rows of the source, for what answers a query.
        base: the config's model, whose prompts a mining model has that is the base model.
    """
    table = rows.table
    missing = count_negatives(table) == 0
    if not missing.any():
        return rows, {}
    search = search_of(table, everything)
    mined = _mined(name, search, settings, base)
    found = found_in(mined, search)
    filled, negatives = _with_negatives(table, missing, found)
    counts = {
        "method": str(settings.model) if settings.method == "model" else "bm25",
        "queries": len(search.queries),
        "queries_filled": len(found),
        "negatives": negatives,
        "near_duplicates_passed_over": sum(mined["passed_over"].to_pylist()),
    }
    return Rows(filled, rows.left_out, rows.reading), counts


def search_of(rows: pa.Table, everything: list[pa.Table]) -> Search:
    """What negatives are looked for in, for the queries of rows that have none. everything: what answers a query."""
    without = rows.filter(pa.array(count_negatives(rows) == 0))
    answers: dict[str, dict[str, None]] = defaultdict(dict)
    for table in everything:
        for anchor, positive in zip(table["anchor"].to_pylist(), table["positive"].to_pylist(), strict=True):
            answers[anchor][positive] = None
    languages: dict[str, set[str]] = defaultdict(set)
    for role in passages_of(rows.column_names):
        for passage, language in zip(rows[role].to_pylist(), rows["language"].to_pylist(), strict=True):
            if passage is not None:
                languages[passage].add(language)
    passages = list(languages)
    number = {passage: place for place, passage in enumerate(passages)}
    queries = dict(zip(without["anchor"].to_pylist(), without["language"].to_pylist(), strict=True))
    return Search(
        queries=list(queries),
        passages=passages,
        positives=[[number[positive] for positive in answers[query] if positive in number] for query in queries],
        languages=list(queries.values()),
        passage_languages=list(languages.values()),
    )


def found_in(mined: pa.Table, search: Search) -> dict[str, list[str]]:
    """The negatives of each query that has any. mined: MINED rows."""
    found: dict[str, list[str]] = defaultdict(list)
    for query, negative in zip(mined["query"].to_pylist(), mined["negative"].to_pylist(), strict=True):
        if negative is not None:
            found[search.queries[query]].append(search.passages[negative])
    return found


def _with_negatives(table: pa.Table, missing: np.ndarray, found: dict[str, list[str]]) -> tuple[pa.Table, int]:
    """The rows with the negatives that were found for those that miss some, and the number of these negatives."""
    names = negatives_of(table.column_names)
    own = [table[name].to_pylist() for name in names]
    new = [
        found.get(anchor, []) if mine else [] for anchor, mine in zip(table["anchor"].to_pylist(), missing, strict=True)
    ]
    roles = negative_roles(max(len(names), *map(len, new)))
    filled = table.drop_columns(names)
    for number, role in enumerate(roles):
        cells = [each[number] if number < len(each) else None for each in new]
        if number < len(own):
            cells = [cell if mine else kept for cell, kept, mine in zip(cells, own[number], missing, strict=True)]
        filled = filled.add_column(2 + number, role, pa.array(cells, pa.string()))
    return filled, sum(map(len, new))


def _mined(name: str, search: Search, settings: MiningConfig, base: ModelConfig | None) -> pa.Table:
    """MINED rows: (query, negative) per negative, and one without a negative per query that has none."""
    texts = digest(*search.queries, *search.passages, repr(search.positives), repr(search.languages))
    how = settings.model_dump_json(exclude={"every", "rounds"})
    if settings.method != "model":
        how = settings.model_copy(update={"method": "bm25"}).model_dump_json(exclude={"every", "rounds"})
        folder = folder_of("mined", digest(VERSION, texts, how))
        numbers = list(range(len(search.queries)))
        mine = _BM25Miner(search, settings).mine
        with going_on(in_columns("mining", name), len(numbers), "queries") as progress:
            return pa.concat_tables(cached_tables(folder, numbers, QUERIES_PER_PART, mine, progress))
    key = f"datasets.{name}.mine.model"
    why = f"negatives of '{name}'"
    assert settings.model is not None  # the config's checks
    model = fetch(settings.model, settings.revision, kind="model", why=why, key=key)
    prompts = prompts_of(settings.model, model.folder, base)
    of_model = digest(identity(model), quoted(prompts)) if quoted(prompts) else identity(model)
    folder = folder_of("mined", digest(VERSION, texts, how, of_model))
    load = partial(load_dense, model, key, prompts)
    with going_on(in_columns("mining", name)):
        return cached_table(folder / "mined.parquet", partial(_mine_with_model, search, settings, load, of_model))


# ------------------------------------------------------------------------------------------- what is a negative
@lru_cache(maxsize=200_000)
def words_of(text: str) -> frozenset[str]:
    """The different words of a text."""
    return frozenset(re.findall(r"\w+", text.lower()))


def is_near_duplicate(one: str, other: str) -> bool:
    """Whether two passages share so many of their words (Jaccard) that one is a copy of the other."""
    a, b = words_of(one), words_of(other)
    return len(a & b) >= NEAR_DUPLICATE * len(a | b)


def choose(candidates: Iterable[int], search: Search, query: int, count: int) -> tuple[list[int], int]:
    """The first candidates that are near duplicates neither of the query's positives nor of each other, and how many were
    passed over."""
    chosen: list[int] = []
    passed_over = 0
    for candidate in candidates:
        if len(chosen) == count:
            break
        others = (search.passages[other] for other in (*search.positives[query], *chosen))
        if any(is_near_duplicate(search.passages[candidate], other) for other in others):
            passed_over += 1
        else:
            chosen.append(candidate)
    return chosen, passed_over


def choose_within(
    passages: np.ndarray, scores: np.ndarray, limit: float, search: Search, query: int, settings: MiningConfig
) -> tuple[list[int], int]:
    """`choose` among a query's ranks of settings.range that score no more than the limit. passages: best first."""
    positives, (lowest, highest) = set(search.positives[query]), settings.range
    candidates = [
        int(passage)
        for passage, score in zip(passages, scores, strict=True)
        if passage not in positives and 0 < score <= limit
    ]
    return choose(candidates[lowest:highest], search, query, settings.per_query)


def table_of(chosen: Iterable[tuple[int, list[int], int]]) -> pa.Table:
    """MINED rows of queries, each with its negatives and how many near duplicates were passed over."""
    rows = [
        (query, negative, passed if place == 0 else 0)
        for query, negatives, passed in chosen
        for place, negative in enumerate(negatives or [None])
    ]
    return pa.table([pa.array(column, pa.int64()) for column in zip(*rows, strict=True)], schema=MINED)


# ------------------------------------------------------------------------------------------- BM25
class _BM25Miner:
    """BM25 within the passages of a query's language."""

    def __init__(self, search: Search, settings: MiningConfig) -> None:
        self.search, self.settings = search, settings
        self.indexes: dict[str, tuple[BM25Index, np.ndarray]] = {}

    def mine(self, queries: list[int]) -> pa.Table:
        """MINED rows of these queries."""
        by_language: dict[str, list[int]] = defaultdict(list)
        for query in queries:
            by_language[self.search.languages[query]].append(query)
        chosen = [found for language, those in by_language.items() for found in self._within(language, those)]
        return table_of(sorted(chosen))

    def _within(self, language: str, queries: list[int]) -> Iterator[tuple[int, list[int], int]]:
        if language not in self.indexes:
            self.indexes[language] = self._index(language)
        index, numbers = self.indexes[language]
        if index.is_empty:
            yield from ((query, [], 0) for query in queries)
            return
        highest = self.settings.range[1]
        most = max(len(self.search.positives[query]) for query in queries)
        words = index.words_of([self.search.queries[query] for query in queries])
        places, scores = index.search(words, highest + most)
        for query, own_words, row, values in zip(queries, words, numbers[places], scores, strict=True):
            limit = np.inf
            if self.settings.margin is not None:
                of_positives = index.scores_of(own_words)[np.isin(numbers, self.search.positives[query])]
                limit = (1 - self.settings.margin) * float(of_positives.min(initial=np.inf))
            yield (query, *choose_within(row, values, limit, self.search, query, self.settings))

    def _index(self, language: str) -> tuple[BM25Index, np.ndarray]:
        """The language's passages, and their numbers."""
        numbers = [place for place, languages in enumerate(self.search.passage_languages) if language in languages]
        passages = [self.search.passages[place] for place in numbers]
        return BM25Index(passages, language, without_stop_words=False), np.array(numbers)


# ------------------------------------------------------------------------------------------- a dense model
class Remembered:
    """A dense model whose vectors are kept in parts, so that mining goes on where it was killed."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_query(self, texts: list[str], **options) -> np.ndarray:
        """[texts, width]."""
        return self._encode("query", texts, options)

    def encode_document(self, texts: list[str], **options) -> np.ndarray:
        """[texts, width]."""
        return self._encode("document", texts, options)

    def _encode(self, task: str, texts: list[str], options: dict) -> np.ndarray:
        encode = partial(getattr(self.model, f"encode_{task}"), **(options | {"show_progress_bar": False}))
        folder = self.folder / f"{task}-{digest(*texts)}"
        what = in_columns("mining", "queries" if task == "query" else "passages")
        with encoding(self.model[0], what, len(texts)) as progress:
            return cached_vectors(folder, texts, TEXTS_PER_PART, encode, progress)


def load_dense(snapshot: Snapshot, key: str, prompts: dict[str, str], device: str | None = None) -> Any:
    """A SentenceTransformer from the files that are here; without `device` the library chooses one. Raises ConfigError."""
    from sentence_transformers import SentenceTransformer

    with loading(key, snapshot.source, " as a dense model"):
        return SentenceTransformer(str(snapshot.folder), device=device, prompts=prompts)


def _mine_with_model(search: Search, settings: MiningConfig, load: Callable, of_model: str) -> pa.Table:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    pairs = [
        {"anchor": query, "positive": search.passages[positive]}
        for query, positives in zip(search.queries, search.positives, strict=True)
        for positive in positives
    ]
    lowest, highest = settings.range
    highest = min(highest, max(len(search.passages), lowest + 1))
    mined = mine_hard_negatives(
        Dataset.from_list(pairs),
        Remembered(load(), folder_of("vectors", digest(of_model))),
        corpus=search.passages,
        range_min=lowest,
        range_max=highest,
        relative_margin=settings.margin,
        num_negatives=min(settings.per_query + SPARE, highest - lowest),
        output_format="triplet",
        verbose=False,
    )
    number = {passage: place for place, passage in enumerate(search.passages)}
    candidates: dict[str, dict[int, None]] = defaultdict(dict)
    for anchor, negative in zip(mined["anchor"], mined["negative"], strict=True):
        candidates[anchor][number[negative]] = None
    return table_of(
        (place, *choose(candidates[query], search, place, settings.per_query))
        for place, query in enumerate(search.queries)
    )


def mining_words(counts: dict) -> str:
    """One line for the plan."""
    return (
        f"{counts['negatives']:,} negatives mined by {counts['method']} for {counts['queries_filled']:,} of "
        f"{counts['queries']:,} queries; {counts['near_duplicates_passed_over']:,} near duplicates passed over"
    )
