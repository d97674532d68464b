"""Runs a search system on tasks through mteb, and stores each task's result when it is complete."""

import contextlib
from collections.abc import Callable
from statistics import fmean
from types import SimpleNamespace
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

    A task whose result was made by the same system (`fingerprint`), data and mteb is not run again. All results of another
    state of the system are removed. `make_search` gives mteb's SearchProtocol; it is called when a task is to be run.
    """
    search, failed = None, {}
    for scored in folder.tasks_of(name):
        if folder.made_with(name, scored).get("system") != fingerprint:
            folder.remove(name, scored)
    for task in tasks:
        mark = {
            "system": fingerprint,
            "data": task.metadata.dataset["revision"],
            "languages": ", ".join(task.languages),
            "mteb": mteb.__version__,
            "texts": "NFC, known by their hashes",
        }
        files, made_with = folder.files(name, task.metadata.name), folder.made_with(name, task.metadata.name)
        if made_with == mark and all(file.is_file() for file in files):
            score = read_score(folder.score_file(name, task.metadata.name))
        else:
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


def _run(name: str, search: Any, task: AbsTaskRetrieval, folder: EvalFolder, mark: dict[str, str]) -> TaskScore:
    data = load(task)
    results: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # of queries, by subset and split

    def search_and_record(queries: Any, **options: Any) -> dict[str, dict[str, float]]:
        found = search.search(queries, **options)
        results[options["hf_subset"], options["hf_split"]] = found
        return found

    recorder = SimpleNamespace(mteb_model_meta=search.mteb_model_meta, index=search.index, search=search_and_record)
    shows_progress = isinstance(search, SearchSystem)
    with contextlib.nullcontext() if shows_progress else going_on(in_columns(name, task.metadata.name, 12)):
        result = mteb.evaluate(
            recorder, task, cache=None, show_progress_bar=False, encode_kwargs={"show_progress_bar": False}
        )
    rankings = {
        f"{split}/{subset}": Ranking(best(scores), data[subset][split]["relevant_docs"])
        for (subset, split), scores in results.items()
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
    hashes = {
        f"{split}/{subset}/{row['id']}": hash_of(row["text"])
        for subset, split in results
        for row in data[subset][split]["queries"]
        if f"{split}/{subset}/{row['id']}" in per_query
    }
    values = {"made_with": mark, "note": getattr(search, "note", ""), "queries": hashes, MAIN_METRIC: per_query}
    write_json(folder.query_file(name, task.metadata.name), values)
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


def table_lines(part: str, systems: list[str], rows: dict[str, dict[str, float]]) -> list[str]:
    """A table of nDCG@10 by label and system; - where there is none."""
    width = max(map(len, rows)) + 2
    widths = [max(len(system), 6) + 2 for system in systems]
    cells = {label: [f"{row[name]:.4f}" if name in row else "-" for name in systems] for label, row in rows.items()}
    lines = [f"{label:<{width}}" + "".join(map(str.rjust, row, widths)) for label, row in cells.items()]
    header = f"{'nDCG@10':<{width}}" + "".join(map(str.rjust, systems, widths))
    return [in_columns(part, header, 12), *(in_columns("", line, 12) for line in lines)]
