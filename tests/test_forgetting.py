"""Searches at which training made the model worse are named, with the interval of the loss."""

import json
import re

import numpy as np
import pytest
from scipy.stats import norm

from tests.conftest import run_trainer
from trainer.data.beir import read_search_set
from trainer.training.evaluators import GradedSearch, ScoredSearch
from trainer.training.forgetting import SIGN, forgotten


def scores(values):
    return {f"q{number}": value for number, value in enumerate(values)}


def test_a_loss_beyond_chance_is_named_and_one_within_is_not():
    rng = np.random.default_rng(0)
    before = rng.uniform(0.4, 0.8, 200)
    noise = rng.normal(0, 0.1, 200)
    noise -= noise.mean()
    # the standard error of the mean is 0.1 / sqrt(200) = 0.0071: 0.03 is four of them, 0.005 is less than one
    searches = {"far": 0.03, "near": 0.005, "gain": -0.03}
    found = forgotten(
        {name: scores(before) for name in searches},
        {name: scores(before + noise - loss) for name, loss in searches.items()},
    )
    assert list(found) == ["far"]
    said = re.search(r"\.(\d+) → .*, (\S+) \[(\S+), (\S+)\] over 200 queries", found["far"])
    delta, low, high = (float(said[n].replace("−", "-")) for n in (2, 3, 4))
    half = norm.ppf(0.975) * noise.std() / 200**0.5
    assert (delta, low, high) == pytest.approx((-0.03, -0.03 - half, -0.03 + half), abs=0.0015)


def test_only_queries_that_both_have_are_compared():
    assert forgotten({"s": {"a": 1.0}}, {"s": {"a": 0.0}}) == {}
    assert forgotten({"s": {"a": 1.0, "b": 1.0, "x": 0.0}}, {"s": {"a": 0.0, "b": 0.0, "y": 1.0}})["s"].startswith(
        "s finds less than before training: nDCG@10 1.000 → 0.000, -1.000 [-1.000, -1.000] over 2 queries."
    )
    assert forgotten({"s": {"a": 1.0, "b": 1.0}}, {"other": {"a": 0.0, "b": 0.0}}) == {}


def test_the_scores_of_single_queries_average_to_the_reported_one(folder):
    search = read_search_set(folder, "dev", "four")
    hits = [[{"corpus_id": f"d{n}", "score": 5 - (n - row) % 4} for n in range(4)] for row in range(4)]
    hits[3] = [{"corpus_id": "d0", "score": 2}, {"corpus_id": "d3", "score": 1}]
    graded = GradedSearch(search, 8)
    metrics = graded.compute_metrics(hits)
    assert list(graded.per_query.values()) == pytest.approx([1, 1, 1, 1 / np.log2(3)])
    assert metrics["ndcg@k"][10] == pytest.approx(np.mean(list(graded.per_query.values())))
    stock = ScoredSearch(search.queries, search.corpus, {q: set(d) for q, d in search.relevant.items()}, ndcg_at_k=[10])
    assert stock.compute_metrics(hits)["ndcg@k"][10] == pytest.approx(np.mean(list(stock.per_query.values())))


def test_a_run_that_forgets_says_so_in_output_run_json_and_verdict_and_once_after_a_resume(tiny):
    """Dense steps of a large size ruin what the word matcher knew."""
    arguments = ("--set", "training.learning_rate=1", "--set", "loss.document_regularizer_weight=10")
    result = run_trainer(tiny.parent, "train", "tiny.yaml", *arguments)
    assert result.returncode == 0, result.stderr
    assert "Warning: quickstart finds less than before training: nDCG@10 0." in result.stdout
    assert "· worse than before on quickstart" in result.stdout.splitlines()[-1]
    kept = json.loads((tiny.parent / "models/tiny/query_scores.json").read_text())
    manifest = json.loads((tiny.parent / "models/tiny/run.json").read_text())
    for when in ("before", "after"):
        assert np.mean(list(kept[when]["quickstart"].values())) == pytest.approx(
            manifest[when]["quickstart_ndcg@10"], abs=1e-4
        )
    again = run_trainer(tiny.parent, "train", "tiny.yaml", "--resume", *arguments)
    assert "worse than before on quickstart" in again.stdout
    warnings = json.loads((tiny.parent / "models/tiny/run.json").read_text())["warnings"]
    assert [each["sign"] for each in warnings].count(SIGN) == 1


def test_a_run_that_only_gains_says_nothing(trained):
    assert "less than before" not in (trained / "output.txt").read_text()
