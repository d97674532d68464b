from types import SimpleNamespace

import pytest
import pytrec_eval
import torch
from datasets import Dataset
from sentence_transformers.sparse_encoder.evaluation import SparseNanoBEIREvaluator

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from tests.oracles import mean_ndcg
from tests.test_models import config_of
from trainer.data.beir import SearchSet
from trainer.data.texts import COMPOSED
from trainer.models.build import build_model, fetch_base_model
from trainer.runs.choice import SCORE
from trainer.training.evaluators import GradedSearch, SearchEvaluator, _in_nfc, build_evaluator

MODEL = torch.nn.Sequential(torch.nn.Identity())


class Part:
    """Stands in for one of the library's evaluators; its first metric is not its primary one, as there."""

    queries = corpus = ()

    def __init__(self, name, ndcg):
        self.primary_metric, self.name, self.ndcg = f"{name}_dot_ndcg@10", name, ndcg

    def __call__(self, model, *arguments):
        flat = {"dot_accuracy@1": 0.99, "dot_ndcg@10": self.ndcg, "dot_mrr@10": 0.2, "dot_recall@10": 0.3}
        flat |= {"query_active_dims": 4.0, "corpus_active_dims": 50.0, "avg_flops": 1.5}
        return {f"{self.name}_{key}": value for key, value in flat.items()}


def test_the_score_is_the_mean_ndcg_and_not_the_first_metric():
    results = SearchEvaluator({"one": Part("one", 0.4), "two": Part("two", 0.8)})(MODEL)
    assert results[SCORE] == pytest.approx(0.6)
    assert results["two_document_active_dims"] == 50.0


def test_two_languages_of_one_benchmark_keep_their_own_scores():
    same = {"NanoBEIR-no": Part("NanoBEIR_mean", 0.4), "NanoBEIR-sv": Part("NanoBEIR_mean", 0.8)}
    results = SearchEvaluator(same)(MODEL)
    assert (results["NanoBEIR-no_ndcg@10"], results["NanoBEIR-sv_ndcg@10"]) == (0.4, 0.8)


def test_ndcg_in_training_weighs_grades_as_trec_eval_does_and_the_other_metrics_take_1_and_up():
    grades = {"q": {"a": 1, "b": 3}, "r": {"a": 2, "c": 1, "e": 3}}
    scores = {"q": {"a": 2.0, "b": 1.0, "c": 0.5}, "r": {"d": 9.0, "c": 4.0, "a": 3.0}}
    evaluator = GradedSearch(SearchSet("mine", dict.fromkeys(grades, "x"), dict.fromkeys("abcde", "y"), grades), 2)
    hits = [[{"corpus_id": passage, "score": score} for passage, score in scores[q].items()] for q in grades]
    metrics = evaluator.compute_metrics(hits)
    judged = pytrec_eval.RelevanceEvaluator(grades, {"ndcg_cut.10", "recall.10", "recip_rank"}).evaluate(scores)
    # of the first query by hand: (1 + 3 / log2(3)) / (3 + 1 / log2(3)); the library's own nDCG is 1
    assert judged["q"]["ndcg_cut_10"] == pytest.approx(0.7967, abs=1e-4)
    for ours, theirs in (("ndcg@k", "ndcg_cut_10"), ("recall@k", "recall_10"), ("mrr@k", "recip_rank")):
        assert metrics[ours][10] == pytest.approx((judged["q"][theirs] + judged["r"][theirs]) / 2)


def test_without_the_hub_nanobeir_is_left_out_with_the_reason_and_local_searches_stay(tmp_path):
    config = config_of(tmp_path, write_bert(tmp_path / "base"), "splade", "evaluation.nanobeir_datasets=[msmarco]")
    found = SearchSet("mine", {"q": "x"}, {"d": "y"}, {"q": {"d": 1}})
    said = []
    evaluator = build_evaluator(config, [found], said.append)
    assert list(evaluator.parts) == ["mine"]
    assert [line.split(":")[0] for line in said] == ["NanoBEIR (no) is left out", "NanoBEIR (sv) is left out"]
    assert build_evaluator(config, [], said.append) is None


def test_nanobeir_is_searched_when_the_hub_is_reachable(tmp_path, monkeypatch):
    """The library's own evaluator, on a stand-in for its downloads."""
    config = config_of(tmp_path, write_bert(tmp_path / "base"), "splade", "evaluation.nanobeir_datasets=[msmarco, nq]")
    tables = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(DOCUMENTS)],
        "queries": [{"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{(i + 1) % 4}"} for i in range(4)],
    }
    monkeypatch.setattr("trainer.training.evaluators.why_unreachable", lambda repository: None)
    monkeypatch.setattr(
        SparseNanoBEIREvaluator,
        "_load_dataset_subset_split",
        lambda self, subset, split, required_columns: Dataset.from_list(tables[subset]),
    )
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")
    evaluator = build_evaluator(config, [], pytest.fail)
    results = evaluator(model)
    encode = {"convert_to_sparse_tensor": False, "show_progress_bar": False}
    documents = model.encode_document(DOCUMENTS, **encode)
    ranks = (model.encode_query(QUERIES, **encode) @ documents.T).argsort(descending=True)
    expected = mean_ndcg(
        {f"q{i}": [f"d{j}" for j in row.tolist()] for i, row in enumerate(ranks)},
        {f"q{i}": {f"d{(i + 1) % 4}"} for i in range(4)},
    )
    assert results["NanoBEIR-no_ndcg@10"] == results["NanoBEIR-sv_ndcg@10"] == pytest.approx(expected)
    assert results[SCORE] == pytest.approx(expected)
    single = evaluator.per_query()["NanoBEIR-no"]
    assert len(single) == 2 * 4  # the topics msmarco and nq have four queries each, of the same names
    assert sum(single.values()) / 8 == pytest.approx(expected, abs=1e-4)
    assert results["NanoBEIR-sv_document_active_dims"] == pytest.approx((documents > 0).sum(1).float().mean().item())


def test_nothing_is_asked_of_the_hub_when_nanobeir_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.training.evaluators.why_unreachable", lambda *a: pytest.fail("asked the hub"))
    config = config_of(tmp_path, write_bert(tmp_path / "base"), "splade")
    assert build_evaluator(config, [], print) is None


def test_nanobeirs_texts_are_searched_in_nfc_and_counted():
    part = SimpleNamespace(queries=["pa\u030a", "x"], corpus=["ga\u030arden"])
    reading = _in_nfc(SimpleNamespace(evaluators=[part]))
    assert (part.queries, part.corpus, reading.notes[COMPOSED]) == (["på", "x"], ["gården"], 2)
