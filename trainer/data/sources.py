"""Where the rows come from: the three families, the embedded quickstart data, and the user's own sets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config import ConfigError, is_local, one_line
from trainer.config.schema import DatasetsConfig, FamilySource, HubSource, LocalSource, MiningConfig, ScandiQaConfig
from trainer.data.beir import SearchSet, files_beside, has_split, is_beir, read_search_set
from trainer.data.choosing import read_search_splits, search_splits
from trainer.data.rows import Columns, Rows, join, read_files, read_parquet, rows_from_table
from trainer.data.texts import Reading, listed
from trainer.hub.download import Snapshot, fetch

QUICKSTART = Path(__file__).parent / "quickstart"
QA: Columns = {"anchor": "question", "positive": "context"}
TRIPLET: Columns = {"anchor": "anchor", "positive": "positive", "negative": "negative"}
DDSC: Columns = TRIPLET | {"anchor": "query"}
PAWS: Columns = {"anchor": "sentence1", "positive": "sentence2", "label": "label"}
# Of each source of scandi_qa, the columns that are read, and the language of each subset; None: it has no subsets.
SCANDI_QA: dict[str, tuple[Columns, dict[str | None, str]]] = {
    "norquad": (QA, {None: "no"}),
    "noropenbookqa": ({"anchor": "question_stem", "positive": "fact"}, {"nb": "nb"}),  # without a fact, no row
    "scandiqa": (QA, {"no": "no", "da": "da", "sv": "sv"}),
    "supervised_da": ({"anchor": "query", "positive": "pos"}, {None: "da"}),
    "paws_x": (PAWS, {"nb": "nb", "nn": "nn"}),
}
QUICKSTART_SETS = {"nli": TRIPLET, "scandi_qa": QA, "ddsc": DDSC, "sister_languages": QA}
# The embedded sets that bring a search set: its name, and its folder in QUICKSTART.
QUICKSTART_SEARCHES = {"nli": ("quickstart", "search"), "sister_languages": ("sister_languages", "sister_languages")}


@dataclass
class LoadedSource:
    """One data set: rows to train on, rows for the evaluation loss (None: hold some out), and searches."""

    rows: Rows
    eval_rows: Rows | None = None
    everything: list[pa.Table] = field(default_factory=list)  # where negatives are mined: its answers to each query
    hold_out: int = 0
    max_samples: int | None = None
    search: SearchSet | None = None
    validation: SearchSet | None = None  # queries that choose the checkpoint in the place of some of `search`
    revisions: dict[str, str | None] = field(default_factory=dict)


def read_split(snapshot: Snapshot, subset: str | None, split: str, key: str) -> tuple[pa.Table, list[str]]:
    """One split of a data set repository (or of a local copy), as a table, and the names of all its splits."""
    parquet = sorted(snapshot.folder.glob("*/*/*.parquet")) if snapshot.folder.is_dir() else []
    wanted = _split_name(subset, split)
    # the layout of the hub's refs/convert/parquet, which script-based data sets need
    splits = {file: _split_name(file.parts[-3], file.parts[-2]) for file in parquet}
    if files := [file for file, name in splits.items() if name == wanted]:
        tables = [read_parquet(file) for file in files]
        try:
            return pa.concat_tables(tables, promote_options="permissive"), list(dict.fromkeys(splits.values()))
        except pa.ArrowException as error:
            raise ConfigError(f"{key}: the files of {snapshot.source} do not fit together: {error}") from None
    import datasets

    try:
        rows = datasets.load_dataset(str(snapshot.folder), subset, split=split)
    except Exception as error:  # the library raises a dozen types here, some of them its own
        reason = one_line(error)
        raise ConfigError(
            f"{key}: {snapshot.source} has no readable split '{split}'{f' of {subset}' if subset else ''}: {reason}"
        ) from None
    return rows.with_format("arrow")[:], [_split_name(subset, name) for name in rows.info.splits or ()]


def _split_name(subset: str | None, split: str) -> str:
    return split if subset in (None, "default") else f"{subset}/{split}"


@dataclass(frozen=True)
class _Opened:
    """A hub source whose files are here."""

    source: HubSource | LocalSource
    key: str
    snapshot: Snapshot
    splits: dict[str, bool] = field(default_factory=dict)  # that are known of, and whether they were read

    def rows(self, columns: Columns, split: str, language: str | None, subset: str | None = None) -> Rows:
        return rows_from_table(self.table(split, subset), columns, language, where=self.source.source)

    def table(self, split: str, subset: str | None = None) -> pa.Table:
        table, splits = read_split(self.snapshot, subset, split, self.key)
        self.splits.update({name: self.splits.get(name, False) for name in splits} | {_split_name(subset, split): True})
        return table

    def name_unread_splits(self, reading: Reading) -> None:
        """Have the plan name the splits that were not read."""
        reading.pass_over("splits", (name for name, is_read in self.splits.items() if not is_read))

    @property
    def revisions(self) -> dict[str, str | None]:
        return {self.source.source: self.snapshot.commit}


def _open(source: HubSource | LocalSource, key: str, why: str) -> _Opened:
    return _Opened(source, key, fetch(source.source, source.revision, kind="dataset", why=why, key=key))


# ------------------------------------------------------------------------------------------- families
def load_nli(source: FamilySource) -> LoadedSource:
    """Fremtind/all-nli-norwegian: a sentence, one it entails, one it contradicts."""
    opened = _open(source, "datasets.nli.source", "the Norwegian NLI data")
    dev = opened.rows(TRIPLET, "dev", "no")
    dev = Rows(dev.table.slice(0, source.eval_rows), reading=dev.reading)
    rows = opened.rows(TRIPLET, "train", "no")
    opened.name_unread_splits(rows.reading)
    return LoadedSource(rows, dev, max_samples=source.max_samples, revisions=opened.revisions)


def load_ddsc(source: FamilySource) -> LoadedSource:
    """DDSC/nordic-embedding-training-data: about 60 % of the rows have no negative, and are kept as pairs."""
    opened = _open(source, "datasets.ddsc.source", "the Nordic retrieval data")
    rows = opened.rows(DDSC, "train", "language")
    opened.name_unread_splits(rows.reading)
    return LoadedSource(rows, hold_out=source.eval_rows, max_samples=source.max_samples, revisions=opened.revisions)


def load_scandi_qa(config: ScandiQaConfig) -> LoadedSource:
    """Five question-answering sources as one set; each has a switch of its own."""
    parts: list[Rows] = []
    revisions: dict[str, str | None] = {}
    for name, (columns, languages) in SCANDI_QA.items():
        source: HubSource | None = getattr(config, name)
        if source is None or not source.enabled:
            continue
        opened = _open(source, f"datasets.scandi_qa.{name}.source", f"scandi_qa's {name}")
        if columns is PAWS:
            rows = join([_paws_rows(opened, subset) for subset in languages])
        else:
            rows = join([opened.rows(columns, "train", language, subset) for subset, language in languages.items()])
        opened.name_unread_splits(rows.reading)
        parts.append(sample(rows, source.max_samples, seed=0) if source.max_samples else rows)
        revisions |= opened.revisions
    if not parts:
        raise ConfigError("datasets.scandi_qa: every one of its sources is switched off; set scandi_qa.enabled: false")
    return LoadedSource(join(parts), hold_out=config.eval_rows, revisions=revisions)


def _paws_rows(opened: _Opened, subset: str | None) -> Rows:
    """Label 1 is a paraphrase, hence a pair; label 0 is a near miss, hence the negative of the same first sentence."""
    table = opened.table("train", subset)
    if missing := set(PAWS.values()) - set(table.column_names):
        raise ConfigError(
            f"{opened.key}: there is no column '{min(missing)}' in {subset}. It has: {', '.join(table.column_names)}"
        )
    try:
        is_pair = pc.equal(table["label"].cast(pa.int64()), 1)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{opened.key}: {subset} has a label that is not 1 (a paraphrase) or 0: {error}") from None
    pairs, misses = table.filter(is_pair), table.filter(pc.invert(is_pair))
    negatives = dict(zip(misses["sentence1"].to_pylist(), misses["sentence2"].to_pylist(), strict=True))
    anchors = pairs["sentence1"].to_pylist()
    triplets = {
        "anchor": pa.array(anchors, pa.string()),
        "positive": pairs["sentence2"].cast(pa.string()),
        "negative": pa.array([negatives.get(anchor) for anchor in anchors], pa.string()),
    }
    rows = rows_from_table(pa.table(triplets), TRIPLET, subset, where=opened.source.source)
    rows.reading.pass_over("columns", (name for name in table.column_names if name not in PAWS.values()))
    paraphrased = set(anchors)
    with_paraphrase = sum(sentence in paraphrased for sentence in misses["sentence1"].to_pylist())
    used = len(negatives.keys() & paraphrased)
    rows.left_out["near misses without a paraphrase of the same sentence"] += len(misses) - with_paraphrase
    rows.left_out["near misses beside another of the same sentence"] += with_paraphrase - used
    return rows


# ------------------------------------------------------------------------------------------- own and embedded
def load_quickstart(name: str) -> LoadedSource:
    """One of the embedded sets. Two bring a search set, whose texts are in no set."""
    columns = QUICKSTART_SETS[name]
    rows = read_files(str(QUICKSTART / f"{name}.jsonl"), columns, "language", "datasets.quickstart")
    search = None
    if name in QUICKSTART_SEARCHES:
        search_name, folder = QUICKSTART_SEARCHES[name]
        search = read_search_set(QUICKSTART / folder, "dev", search_name)
    return LoadedSource(rows, hold_out=500, search=search)


def load_local(name: str, source: LocalSource) -> LoadedSource:
    """A data set of the user's own: BEIR layout, files, or a hub repository with `columns`."""
    key = f"datasets.{name}.source"
    folder = Path(source.source).expanduser()
    common: dict[str, Any] = {"hold_out": source.eval_rows, "max_samples": source.max_samples}
    if is_local(source.source) and is_beir(folder):
        return _load_beir(name, source, folder, common)
    columns = source.columns.model_dump(exclude_none=True) if source.columns else None
    if is_local(source.source) and not folder.is_dir():
        return LoadedSource(read_files(source.source, columns, source.language, key), **common)
    opened = _open(source, key, f"your data set '{name}'")
    if columns is None:
        raise ConfigError(
            f"{key}: {source.source} is not in BEIR layout (no corpus.jsonl). Name a file or glob (*.jsonl, *.parquet), "
            f"or give datasets.{name}.columns"
        )
    dev = opened.rows(columns, source.eval_split, source.language, source.subset) if source.eval_split else None
    rows = opened.rows(columns, source.split, source.language, source.subset)
    opened.name_unread_splits(rows.reading)
    return LoadedSource(rows, dev, revisions=opened.revisions, **common)


def _load_beir(name: str, source: LocalSource, folder: Path, common: dict[str, Any]) -> LoadedSource:
    splits = search_splits(folder, source.eval_split)
    for key, wanted in (("split", source.split), ("eval_split", source.eval_split)):
        if wanted and not has_split(folder, wanted):
            raise ConfigError(
                f"datasets.{name}.{key}: {folder} has no qrels/{wanted}.tsv or qrels.{wanted}.tsv. "
                f"It holds: {listed(files_beside(folder))}"
            )
    trained = read_search_set(folder, source.split, name)
    search, validation = [*read_search_splits(folder, splits, name, trained.corpus), None, None][:2]
    rows = pairs_of(trained, source.language)
    rows.reading = trained.reading
    rows.reading.pass_over("files", files_beside(folder, source.split, *splits))
    eval_rows = pairs_of(search, source.language) if search else None
    return LoadedSource(rows, eval_rows, search=search, validation=validation, **common)


def pairs_of(search: SearchSet, language: str | None) -> Rows:
    """One row per query and relevant passage."""
    pairs = [
        {"anchor": text, "positive": search.corpus[passage]}
        for query, text in search.queries.items()
        for passage in sorted(search.relevant[query])
    ]
    table = pa.Table.from_pylist(pairs, pa.schema({"anchor": pa.string(), "positive": pa.string()}))
    return rows_from_table(table, {"anchor": "anchor", "positive": "positive"}, language, where=search.name)


def sample(rows: Rows, size: int, seed: int) -> Rows:
    """A random sample, in random order; the rest is counted as left out."""
    if len(rows) <= size:
        return rows
    chosen = np.random.default_rng(seed).permutation(len(rows))[:size]
    return rows.take(chosen, **{"over max_samples": len(rows) - size})


def sources_of(config: DatasetsConfig) -> dict[str, Callable[[], LoadedSource]]:
    """How to load every enabled data set, by name. One that fails stops the run: the mix never changes silently."""
    loaders: dict[str, Callable[[], LoadedSource]] = {}
    if config.nli and config.nli.enabled:
        loaders["nli"] = partial(load_nli, config.nli)
    if config.scandi_qa and config.scandi_qa.enabled:
        loaders["scandi_qa"] = partial(load_scandi_qa, config.scandi_qa)
    if config.ddsc and config.ddsc.enabled:
        loaders["ddsc"] = partial(load_ddsc, config.ddsc)
    if config.quickstart and config.quickstart.enabled:
        for embedded in config.quickstart.sets:
            loaders[f"quickstart_{embedded}"] = partial(load_quickstart, embedded)
    for name, source in config.local.items():
        if source.enabled:
            loaders[name] = partial(load_local, name, source)
    return loaders


def mining_of(config: DatasetsConfig, name: str) -> MiningConfig | None:
    """How a data set's missing negatives are mined, by the name it has in `sources_of`."""
    if name in config.local:
        return config.local[name].mine
    return getattr(config, "quickstart" if name.startswith("quickstart_") else name).mine
