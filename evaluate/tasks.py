"""The retrieval tasks a model is measured on: mteb's, by group or name, and local folders in BEIR layout."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from trainer.config import ConfigError, did_you_mean, one_line
from trainer.config.words import split_names
from trainer.data.beir import files_beside, files_of, has_split, is_beir, read_records, read_search_set
from trainer.data.texts import COMPOSED, Reading, as_strings
from trainer.system.progress_bar import going_on, in_columns

NORWEGIAN = ("NorQuadRetrieval", "SNLRetrieval")
DANISH = ("DanFeverRetrieval", "TV2Nordretrieval", "TwitterHjerneRetrieval")
SWEDISH = ("SweFaqRetrieval", "SwednRetrieval")
NANO_TOPICS = (
    "ArguAna ClimateFever DBPedia FEVER FiQA2018 HotpotQA MSMARCO NFCorpus NQ Quora SCIDOCS SciFact Touche2020"
)
NANO = tuple(f"MultilingualNano{topic}Retrieval" for topic in NANO_TOPICS.split(" "))
GROUPS = {
    "scandinavian": NORWEGIAN + DANISH + SWEDISH,
    "norwegian": NORWEGIAN,
    "danish": DANISH,
    "swedish": SWEDISH,
    "nano": NANO,
}
# Languages that a multilingual task is restricted to. `nor` is what some tasks call either Norwegian.
LANGUAGES = ("nob", "nno", "nor", "dan", "swe")
SPLITS = ("test", "dev", "validation", "train")
# What the languages of our configs and of BEIR folders are in mteb's metadata.
ISO = {"no": "nob-Latn", "nb": "nob-Latn", "nn": "nno-Latn", "da": "dan-Latn", "sv": "swe-Latn"}


def select_tasks(names: list[str], language: str | None = None) -> list[AbsTaskRetrieval]:
    """The tasks that groups, mteb names and folders (`folder`, or `folder:no`) stand for, each once, in order.

    `language` is that of folders without one. Raises ConfigError for an unknown name, with the nearest one.
    """
    chosen: dict[str, AbsTaskRetrieval] = {}
    for name in names:
        for task in _tasks_of(name, language):
            other = chosen.setdefault(task.metadata.name, task)
            if getattr(other, "folder", None) != getattr(task, "folder", None):
                raise ConfigError(f"two tasks are called '{task.metadata.name}'. Rename one of the folders")
    if not chosen:
        raise ConfigError(f"no task is named. Groups: {', '.join(GROUPS)}")
    return list(chosen.values())


def task_names(text: str) -> list[str]:
    """Groups, names and folders between blanks or commas; a folder's own blanks stay."""

    def is_folder(name: str) -> bool:
        folder, language = _folder_and_language(name)
        return (language is None or language in ISO) and folder.is_dir()

    return split_names(text, is_folder)


def _folder_and_language(name: str) -> tuple[Path, str | None]:
    folder, colon, language = name.rpartition(":")
    return Path(folder or name).expanduser(), language if colon else None


def _tasks_of(name: str, language: str | None) -> Iterator[AbsTaskRetrieval]:
    folder, own_language = _folder_and_language(name)
    if own_language is not None and own_language not in ISO:
        raise ConfigError(f"{name}: the language of a folder is one of {', '.join(ISO)}, not '{own_language}'")
    if own_language is not None or "/" in name or Path(name).is_dir():
        yield local_task(folder, language if own_language is None else own_language)
        return
    known = {task.metadata.name for task in mteb.get_tasks(task_types=["Retrieval"])}
    wanted = GROUPS.get(name, (name,))
    for task in wanted:
        if task not in known:
            near = did_you_mean(task, known | GROUPS.keys()) if len(wanted) == 1 else ""
            near = near if near.startswith(" Did") else f" Groups: {', '.join(GROUPS)}."
            raise ConfigError(f"there is no retrieval task '{task}'.{near} A folder is written with a slash: ./{task}")
        tasks = mteb.get_tasks(tasks=[task], languages=list(LANGUAGES), exclusive_language_filter=True)
        if not tasks:
            raise ConfigError(f"the task {task} has no part in Norwegian, Danish or Swedish")
        yield from tasks


def local_task(folder: Path, language: str | None) -> AbsTaskRetrieval:
    """A folder in BEIR layout as an offline mteb task, on the first of SPLITS that it has."""
    if not is_beir(folder):
        raise ConfigError(f"{folder} is no folder in BEIR layout: there is no corpus.jsonl")
    split = next((split for split in SPLITS if has_split(folder, split)), None)
    if split is None:
        raise ConfigError(f"{folder} has no judgements: qrels/<split>.tsv or qrels.<split>.tsv for {', '.join(SPLITS)}")
    digest = hashlib.sha256()
    for file in files_of(folder, split):
        digest.update(file.read_bytes())
    name = re.sub(r"\W+", "_", folder.resolve().name)
    metadata = TaskMetadata(
        name=name,
        description=f"Local search set {name}",
        dataset={"path": f"local/{name}", "revision": digest.hexdigest()[:40]},
        type="Retrieval",
        category="t2t",
        eval_splits=[split],
        eval_langs=[ISO.get(language or "", "mis-Latn")],
        main_score="ndcg_at_10",
    )
    return type(f"{name}Task", (LocalTask,), {"metadata": metadata})(folder.resolve(), split)


def load(task: AbsTaskRetrieval) -> dict[str, dict[str, Any]]:
    """A task's data by subset and split, its texts in NFC; it stays when mteb drops it. ConfigError when there is none."""
    try:
        with going_on(in_columns("data", task.metadata.name, 12)):
            task.load_data()
            task.convert_v1_dataset_format_to_v2(num_proc=None)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub, datasets or the task's own code raise
        reason = one_line(error) or type(error).__name__
        raise ConfigError(f"the data of {task.metadata.name} cannot be loaded: {reason}") from None
    task.reading = reading_of(task)
    for splits in task.dataset.values():
        for data in splits.values():
            data |= {side: _in_nfc(data[side], task.reading) for side in ("queries", "corpus")}
    return task.dataset


def reading_of(task: AbsTaskRetrieval) -> Reading:
    """How a task's data was read: what was changed, passed over or counted. Empty until it is loaded."""
    return getattr(task, "reading", Reading())


def _in_nfc(rows: Dataset, reading: Reading) -> Dataset:
    """Texts in the one form of Unicode that training texts have too; ids are keys and stay."""
    table, before = rows.with_format("arrow")[:], reading.notes[COMPOSED]
    for name in {"title", "text"} & set(table.column_names):
        if (texts := as_strings(table[name])) is not None:
            table = table.set_column(table.column_names.index(name), name, reading.compose_column(texts))
    return Dataset(table) if reading.notes[COMPOSED] > before else rows


class LocalTask(AbsTaskRetrieval):
    """A search set read from files."""

    ignore_identical_ids = False
    data_loaded: bool

    def __init__(self, folder: Path, split: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder, self.split = folder, split

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the folder; ConfigError with file and line for what is wrong in it."""
        if self.data_loaded:
            return
        search_set = read_search_set(self.folder, self.split, self.metadata.name)
        self.reading = search_set.reading
        self.reading.pass_over("files", files_beside(self.folder, self.split))
        rows = read_records(files_of(self.folder, self.split).corpus, Reading())
        self.dataset = {
            "default": {
                self.split: {
                    "corpus": Dataset.from_list([{"id": row.id, "title": row.title, "text": row.text} for row in rows]),
                    "queries": Dataset.from_list([{"id": q, "text": text} for q, text in search_set.queries.items()]),
                    "relevant_docs": search_set.relevant,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True
