"""Scores of a stronger model for every query with its passages, which the encoder then learns to imitate."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from trainer.config import ConfigError, one_line
from trainer.config.schema import ModelConfig, TeacherConfig
from trainer.data import mining
from trainer.data.rows import LABEL
from trainer.hub.cache import cached_table, digest, folder_of, identity
from trainer.hub.download import HubUnreachable, Snapshot, fetch
from trainer.models.prompts import prompts_of, quoted
from trainer.models.weights import loading
from trainer.system.distributed import processes_here, wait
from trainer.system.progress_bar import encoding, in_columns

Pair = tuple[str, str]
Score = Callable[[list[Pair]], np.ndarray]
Loaded = tuple[Score, Any]  # and the module that all of its texts go through

KEY = "loss.teacher.model"
PAIRS_PER_PART = 5_000
SCORES = pa.schema([("pair", pa.string()), ("score", pa.float32())])


def fetch_teacher(teacher: TeacherConfig) -> Snapshot:
    """The teacher's files. Raises ConfigError when they cannot be had."""
    return fetch(teacher.model, teacher.revision, kind="model", why="the teacher", key=KEY)


def pairs_of(rows: Dataset) -> list[Pair]:
    """Every query with its positive, then every query with its negative, row by row."""
    columns = rows.with_format("arrow")[:]
    anchors = columns["anchor"].to_pylist()
    return [pair for role in ("positive", "negative") for pair in zip(anchors, columns[role].to_pylist(), strict=True)]


def with_negatives(train: DatasetDict) -> dict[str, Dataset]:
    """The sets that a teacher can compare passages in; pairs have one passage per query."""
    return {name: rows for name, rows in train.items() if "negative" in rows.column_names}


def teacher_prompts(teacher: TeacherConfig, snapshot: Snapshot, base: ModelConfig | None) -> dict[str, str]:
    """What a dense teacher reads in front of queries and passages; a cross-encoder reads nothing."""
    return prompts_of(teacher.model, snapshot.folder, base) if teacher.kind == "dense" else {}


class ScoreStore:
    """Scores by the content of a pair, in the folder of one teacher at one revision; every file in it is whole."""

    def __init__(self, teacher: TeacherConfig, snapshot: Snapshot, base: ModelConfig | None = None) -> None:
        """base: the config's model, for the prompts of a teacher that is the base model."""
        prompts = quoted(teacher_prompts(teacher, snapshot, base))
        of_teacher = digest(identity(snapshot), teacher.kind, *([prompts] if prompts else []))
        self.folder = (
            Path(teacher.cache).expanduser() / of_teacher if teacher.cache else folder_of("scores", of_teacher)
        )

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
) -> dict[str, Any]:
    """Give every row that has a negative the teacher's scores of positive and negative, as its label.

    Only pairs that were never scored go through the teacher, each process of a machine taking its share. A teacher that is
    the base model has the prompts of `base`, the config's model. Returns what run.json records. Raises ConfigError when no
    row has a negative.
    """
    if not with_negatives(train):
        raise ConfigError(
            "loss.teacher: no data set has negatives, and a teacher compares passages. Add negatives, or find them with "
            "datasets.<name>.mine"
        )
    snapshot = fetch_teacher(teacher)
    store = ScoreStore(teacher, snapshot, base)
    missing = store.missing(train)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    wait()  # every process has seen the same scores before one adds to them
    parts = [missing[start : start + PAIRS_PER_PART] for start in range(0, len(missing), PAIRS_PER_PART)]
    if parts:
        echo(f"teacher   {teacher.model}: scoring {len(missing):,} pairs (kept in {store.folder})")
    if own := parts[rank :: processes_here()]:
        score, network = TEACHERS[teacher.kind](snapshot, teacher, device, base)
        # a dense model reads at most two texts for each pair
        share = processes_here() / (2 if teacher.kind == "dense" else 1)
        with encoding(network, in_columns("teacher", teacher.model), len(missing), "pairs", share) as progress:
            for number, part in enumerate(own, 1):
                store.add(part, score)
                progress.reach(min(number * PAIRS_PER_PART * processes_here(), len(missing)))
    wait()
    known = store.read()
    rows_scored = 0
    for name, rows in with_negatives(train).items():
        scores = np.array([known[digest(*pair)] for pair in pairs_of(rows)], dtype=np.float32)
        train[name] = rows.add_column(LABEL, scores.reshape(2, -1).T.tolist())
        rows_scored += len(rows)
    return {
        "model": teacher.model,
        "identity": identity(snapshot),
        "kind": teacher.kind,
        "rows": rows_scored,
        "pairs_scored": len(missing),
    }


def missing_scores_line(teacher: TeacherConfig, train: DatasetDict, base: ModelConfig) -> str:
    """How many pairs the teacher has to score before the first step."""
    try:
        missing = ScoreStore(teacher, fetch_teacher(teacher), base).missing(train)
    except HubUnreachable:
        return f"teacher   needs the hub: {teacher.model}"
    rows = sum(map(len, with_negatives(train).values()))
    return f"teacher   {teacher.model}: {rows:,} rows with a negative to teach, {len(missing):,} pairs to score first"


# ------------------------------------------------------------------------------------------- kinds of teachers
def load_cross_encoder(snapshot: Snapshot, teacher: TeacherConfig, device: str, base: ModelConfig | None) -> Loaded:
    """Reads a query and a passage together (arXiv 1901.04085); scores are logits."""
    from sentence_transformers import CrossEncoder
    from torch import nn

    with loading(KEY, teacher.model, " as a cross-encoder"):
        model = CrossEncoder(str(snapshot.folder), device=device)
    if model.num_labels != 1:
        raise ConfigError(
            f"{KEY}: {teacher.model} gives {model.num_labels} numbers per pair; a teacher gives one score"
        )
    logits = nn.Identity()  # the library's default squeezes them into 0..1, where all margins are alike
    options = {"batch_size": teacher.batch_size, "activation_fn": logits, "show_progress_bar": False}
    return partial(model.predict, **options), model[0]


def load_dense(snapshot: Snapshot, teacher: TeacherConfig, device: str, base: ModelConfig | None) -> Loaded:
    """A sentence encoder; scores are its own similarity of query and passage, each behind its prompt."""
    model = mining.load_dense(snapshot, KEY, teacher_prompts(teacher, snapshot, base), device)

    def score(pairs: list[Pair]) -> np.ndarray:
        options = {"batch_size": teacher.batch_size, "show_progress_bar": False, "convert_to_tensor": True}
        vectors = []
        for side, encode in enumerate((model.encode_query, model.encode_document)):
            texts = dict.fromkeys(pair[side] for pair in pairs)
            place = {text: number for number, text in enumerate(texts)}
            vectors.append(encode(list(texts), **options)[[place[pair[side]] for pair in pairs]])
        return model.similarity_pairwise(*vectors).float().cpu().numpy()

    return score, model[0]


TEACHERS: dict[str, Callable[[Snapshot, TeacherConfig, str, ModelConfig | None], Loaded]] = {
    "cross-encoder": load_cross_encoder,
    "dense": load_dense,
}
