"""Loads the data sets of a config: clean rows, mined negatives, held-out rows, searches."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict

from trainer.config import Config, ConfigError
from trainer.data.beir import SearchSet, files_beside, is_beir
from trainer.data.choosing import read_search_splits, search_splits
from trainer.data.held_out import hold_out
from trainer.data.mining import fill_negatives, search_of
from trainer.data.negatives import FEW, by_count, count_negatives, parted_like, with_at_most
from trainer.data.roles import negatives_of, roles_of
from trainer.data.rows import Rows, fingerprint
from trainer.data.self_mining import ToMine
from trainer.data.sources import LoadedSource, mining_of, sample, sources_of
from trainer.data.texts import Reading
from trainer.data.training_data import SetSummary, TrainingData
from trainer.hub.download import HubUnreachable
from trainer.runs.choice import REPORTED, SCORE
from trainer.system.distributed import processes
from trainer.system.progress_bar import going_on, in_columns


def load_data(config: Config, *, without_hub: bool = False) -> TrainingData:
    """Every enabled data set, ready to train on. Raises ConfigError, one line, when a source cannot be used.

    without_hub: sets that need the hub, while it cannot be reached, are left out and named in `unreachable`: for
    `make check`, never for training.
    """
    data = TrainingData(DatasetDict(), DatasetDict(), {}, {})
    sources: dict[str, LoadedSource] = {}
    for name, load in sources_of(config.datasets).items():
        with _reachable(data, name, without_hub), going_on(in_columns("reading", name)):
            sources[name] = _usable(name, load(), config)
    if sources:
        hold_out(list(sources.values()), config.training.seed)
    for name, source in sources.items():
        with _reachable(data, name, without_hub):
            _add_set(data, name, source, config)
    for folder in config.evaluation.search:
        with going_on(in_columns("reading", folder)):
            data.add_search(*_search_folder(folder), config)
    _no_name_of_a_mean(data.search, config)
    return data


def _no_name_of_a_mean(search: list[SearchSet], config: Config) -> None:
    """The score of a set called `search` would be taken for the mean. Where it is the only one, it is the mean."""
    alone = len(search) == 1 and config.evaluation.nanobeir_datasets == []
    for name in (found.name for found in search):
        if f"{name}_ndcg@10" in ([SCORE] if alone else [SCORE, REPORTED]):
            raise ConfigError(
                f"evaluation.search: {name}_ndcg@10 is the mean over all searches, so a set cannot be called '{name}'. "
                "Rename its folder"
            )


@contextlib.contextmanager
def _reachable(data: TrainingData, name: str, without_hub: bool) -> Iterator[None]:
    """Name a set that needs the hub as unreachable, where data may be loaded without the hub."""
    try:
        yield
    except HubUnreachable:
        if not without_hub:
            raise
        data.unreachable.append(name)


def _search_folder(folder: str) -> tuple[SearchSet, SearchSet | None]:
    """The search that is reported, and the one that chooses the checkpoint, if there is one."""
    path = Path(folder).expanduser()
    splits = search_splits(path) if is_beir(path) else []
    if not splits:
        raise ConfigError(f"evaluation.search: {folder} is not a folder in BEIR layout with a dev split")
    reported, *validation = read_search_splits(path, splits, path.name)
    reported.reading.pass_over("files", files_beside(path, *splits))
    return reported, validation[0] if validation else None


def _usable(name: str, source: LoadedSource, config: Config) -> LoadedSource:
    """A source with as many rows as are asked for. Raises ConfigError when it has none."""
    if not len(source.rows):
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.rows.left_out.items())
        raise ConfigError(f"datasets.{name}: no rows to train on{f' ({reasons})' if reasons else ''}")
    if mining_of(config.datasets, name):
        source.everything = [part.table for part in (source.rows, source.eval_rows) if part is not None]
    if source.max_samples:
        source.rows = sample(source.rows, source.max_samples, config.training.seed)
    return source


def _add_set(data: TrainingData, name: str, source: LoadedSource, config: Config) -> None:
    """Mine a source's missing negatives, and split its rows, those held out too, by their number of negatives."""
    rows, held_out = source.rows, source.eval_rows
    assert held_out is not None  # since hold_out
    mined: dict[str, int | str] = {}
    if mining := mining_of(config.datasets, name):
        given = rows
        rows, mined = fill_negatives(name, rows, source.everything, mining, config.model)
        if mining.method == "self" and mined:
            is_mined = count_negatives(given.table) == 0
            data.to_mine[name] = ToMine(mining, rows.table, is_mined, search_of(given.table, source.everything))
    most = config.datasets.negatives_per_row
    rows = _with_at_most(rows, most)
    subsets = by_count(name, rows.table)
    data.subsets[name] = list(subsets)
    for subset, table in subsets.items():
        data.languages[subset] = table["language"].to_pylist()
        data.train[subset] = Dataset(table.drop_columns("language"))
    counts = Counter({len(negatives_of(table.column_names)): table.num_rows for table in subsets.values()})
    evaluated, cut = parted_like(name, held_out.table, counts)
    held_out.reading.counts["negatives of held-out rows, beyond those that rows to train on have"] += cut
    for subset, table in evaluated.items():
        if table.num_rows >= processes():  # every process evaluates an equal part of each batch
            data.eval[subset] = Dataset(table.select(roles_of(table.column_names)))
        else:
            rows.left_out[f"held out in vain: too few to evaluate in {processes()} processes"] = table.num_rows
    if source.search:
        data.add_search(source.search, source.validation, config)
    if more := counts.total() - len(rows):
        rows.reading.notes[f"rows more, since fewer than {FEW} have the same number of negatives"] += more
    data.summaries[name] = SetSummary(
        name=name,
        rows=counts.total(),
        triplets=counts[1],
        pairs=counts[0],
        several={str(count): counts[count] for count in sorted(counts, reverse=True) if count > 1},
        eval_rows=len(held_out),
        eval_left_out=dict(+held_out.left_out),
        languages=Rows(pa.concat_tables([table.select(["language"]) for table in subsets.values()])).languages,
        left_out=dict(+rows.left_out),
        revisions=source.revisions,
        fingerprint=fingerprint(rows.table),
        mined=mined,
        notes=list((rows.reading + held_out.reading).lines()),
    )


def _with_at_most(rows: Rows, most: int | None) -> Rows:
    """datasets.negatives_per_row: a row with more negatives becomes several. A note says so."""
    if most is None:
        return rows
    table = with_at_most(rows.table, most)
    reading = Reading(notes=Counter({f"rows more, since datasets.negatives_per_row is {most}": len(table) - len(rows)}))
    return Rows(table, rows.left_out, rows.reading + reading)
