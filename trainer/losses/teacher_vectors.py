"""A vector of each training text, of each teacher that gives one: a step multiplies those of its batch.

So a query is taught on all passages of the batch, and not on its own few, without a further text for the network.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from datasets import Dataset

from trainer.config.schema import ModelConfig, TeacherConfig
from trainer.data.bm25 import BM25Index
from trainer.data.roles import passages_of
from trainer.data.teacher_scores import BatchScores, TextVectors
from trainer.hub.cache import cached_table, digest, folder_of
from trainer.losses.teacher_models import Encode, TeacherFiles, record_of
from trainer.system.distributed import processes_here, wait
from trainer.system.progress_bar import encoding, in_columns

TEXTS_PER_PART = 5_000
Languages = Mapping[str, Sequence[str]]  # of each row of a subset


@dataclass(frozen=True)
class Texts:
    """The different queries and passages of a set, and which of them each row of its subsets has."""

    different_queries: list[str]
    different_passages: list[str]
    queries: dict[str, np.ndarray]
    """[rows] of each subset."""
    passages: dict[str, np.ndarray]
    """[rows, passages] of each subset."""

    @classmethod
    def of(cls, subsets: Mapping[str, Dataset]) -> "Texts":
        """The texts of the subsets of one set."""
        of_query: dict[str, int] = {}
        of_passage: dict[str, int] = {}
        queries, passages = {}, {}
        for name, rows in subsets.items():
            columns = rows.with_format("arrow")[:]
            anchors = columns["anchor"].to_pylist()
            queries[name] = np.array([of_query.setdefault(text, len(of_query)) for text in anchors], dtype=int)
            numbers = [
                [of_passage.setdefault(text, len(of_passage)) for text in columns[role].to_pylist()]
                for role in passages_of(rows.column_names)
            ]
            passages[name] = np.array(numbers, dtype=int).T
        return cls(list(of_query), list(of_passage), queries, passages)


def batch_scores(
    sets: Mapping[str, Mapping[str, Dataset]],
    teacher: TeacherConfig,
    device: str,
    echo: Callable[[str], None],
    base: ModelConfig,
    languages: Languages,
) -> tuple[dict[str, BatchScores], dict[str, Any]]:
    """The teachers' scores in batches of each subset, and what run.json records.

    Vectors are kept under the revision of their teacher; only texts without one are encoded, each process of a machine
    taking its share.

    Args:
        sets: the subsets of each set.
        languages: of the rows of each subset, for bm25.
    """
    texts = {name: Texts.of(subsets) for name, subsets in sets.items()}
    vectors: dict[str, list[TextVectors]] = {name: [] for name in sets}
    records: list[dict[str, Any]] = []
    for key, one in teacher.teachers.items():
        files = TeacherFiles(key, one, base) if one.model else None
        encoder = Encoder(files, device, echo) if files else None
        for name, each in texts.items():
            found = encoder.vectors(name, each) if encoder else bm25_vectors(each, languages)
            vectors[name].append(found)
        records.append(record_of(one, files))
    weights = [one.weight for one in teacher.teachers.values()]
    scores = {
        subset: BatchScores(vectors[name], weights, each.queries[subset], each.passages[subset], teacher.normalizes)
        for name, each in texts.items()
        for subset in each.queries
    }
    return scores, {
        "teachers": records,
        "rows": sum(len(rows) for subsets in sets.values() for rows in subsets.values()),
    }


def bm25_vectors(texts: Texts, languages: Languages) -> TextVectors:
    """Vectors whose dot products are BM25's scores among the set's passages of a query's language.

    Between two languages they are 0. languages: of the rows of each subset.
    """
    of_query: dict[int, str] = {}
    of_passages: dict[str, set[int]] = {}
    for subset, queries_of_rows in texts.queries.items():
        own = texts.passages[subset].tolist()
        for query, passages_of_row, language in zip(queries_of_rows.tolist(), own, languages[subset], strict=True):
            of_query.setdefault(query, language)
            of_passages.setdefault(language, set()).update(passages_of_row)
    queries, passages = [], []
    for language, numbers in of_passages.items():
        places = sorted(numbers)
        index = BM25Index([texts.different_passages[place] for place in places], language, without_stop_words=True)
        if index.is_empty:
            continue
        asking = [number for number in range(len(texts.different_queries)) if of_query[number] == language]
        words = index.words_of([texts.different_queries[number] for number in asking]) if asking else []
        queries.append(_at(asking, index.query_vectors(words), len(texts.different_queries)))
        passages.append(_at(places, index.passage_vectors(), len(texts.different_passages)))
    sizes = len(texts.different_queries), len(texts.different_passages)
    nothing = [sp.csr_array((size, 1), dtype=np.float32) for size in sizes]
    sides = [
        sp.hstack([empty, *found], format="csr") for empty, found in zip(nothing, (queries, passages), strict=True)
    ]
    return TextVectors(sides[0], sides[1])


def _at(places: Sequence[int], vectors: sp.csr_array, count: int) -> sp.csr_array:
    """The rows at these places of a matrix of so many rows; the others are empty."""
    chosen = sp.csr_array((np.ones(len(places), np.float32), (places, range(len(places)))), shape=(count, len(places)))
    return chosen @ vectors


# ------------------------------------------------------------------------------------------- vectors of models
class Encoder:
    """Vectors of a teacher, which is loaded once; kept in parts of TEXTS_PER_PART texts by their content."""

    def __init__(self, files: TeacherFiles, device: str, echo: Callable[[str], None]) -> None:
        self.files, self.device, self.echo = files, device, echo
        cache = files.teacher.cache
        self.folder = Path(cache).expanduser() / files.digest if cache else folder_of("teacher", files.digest)
        self._loaded: tuple[Encode, Any] | None = None

    def vectors(self, name: str, texts: Texts) -> TextVectors:
        """Those of a set. name: the set's, for the progress."""
        queries = self._encode(texts.different_queries, "query", name)
        return TextVectors(queries, self._encode(texts.different_passages, "document", name))

    def _encode(self, texts: list[str], side: str, name: str) -> Any:
        """[texts, width], dense or sparse."""
        parts = [texts[start : start + TEXTS_PER_PART] for start in range(0, len(texts), TEXTS_PER_PART)]
        places = [self.folder / f"{side}-{digest(*part)}.parquet" for part in parts]
        missing = [(part, place) for part, place in zip(parts, places, strict=True) if not place.is_file()]
        wait()  # every process has seen the same files before one adds to them
        count = sum(len(part) for part, _ in missing)
        if missing:
            what = f"{count:,} {'queries' if side == 'query' else 'passages'} of {name}"
            self.echo(f"teacher   {self.files.teacher.model}: encoding {what} (kept in {self.folder})")
        if own := missing[int(os.environ.get("LOCAL_RANK", "0")) :: processes_here()]:
            self._loaded = self._loaded or self.files.load_encoder(self.device)
            encode, network = self._loaded
            with encoding(
                network, in_columns("teacher", str(self.files.teacher.model)), count, "texts", processes_here()
            ):
                for part, place in own:
                    cached_table(place, partial(_table, encode, part, side))
        wait()
        return _matrix([cached_table(place, partial(_unmade, place)) for place in places])


def _table(encode: Encode, texts: list[str], side: str) -> pa.Table:
    """The vectors of some texts; of sparse ones, dimensions and values."""
    vectors = encode(texts, side)
    if not sp.issparse(vectors):
        return pa.table({"vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])})
    bounds = pa.array(vectors.indptr, pa.int32())
    columns = {
        "dims": pa.ListArray.from_arrays(bounds, pa.array(vectors.indices, pa.int32())),
        "values": pa.ListArray.from_arrays(bounds, pa.array(vectors.data, pa.float32())),
        "width": pa.repeat(pa.scalar(vectors.shape[1], pa.int32()), len(texts)),
    }
    return pa.table(columns)


def _unmade(place: Path) -> pa.Table:
    raise FileNotFoundError(place)  # another process has written it, or this one


def _matrix(tables: list[pa.Table]) -> Any:
    table = pa.concat_tables(tables)
    if "vector" in table.column_names:
        chunks = [chunk.flatten().to_numpy() for chunk in table["vector"].chunks]
        return np.concatenate(chunks).reshape(table.num_rows, -1)
    lists = {name: [chunk for chunk in table[name].chunks] for name in ("dims", "values")}
    dims, values = (
        np.concatenate([chunk.flatten().to_numpy() for chunk in lists[name]]) for name in ("dims", "values")
    )
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in lists["dims"]])
    shape = (table.num_rows, table["width"][0].as_py())
    return sp.csr_array((values, dims, np.cumsum([0, *lengths])), shape=shape)
