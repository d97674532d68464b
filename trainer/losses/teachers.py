"""Scores of stronger models for every query with its passages, which the encoder then learns to imitate."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from trainer.config import ConfigError, one_line
from trainer.config.schema import ModelConfig, TeacherConfig
from trainer.data.roles import LABEL, negatives_of, passages_of, roles_of
from trainer.data.teacher_scores import TextVectors, mean_scores
from trainer.hub.cache import cached_table, digest, folder_of
from trainer.hub.download import HubUnreachable
from trainer.losses.teacher_models import Pair, Score, TeacherFiles, record_of, row_products
from trainer.losses.teacher_vectors import Encoder, Languages, Texts, bm25_vectors
from trainer.system.distributed import processes_here, wait
from trainer.system.progress_bar import encoding, in_columns

PAIRS_PER_PART = 5_000
SCORES = pa.schema([("pair", pa.string()), ("score", pa.float32())])


def pairs_of(rows: Dataset) -> list[Pair]:
    """Every query with its positive, then every query with its first negative, and so on."""
    columns = rows.with_format("arrow")[:]
    anchors = columns["anchor"].to_pylist()
    roles = passages_of(rows.column_names)
    return [pair for role in roles for pair in zip(anchors, columns[role].to_pylist(), strict=True)]


def with_negatives(train: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The sets that a teacher can compare passages of a row in; pairs have one passage per query."""
    return {name: rows for name, rows in train.items() if negatives_of(rows.column_names)}


class ScoreStore:
    """Scores by the content of a pair, in the folder of one teacher at one revision; every file in it is whole."""

    def __init__(self, files: TeacherFiles) -> None:
        cache = files.teacher.cache
        self.folder = Path(cache).expanduser() / files.digest if cache else folder_of("scores", files.digest)

    def read(self) -> dict[str, float]:
        """Every score by its pair's digest. Raises ConfigError when a file is not what was written."""
        scores: dict[str, float] = {}
        for file in sorted(self.folder.glob("[0-9a-f]*.parquet")):
            try:
                table = pq.read_table(file, schema=SCORES)
            except (OSError, pa.ArrowException) as error:
                raise ConfigError(f"{file} cannot be read: {one_line(error)}. Remove it") from None
            scores.update(zip(table["pair"].to_pylist(), table["score"].to_pylist(), strict=True))
        return scores

    def add(self, pairs: list[Pair], score: Score) -> None:
        """Score these pairs and keep them in a file that appears whole."""
        keys = [digest(*pair) for pair in pairs]

        def table() -> pa.Table:
            return pa.table([pa.array(keys), pa.array(score(pairs), pa.float32())], schema=SCORES)

        cached_table(self.folder / f"{digest(*keys)}.parquet", table)

    def missing(self, train: Mapping[str, Dataset]) -> list[Pair]:
        """The different pairs that have no score yet, in a fixed order."""
        known = self.read()
        pairs = dict.fromkeys(pair for rows in with_negatives(train).values() for pair in pairs_of(rows))
        return [pair for pair in pairs if digest(*pair) not in known]


def check_teachable(train: Mapping[str, Dataset], teacher: TeacherConfig) -> None:
    """Raise ConfigError where no row can be taught: none has a negative, or the scores that it shall have."""
    if teacher.passages == "batch":
        return
    taught = with_negatives(train)
    if not taught:
        raise ConfigError(
            "loss.teacher: no data set has negatives, and a teacher compares passages. Add negatives, or find them with "
            "datasets.<name>.mine"
        )
    needs_scores = any(one.kind == "data" for one in teacher.teachers.values())
    if needs_scores and not any(LABEL in rows.column_names for rows in taught.values()):
        raise ConfigError(
            "loss.teacher: kind is data, but no row with negatives has scores. Name their column: "
            "datasets.<name>.columns.scores"
        )


def add_teacher_scores(
    sets: Mapping[str, Mapping[str, Dataset]],
    teacher: TeacherConfig,
    device: str,
    echo: Callable[[str], None],
    base: ModelConfig | None = None,
    languages: Languages | None = None,
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The subsets with negatives, with the teachers' scores of each row's passages as its label, null where a row has none;
    and what run.json records.

    Only pairs that a cross-encoder has never scored go through it, each process of a machine taking its share; other
    models encode each text once. A teacher that is the base model has the prompts of `base`, the config's model. Raises
    ConfigError when no row can be taught.

    Args:
        sets: the subsets of each set.
        languages: of the rows of each subset, for bm25.
    """
    train = {subset: rows for subsets in sets.values() for subset, rows in subsets.items()}
    check_teachable(train, teacher)
    taught = with_negatives(train)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in taught}
    records, pairs_scored = [], 0
    for key, one in teacher.teachers.items():
        files = TeacherFiles(key, one, base) if one.model else None
        if one.kind == "data":
            found = _scores_of_data(taught)
        elif files is None:
            found = _scores_of_vectors(sets, lambda _, texts: bm25_vectors(texts, languages or {}))
        elif one.kind == "cross-encoder":
            found, pairs_scored = _scores_of_cross_encoder(train, files, device, echo)
        else:
            found = _scores_of_vectors(sets, Encoder(files, device, echo).vectors)
        records.append(record_of(one, files))
        for name in taught:
            scores[name].append(found[name])
    weights = [one.weight for one in teacher.teachers.values()]
    rows_taught = 0
    for name, rows in taught.items():
        labels = mean_scores(scores[name], weights, normalize=teacher.normalizes)
        known = np.isfinite(labels).all(axis=1)
        rows_taught += int(known.sum())
        columns = [values if is_known else None for values, is_known in zip(labels.tolist(), known, strict=True)]
        plain = rows.remove_columns(LABEL) if LABEL in rows.column_names else rows
        taught[name] = plain.add_column(LABEL, columns) if known.any() else plain
    return taught, {"teachers": records, "rows": rows_taught, "pairs_scored": pairs_scored}


def _scores_of_cross_encoder(
    train: Mapping[str, Dataset], files: TeacherFiles, device: str, echo: Callable[[str], None]
) -> tuple[dict[str, np.ndarray], int]:
    """[rows, passages] of each set, and how many pairs had to be scored."""
    store, model = ScoreStore(files), files.teacher.model
    missing = store.missing(train)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    wait()  # every process has seen the same scores before one adds to them
    parts = [missing[start : start + PAIRS_PER_PART] for start in range(0, len(missing), PAIRS_PER_PART)]
    if parts:
        echo(f"teacher   {model}: scoring {len(missing):,} pairs (kept in {store.folder})")
    if own := parts[rank :: processes_here()]:
        score, network = files.load_cross_encoder(device)
        with encoding(network, in_columns("teacher", str(model)), len(missing), "pairs", processes_here()) as progress:
            for number, part in enumerate(own, 1):
                store.add(part, score)
                progress.reach(min(number * PAIRS_PER_PART * processes_here(), len(missing)))
    wait()
    known, found = store.read(), {}
    for name, rows in with_negatives(train).items():
        scores = np.array([known[digest(*pair)] for pair in pairs_of(rows)], dtype=np.float32)
        found[name] = scores.reshape(len(passages_of(rows.column_names)), -1).T
    return found, len(missing)


def _scores_of_vectors(
    sets: Mapping[str, Mapping[str, Dataset]], vectors_of: Callable[[str, Texts], TextVectors]
) -> dict[str, np.ndarray]:
    found = {}
    for name, subsets in sets.items():
        texts = Texts.of(subsets)
        vectors = vectors_of(name, texts)
        for subset, queries in texts.queries.items():
            asked = vectors.queries[queries]
            columns = [row_products(asked, vectors.passages[column]) for column in texts.passages[subset].T]
            found[subset] = np.stack(columns, axis=1)
    return found


def _scores_of_data(taught: dict[str, Dataset]) -> dict[str, np.ndarray]:
    """The scores that the rows came with; NaN where a row has none."""
    found = {}
    for name, rows in taught.items():
        scores = np.full((len(rows), len(passages_of(rows.column_names))), np.nan, dtype=np.float32)
        for number, values in enumerate(rows[LABEL] if LABEL in rows.column_names else []):
            if values is not None:
                scores[number] = values
        found[name] = scores
    return found


def missing_scores_lines(teacher: TeacherConfig, train: Mapping[str, Dataset], base: ModelConfig) -> list[str]:
    """Per teacher: what it teaches, and how much a model has to read before the first step."""
    if teacher.passages == "batch":
        texts = len({text for rows in train.values() for role in roles_of(rows.column_names) for text in rows[role]})
        return [
            f"teacher   {one.model or one.kind}: {texts:,} different texts to compare"
            for one in teacher.teachers.values()
        ]
    taught, lines = with_negatives(train), []
    rows = sum(map(len, taught.values()))
    for key, one in teacher.teachers.items():
        name = one.model or one.kind
        if one.kind == "data":
            scored = sum(len(each) - each[LABEL].count(None) for each in taught.values() if LABEL in each.column_names)
            lines.append(f"teacher   data: {scored:,} of {rows:,} rows with negatives have scores to teach")
            continue
        line = f"teacher   {name}: {rows:,} rows with negatives to teach"
        try:
            files = TeacherFiles(key, one, base) if one.model else None
            if files and one.kind == "cross-encoder":
                line += f", {len(ScoreStore(files).missing(train)):,} pairs to score first"
            lines.append(line)
        except HubUnreachable:
            lines.append(f"teacher   needs the hub: {name}")
    return lines
