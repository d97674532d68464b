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
from datasets import Dataset, DatasetDict

from trainer.config.schema import ModelConfig, TeacherConfig
from trainer.data.bm25 import BM25Index
from trainer.data.roles import passages_of
from trainer.data.teacher_scores import BatchScores, TextVectors
from trainer.hub.cache import cached_table, digest, folder_of, identity
from trainer.losses.teacher_models import Encode, TeacherFiles
from trainer.system.distributed import processes_here, wait
from trainer.system.progress_bar import encoding, in_columns

TEXTS_PER_PART = 5_000
Languages = Mapping[str, Sequence[str]]  # of each row of a set


@dataclass(frozen=True)
class Texts:
    """The different queries and passages of a set, and which of them each row has."""

    different_queries: list[str]
    different_passages: list[str]
    queries: np.ndarray
    """[rows]."""
    passages: np.ndarray
    """[rows, passages]."""

    @classmethod
    def of(cls, rows: Dataset) -> "Texts":
        """The texts of these rows."""
        columns = rows.with_format("arrow")[:]
        anchors = columns["anchor"].to_pylist()
        passages = [columns[role].to_pylist() for role in passages_of(rows.column_names)]
        queries, own = {text: None for text in anchors}, {text: None for column in passages for text in column}
        of_query, of_passage = ({text: number for number, text in enumerate(each)} for each in (queries, own))
        return cls(
            list(queries),
            list(own),
            np.array([of_query[text] for text in anchors], dtype=int),
            np.array([[of_passage[text] for text in column] for column in passages], dtype=int).T,
        )


def batch_scores(
    train: DatasetDict,
    teacher: TeacherConfig,
    device: str,
    echo: Callable[[str], None],
    base: ModelConfig,
    languages: Languages,
) -> tuple[dict[str, BatchScores], dict[str, Any]]:
    """The teachers' scores in batches of each set, and what run.json records. languages: of the rows of each set, for bm25.

    Vectors are kept under the revision of their teacher; only texts without one are encoded, each process of a machine
    taking its share.
    """
    texts = {name: Texts.of(rows) for name, rows in train.items()}
    vectors: dict[str, list[TextVectors]] = {name: [] for name in train}
    records: list[dict[str, Any]] = []
    for key, one in teacher.teachers.items():
        files = None if one.kind == "bm25" else TeacherFiles(key, one, base)
        encoder = partial(_Encoder, files, device, echo) if files else None
        for name, rows in train.items():
            if encoder is None:
                _, found = bm25_vectors(rows, languages[name], one.weight)
            else:
                encode = encoder(name)
                queries = encode(texts[name].different_queries, "query")
                found = TextVectors(queries, encode(texts[name].different_passages, "document"), one.weight)
            vectors[name].append(found)
        record = {"model": one.model, "identity": identity(files.snapshot)} if files else {}
        records.append({**record, "kind": one.kind})
    scores = {
        name: BatchScores(vectors[name], each.queries, each.passages, teacher.normalizes)
        for name, each in texts.items()
    }
    return scores, {"teachers": records, "rows": sum(map(len, train.values()))}


def bm25_vectors(rows: Dataset, languages: Sequence[str], weight: float = 1.0) -> tuple[Texts, TextVectors]:
    """The texts of a set, and vectors whose dot products are BM25's scores among the set's passages of a query's language.

    Between two languages they are 0.
    """
    texts = Texts.of(rows)
    of_query: dict[int, str] = {}
    of_passages: dict[str, set[int]] = {}
    for query, own, language in zip(texts.queries.tolist(), texts.passages.tolist(), languages, strict=True):
        of_query.setdefault(query, language)
        of_passages.setdefault(language, set()).update(own)
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
    nothing = [
        sp.csr_array((len(side), 1), dtype=np.float32) for side in (texts.different_queries, texts.different_passages)
    ]
    sides = [
        sp.hstack([empty, *found], format="csr") for empty, found in zip(nothing, (queries, passages), strict=True)
    ]
    return texts, TextVectors(sides[0], sides[1], weight)


def _at(places: Sequence[int], vectors: sp.csr_array, count: int) -> sp.csr_array:
    """The rows at these places of a matrix of so many rows; the others are empty."""
    chosen = sp.csr_array((np.ones(len(places), np.float32), (places, range(len(places)))), shape=(count, len(places)))
    return chosen @ vectors


# ------------------------------------------------------------------------------------------- vectors of models
class _Encoder:
    """Vectors of a teacher, kept in parts of TEXTS_PER_PART texts by their content."""

    def __init__(self, files: TeacherFiles, device: str, echo: Callable[[str], None], name: str) -> None:
        """name: of the set, for the progress."""
        self.files, self.device, self.echo, self.name = files, device, echo, name
        cache = files.teacher.cache
        self.folder = Path(cache).expanduser() / files.digest if cache else folder_of("teacher", files.digest)

    def __call__(self, texts: list[str], side: str) -> Any:
        """[texts, width], dense or sparse."""
        parts = [texts[start : start + TEXTS_PER_PART] for start in range(0, len(texts), TEXTS_PER_PART)]
        places = [self.folder / f"{side}-{digest(*part)}.parquet" for part in parts]
        missing = [(part, place) for part, place in zip(parts, places, strict=True) if not place.is_file()]
        wait()  # every process has seen the same files before one adds to them
        if missing:
            count = sum(len(part) for part, _ in missing)
            words = "queries" if side == "query" else "passages"
            self.echo(
                f"teacher   {self.files.teacher.model}: encoding {count:,} {words} of {self.name} (kept in {self.folder})"
            )
        if own := missing[int(os.environ.get("LOCAL_RANK", "0")) :: processes_here()]:
            encode, network = self.files.load_encoder(self.device)
            what = in_columns("teacher", str(self.files.teacher.model))
            with encoding(network, what, count, "texts", processes_here()):
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
