"""Runs a search system on tasks through mteb, and stores each task's result when it is complete."""

import contextlib
from collections.abc import Callable
from statistics import fmean
from typing import Any

import mteb
import pytrec_eval
from mteb.abstasks import AbsTaskRetrieval

from evaluate.search import SearchSystem
from evaluate.tasks import load, reading_of
from trainer.config import ConfigError, one_line
from trainer.runs.choice import hash_of
from trainer.runs.results import MAIN_METRIC, EvalFolder, Ranking, TaskScore, read_score
from trainer.system.files import write_json
from trainer.system.progress_bar import going_on, in_columns

# Passages stored per query, for fusion with other systems.
DEPTH = 100


def score_system(
    name: str,
    make_search: Callable[[], Any],
    fingerprint: str,
    tasks: list[AbsTaskRetrieval],
    folder: EvalFolder,
    echo: Callable[[str], None],
) -> dict[str, str]:
    """Score a system on every task into the folder. Returns the reason of each task that failed.

    A task is finished when its result was made by the same system (`fingerprint`), the same data and this mteb; it is
    not run again. What another state of the system scored is removed, also on other tasks: scores of two models must not
    stand in one column. `make_search` gives mteb's SearchProtocol; it is called when a task is to be run.
    """
    search, failed = None, {}
    for file in sorted(folder.score_file(name, "any").parent.glob("*.json")):
        if folder.made_with(name, file.stem).get("system") != fingerprint:
            folder.remove(name, file.stem)
    for task in tasks:
        mark = {
            "system": fingerprint,
            "data": task.metadata.dataset["revision"],
            "languages": ", ".join(task.languages),
            "mteb": mteb.__version__,
            "texts": "NFC, known by their hashes",
        }
        score = finished(folder, name, task.metadata.name, mark)
        if score is None:
            search = search or make_search()
            try:
                score = _run(name, search, task, folder, mark)
            except Exception as error:  # one task's failure is reported, and the others go on
                kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
                failed[task.metadata.name] = kind + one_line(error, 300)
                folder.remove(name, task.metadata.name)
                echo(in_columns(name, f"{task.metadata.name}: FAILED ({failed[task.metadata.name]})", 12))
                continue
        score = score.without_choosers(folder.manifest, {})
        note = f" ({score.note})" if score.note else ""
        echo(in_columns(name, f"{task.metadata.name}: nDCG@10 {score.main:.4f}{note}", 12))
        for line in reading_of(task).lines():
            echo(in_columns("", line, 12))
    return failed


def finished(folder: EvalFolder, system: str, task: str, mark: dict[str, str]) -> TaskScore | None:
    """A task's earlier score, when it was measured with what the mark names."""
    if not all(file.is_file() for file in folder.files(system, task)) or folder.made_with(system, task) != mark:
        return None
    return read_score(folder.score_file(system, task))


def _run(name: str, search: Any, task: AbsTaskRetrieval, folder: EvalFolder, mark: dict[str, str]) -> TaskScore:
    recorder = Recorder(search)
    data = load(task)
    shows_progress = isinstance(search, SearchSystem)
    with contextlib.nullcontext() if shows_progress else going_on(in_columns(name, task.metadata.name, 12)):
        result = mteb.evaluate(
            recorder, task, cache=None, show_progress_bar=False, encode_kwargs={"show_progress_bar": False}
        )
    rankings = {
        f"{split}/{subset}": Ranking(best(scores), data[subset][split]["relevant_docs"])
        for (subset, split), scores in recorder.rankings.items()
    }
    folder.write_rankings(name, task.metadata.name, rankings)
    per_query = {
        f"{part}/{query}": value
        for part, ranking in rankings.items()
        for query, value in ndcg_per_query(ranking).items()
    }
    file = folder.score_file(name, task.metadata.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    result.task_results[0].to_disk(file)
    note = getattr(search, "note", "")
    hashes = {
        f"{split}/{subset}/{row['id']}": hash_of(row["text"])
        for subset, split in recorder.rankings
        for row in data[subset][split]["queries"]
        if f"{split}/{subset}/{row['id']}" in per_query
    }
    write_json(
        folder.query_file(name, task.metadata.name),
        {"made_with": mark, "note": note, "queries": hashes, MAIN_METRIC: per_query},
    )
    return read_score(file)


def best(rankings: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The DEPTH best passages of every query; equal scores by descending id, as trec_eval orders them."""
    return {
        query: dict(sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)[:DEPTH])
        for query, scores in rankings.items()
    }


def ndcg_per_query(ranking: Ranking) -> dict[str, float]:
    """nDCG@10 of every query, by trec_eval; a query that found nothing scores 0."""
    scores = pytrec_eval.RelevanceEvaluator(ranking.relevant, {"ndcg_cut.10"}).evaluate(ranking.found)
    return {query: scores[query]["ndcg_cut_10"] if query in scores else 0.0 for query in ranking.relevant}


def mean_ndcg(parts: dict[str, Ranking]) -> float:
    """nDCG@10 as mteb reports it for a task: the mean over its splits and subsets, each the mean over its queries."""
    return fmean(fmean(ndcg_per_query(ranking).values()) for ranking in parts.values())


class Recorder:
    """A search system that remembers its rankings by subset and split."""

    def __init__(self, search: Any) -> None:
        self.inner = search
        self.mteb_model_meta = search.mteb_model_meta
        self.rankings: dict[tuple[str, str], dict[str, dict[str, float]]] = {}

    def index(self, corpus: Any, **options: Any) -> None:
        """As the inner system does."""
        self.inner.index(corpus, **options)

    def search(self, queries: Any, **options: Any) -> dict[str, dict[str, float]]:
        """As the inner system does."""
        ranking = self.inner.search(queries, **options)
        self.rankings[options["hf_subset"], options["hf_split"]] = ranking
        return ranking
