"""What the model is measured with during training: searches in held-out passages, NanoBEIR when the hub is reachable."""

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any

from sentence_transformers import SparseEncoder
from sentence_transformers.evaluation import SentenceEvaluator
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator, SparseNanoBEIREvaluator

from trainer.config import Config
from trainer.data.beir import SearchSet
from trainer.data.texts import Reading
from trainer.encoding.windows import texts_read
from trainer.hub.download import why_unreachable
from trainer.runs.choice import REPORTED, SCORE
from trainer.system.distributed import processes
from trainer.system.progress_bar import encoding, going_on, in_columns

NANOBEIR = "lightonai/NanoBEIR-{}"

# Our names for the library's metrics.
METRICS = {
    "ndcg@10": "ndcg@10",
    "mrr@10": "mrr@10",
    "recall@10": "recall@10",
    "query_active_dims": "query_active_dims",
    "document_active_dims": "corpus_active_dims",
    "flops": "avg_flops",
}


class ScoredSearch(SparseInformationRetrievalEvaluator):
    """The library's evaluator, which also keeps the nDCG@10 of each query that is reported."""

    per_query: dict[str, float]

    def compute_metrics(self, queries_result_list: list[list[dict[str, Any]]]) -> dict[str, dict[int, float]]:
        """The library's metrics."""
        self.per_query = {
            query: self.ndcg(query, hits) for query, hits in zip(self.queries_ids, queries_result_list, strict=True)
        }
        return super().compute_metrics(queries_result_list)

    def grades_of(self, query: str) -> dict[str, int]:
        """The grades of a query's passages: all 1."""
        return dict.fromkeys(self.relevant_docs[query], 1)

    def ndcg(self, query: str, hits: list[dict[str, Any]]) -> float:
        """nDCG@10 that weighs grades."""
        grades = self.grades_of(query)
        ranked = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))  # equal scores as the library has them
        gains = [grades.get(hit["corpus_id"], 0) for hit in ranked[:10]]
        best = sorted(grades.values(), reverse=True)
        return float(self.compute_dcg_at_k(gains, 10) / self.compute_dcg_at_k(best, 10))


class ScoredNanoBEIR(SparseNanoBEIREvaluator):
    """NanoBEIR, whose searches keep the scores of their queries."""

    information_retrieval_class = ScoredSearch


class GradedSearch(ScoredSearch):
    """The library's evaluator with an nDCG that weighs grades, as trec_eval's does; the library's takes all for 1.

    Its other metrics need a yes or no: passages of grade 1 and up are relevant. The queries that choose the checkpoint are
    searched together with those that are reported, so passages are encoded once; all metrics but choosing_ndcg are of the
    reported ones.
    """

    def __init__(self, search: SearchSet, batch_size: int) -> None:
        parts = [search]
        if search.chooser is not None and not search.also_chooses:
            parts.append(search.chooser)
        # two splits may give one id to two queries
        self.grades = {
            f"{n}/{query}": grades for n, part in enumerate(parts) for query, grades in part.relevant.items()
        }
        self.reported = len(search.queries)
        super().__init__(
            queries={f"{n}/{query}": text for n, part in enumerate(parts) for query, text in part.queries.items()},
            corpus=search.corpus,
            relevant_docs={query: set(grades) for query, grades in self.grades.items()},
            name=search.name,
            batch_size=batch_size,
            ndcg_at_k=[10],
            mrr_at_k=[10],
            accuracy_at_k=[1],
            precision_recall_at_k=[10],
            map_at_k=[100],
            write_csv=False,
        )

    def compute_metrics(self, queries_result_list: list[list[dict[str, Any]]]) -> dict[str, dict[int, float]]:
        """The library's metrics, with our nDCG in the place of its own, and that of the queries that choose."""
        size = self.reported
        reported = copy.copy(self)
        reported.queries, reported.queries_ids = self.queries[:size], self.queries_ids[:size]
        metrics = super(GradedSearch, reported).compute_metrics(queries_result_list[:size])
        self.per_query = reported.per_query
        choosing = map(self.ndcg, self.queries_ids[size:], queries_result_list[size:])
        metrics["ndcg@k"][10] = fmean(self.per_query.values())
        metrics["choosing_ndcg@k"] = {10: fmean([*choosing] or self.per_query.values())}
        return metrics

    def grades_of(self, query: str) -> dict[str, int]:
        """The grades of a query's passages, as the search set has them."""
        return self.grades[query]


class SearchEvaluator(SentenceEvaluator):
    """Runs several searches and averages their nDCG@10: of the queries that are reported, and of those that choose.

    Not SequentialEvaluator: that one averages each evaluator's first metric, which is accuracy@1, and the metrics of two
    languages of NanoBEIR have the same names.
    """

    def __init__(self, parts: dict[str, SentenceEvaluator]) -> None:
        super().__init__()
        self.parts = parts
        self.primary_metric = SCORE

    def per_query(self) -> dict[str, dict[str, float]]:
        """The nDCG@10 of each query, by search, of the last call."""
        scores: dict[str, dict[str, float]] = {}
        for name, part in self.parts.items():
            searches = getattr(part, "evaluators", [part])
            scores[name] = {
                f"{search.name}/{query}": round(score, 5)
                for search in searches
                for query, score in search.per_query.items()
            }
        return scores

    def __call__(
        self, model: SparseEncoder, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """`<search>_<metric>` for every search and metric, REPORTED and SCORE."""
        results: dict[str, float] = {}
        choosing = []
        for name, part in self.parts.items():
            searches = getattr(part, "evaluators", [part])  # NanoBEIR's topics
            texts = sum(len(search.queries) + texts_read(model, search.corpus) for search in searches)
            with encoding(model[0], in_columns("scoring", name), texts, share=processes()):
                metrics = part(model, None, epoch, steps)
            prefix = part.primary_metric.rpartition("_")[0]
            for ours, theirs in METRICS.items():
                key = f"{prefix}_{theirs}"
                # sparsity is not a matter of the similarity function, so its names lack that part
                results[f"{name}_{ours}"] = metrics[key if key in metrics else f"{prefix.rpartition('_')[0]}_{theirs}"]
            choosing.append(metrics.get(f"{prefix}_choosing_ndcg@10", results[f"{name}_ndcg@10"]))
        results[REPORTED] = fmean(results[f"{name}_ndcg@10"] for name in self.parts)
        results[SCORE] = fmean(choosing)
        return results


def build_evaluator(config: Config, search: list[SearchSet], echo: Callable[[str], None]) -> SearchEvaluator | None:
    """One evaluator over every search; None where there is nothing to search."""
    batch_size = config.training.per_device_eval_batch_size
    parts: dict[str, SentenceEvaluator] = {each.name: GradedSearch(each, batch_size) for each in search}
    wanted = config.evaluation.nanobeir_datasets
    for language in config.evaluation.nanobeir_languages if wanted != [] else []:
        repository = NANOBEIR.format(language)
        reason = why_unreachable(repository)
        if reason is None:
            try:
                with going_on(in_columns("reading", f"NanoBEIR ({language})")):
                    nano = ScoredNanoBEIR(
                        dataset_names=wanted, dataset_id=repository, batch_size=batch_size, write_csv=False
                    )
                parts[f"NanoBEIR-{language}"] = nano
                for line in _in_nfc(nano).lines():
                    echo(f"NanoBEIR ({language}): {line}")
            except ValueError as error:  # what the library raises when a part cannot be downloaded
                reason = str(error)
        if reason is not None:
            echo(f"NanoBEIR ({language}) is left out: {reason}")
    return SearchEvaluator(parts) if parts else None


def _in_nfc(nano: SparseNanoBEIREvaluator) -> Reading:
    """Put the texts that the library has loaded into the form of Unicode that training texts have; what is said of it."""
    reading = Reading()
    for part in nano.evaluators:
        part.queries = [reading.compose(text) for text in part.queries]
        part.corpus = [reading.compose(text) for text in part.corpus]
    return reading
