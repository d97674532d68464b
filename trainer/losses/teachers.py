"""Scores of stronger models for every query with its passages, which the encoder then learns to imitate."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from trainer.config import ConfigError, one_line
from trainer.config.schema import ModelConfig, TeacherConfig
from trainer.data.roles import LABEL, negatives_of, passages_of
from trainer.data.teacher_scores import mean_scores
from trainer.hub.cache import cached_table, digest, folder_of, identity
from trainer.hub.download import HubUnreachable
from trainer.losses.teacher_models import KINDS_OF_MODELS, Pair, Score, TeacherFiles, row_products
from trainer.losses.teacher_vectors import Languages, bm25_vectors
from trainer.system.distributed import processes_here, wait
from trainer.system.progress_bar import encoding, in_columns

PAIRS_PER_PART = 5_000
SCORES = pa.schema([("pair", pa.string()), ("score", pa.float32())])
ONE_NEGATIVE = "of two passages, normalized scores are 0 and 1 whatever the teachers' margin. Give rows more negatives"


def pairs_of(rows: Dataset) -> list[Pair]:
    """Every query with its positive, then every query with its first negative, and so on."""
    columns = rows.with_format("arrow")[:]
    anchors = columns["anchor"].to_pylist()
    roles = passages_of(rows.column_names)
    return [pair for role in roles for pair in zip(anchors, columns[role].to_pylist(), strict=True)]


def with_negatives(train: DatasetDict) -> dict[str, Dataset]:
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

    def missing(self, train: DatasetDict) -> list[Pair]:
        """The different pairs that have no score yet, in a fixed order."""
        known = self.read()
        pairs = dict.fromkeys(pair for rows in with_negatives(train).values() for pair in pairs_of(rows))
        return [pair for pair in pairs if digest(*pair) not in known]


def add_teacher_scores(
    train: DatasetDict,
    teacher: TeacherConfig,
    device: str,
    echo: Callable[[str], None],
    base: ModelConfig | None = None,
    languages: Languages | None = None,
) -> dict[str, Any]:
    """Give every row that has negatives the teachers' scores of its passages, as its label; null where a row has none.

    Only pairs that were never scored go through a model, each process of a machine taking its share. A teacher that is
    the base model has the prompts of `base`, the config's model. languages: of the rows of each set, for bm25. Returns what
    run.json records. Raises ConfigError when no row has a negative, or the data has no scores that it shall have.
    """
    taught = with_negatives(train)
    if not taught:
        raise ConfigError(
            "loss.teacher: no data set has negatives, and a teacher compares passages. Add negatives, or find them with "
            "datasets.<name>.mine"
        )
    scores: dict[str, list[np.ndarray]] = {name: [] for name in taught}
    records, pairs_scored = [], 0
    for key, one in teacher.teachers.items():
        if one.kind in KINDS_OF_MODELS:
            files = TeacherFiles(key, one, base)
            found, count = _scores_of_model(train, files, device, echo)
            pairs_scored += count
            records.append({"model": one.model, "identity": identity(files.snapshot), "kind": one.kind})
        else:
            found = _scores_of_bm25(taught, languages or {}) if one.kind == "bm25" else _scores_of_data(taught)
            records.append({"kind": one.kind})
        for name, values in found.items():
            scores[name].append(values)
    weights = [one.weight for one in teacher.teachers.values()]
    rows_taught = 0
    for name, rows in taught.items():
        labels = mean_scores(scores[name], weights, normalize=teacher.normalizes)
        known = np.isfinite(labels).all(axis=1)
        rows_taught += int(known.sum())
        columns = [values if is_known else None for values, is_known in zip(labels.tolist(), known, strict=True)]
        plain = rows.remove_columns(LABEL) if LABEL in rows.column_names else rows
        train[name] = plain.add_column(LABEL, columns) if known.any() else plain
    if teacher.normalizes and any(len(negatives_of(rows.column_names)) == 1 for rows in taught.values()):
        echo(f"Warning: loss.teacher: {ONE_NEGATIVE}")
    return {"teachers": records, "rows": rows_taught, "pairs_scored": pairs_scored}


def _scores_of_model(
    train: DatasetDict, files: TeacherFiles, device: str, echo: Callable[[str], None]
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
        score, network = files.load_scorer(device)
        # a model that gives each text a vector reads at most two texts for each pair
        share = processes_here() / (1 if files.teacher.kind == "cross-encoder" else 2)
        with encoding(network, in_columns("teacher", str(model)), len(missing), "pairs", share) as progress:
            for number, part in enumerate(own, 1):
                store.add(part, score)
                progress.reach(min(number * PAIRS_PER_PART * processes_here(), len(missing)))
    wait()
    known, found = store.read(), {}
    for name, rows in with_negatives(train).items():
        scores = np.array([known[digest(*pair)] for pair in pairs_of(rows)], dtype=np.float32)
        found[name] = scores.reshape(len(passages_of(rows.column_names)), -1).T
    return found, len(missing)


def _scores_of_bm25(taught: dict[str, Dataset], languages: Languages) -> dict[str, np.ndarray]:
    found = {}
    for name, rows in taught.items():
        texts, vectors = bm25_vectors(rows, languages[name])
        columns = [
            row_products(vectors.queries[texts.queries], vectors.passages[column]) for column in texts.passages.T
        ]
        found[name] = np.stack(columns, axis=1)
    return found


def _scores_of_data(taught: dict[str, Dataset]) -> dict[str, np.ndarray]:
    """The scores that the rows came with; NaN where a row has none. Raises ConfigError when none has any."""
    if not any(LABEL in rows.column_names for rows in taught.values()):
        raise ConfigError(
            "loss.teacher: kind is data, but no row with negatives has scores. Name their column: "
            "datasets.<name>.columns.scores"
        )
    found = {}
    for name, rows in taught.items():
        scores = np.full((len(rows), len(passages_of(rows.column_names))), np.nan, dtype=np.float32)
        for number, values in enumerate(rows[LABEL] if LABEL in rows.column_names else []):
            if values is not None:
                scores[number] = values
        found[name] = scores
    return found


def missing_scores_lines(teacher: TeacherConfig, train: DatasetDict, base: ModelConfig) -> list[str]:
    """Per teacher that is a model: how much it has to read before the first step."""
    rows, lines = sum(map(len, with_negatives(train).values())), []
    for key, one in teacher.teachers.items():
        if one.kind not in KINDS_OF_MODELS:
            lines.append(f"teacher   {one.kind}: {rows:,} rows with negatives to teach")
            continue
        try:
            missing = ScoreStore(TeacherFiles(key, one, base)).missing(train)
        except HubUnreachable:
            lines.append(f"teacher   needs the hub: {one.model}")
            continue
        lines.append(
            f"teacher   {one.model}: {rows:,} rows with negatives to teach, {len(missing):,} pairs to score first"
        )
    return lines
