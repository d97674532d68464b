"""Which queries choose the checkpoint of a training, and which are reported."""

import json
import subprocess

import pytest

from tests.test_models import config_of
from trainer.config import ConfigError
from trainer.data.beir import SearchSet, read_search_set
from trainer.data.choosing import choice_of, choice_words, divide, half_of, read_search_splits
from trainer.data.loading import load_data
from trainer.data.training_data import TrainingData
from trainer.runs.choice import choosers_of, hash_of, reported
from trainer.training.best_checkpoint import BestCheckpoint, checkpoint_line, choices_of
from trainer.training.evaluators import GradedSearch, SearchEvaluator
from trainer.training.train import verdict


def search_set(queries, split="dev", name="mine"):
    texts = {query: f"{split} {query}" for query in queries}
    return SearchSet(name, texts, {"d": "x", "e": "y"}, {query: {"d": 1} for query in queries}, split=split)


def write_folder(folder, **splits):
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}\n')
    for split, queries in splits.items():
        rows = [{"_id": query, "text": f"{split} {query}"} for query in queries]
        (folder / f"queries.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"qrels.{split}.tsv").write_text("".join(f"{query}\td\t1\n" for query in queries))
    return folder


FORTY = [f"q{number}" for number in range(40)]


def test_the_half_with_an_even_hash_chooses_and_the_other_is_reported():
    found = divide(search_set(FORTY))
    hashed = {}
    for query in FORTY[:6]:  # by the system's own sha256sum
        output = subprocess.run(["sha256sum"], input=query.encode(), stdout=subprocess.PIPE, check=True).stdout
        hashed[query] = int(output.split()[0], 16) % 2 == 0
    assert {query: query in found.chooser.queries for query in hashed} == hashed
    assert set(hashed.values()) == {True, False}
    assert found.queries.keys() | found.chooser.queries.keys() == set(FORTY)
    assert not found.queries.keys() & found.chooser.queries.keys()
    assert found.relevant.keys() == found.queries.keys()
    assert choice_of(found)["rule"] == "half"
    assert choice_words(found) == f"; {len(found.chooser.queries)} others choose the checkpoint (half of dev)"


@pytest.mark.parametrize(("short", "divided"), [(9, False), (10, True)])
@pytest.mark.parametrize("half", ["dev", "test"])
def test_where_a_half_has_fewer_than_ten_queries_all_choose_and_that_is_said(half, short, divided):
    many = [f"q{number}" for number in range(200)]
    few = [query for query in many if half_of(query) == half][:short]
    found = divide(search_set([*few, *(query for query in many if half_of(query) != half)]))
    assert found.also_chooses is not divided
    assert (
        "these queries also choose the checkpoint, so their score is optimistic" in choice_words(found)
    ) is not divided
    assert len(found.queries) + (len(found.chooser.queries) if divided else 0) == short + 200 - _count(many, half)


def _count(queries, half):
    return sum(half_of(query) == half for query in queries)


def test_a_split_validation_chooses_and_dev_is_reported_whole(tmp_path):
    folder = write_folder(tmp_path / "mine", dev=["1", "2"], validation=["1", "2", "3"])
    found = divide(*read_search_splits(folder, ["dev", "validation"], "mine"))
    assert found.queries == {"1": "dev 1", "2": "dev 2"}
    assert found.chooser.queries == {"1": "validation 1", "2": "validation 2", "3": "validation 3"}
    assert choice_words(found) == "; 3 others choose the checkpoint (the split validation)"
    assert choosers_of({"checkpoint_chosen_by": [choice_of(found)]}) == ["3 queries of mine (the split validation)"]


def test_folders_of_data_sets_and_of_searches_are_divided_and_without_dev_the_queries_of_validation_are(tmp_path):
    many = [str(number) for number in range(60)]
    mine = write_folder(tmp_path / "mine", train=many, dev=many[:3], validation=many[:5])
    other = write_folder(tmp_path / "other", validation=many)
    overrides = (f"datasets.own={{source: {mine}}}", f"evaluation.search=[{other}]")
    for at_end, counts in (
        ("true", [(3, 5), (60 - _count(many, "dev"), _count(many, "dev"))]),
        ("false", [(3, 0), (60, 0)]),
    ):
        config = config_of(tmp_path, tmp_path, "splade", *overrides, f"training.load_best_model_at_end={at_end}")
        search = [found for found in load_data(config).search if found.name != "quickstart"]
        assert [(len(s.queries), len(s.chooser.queries) if s.chooser else 0) for s in search] == counts


def test_a_query_of_both_splits_is_reported_and_does_not_choose():
    dev = search_set(["a", "b"])
    both = {"x": "dev a", "y": "validation y"}
    validation = SearchSet("mine", both, dev.corpus, {query: {"d": 1} for query in both}, split="validation")
    assert list(divide(dev, validation).chooser.queries) == ["y"]
    same = SearchSet("mine", {"x": "dev a"}, dev.corpus, {"x": {"d": 1}}, split="validation")
    with pytest.raises(ConfigError, match="mine: the queries of the split validation are those of dev"):
        divide(dev, same)


def test_both_scores_are_of_one_ranking_and_each_of_its_own_queries():
    """Two splits that give one id to two queries: those of dev find their passage first, those of validation second."""
    dev, validation = search_set(["1", "2"]), search_set(["1", "2", "3"], "validation")
    evaluator = GradedSearch(divide(dev, validation), batch_size=2)
    assert evaluator.queries == ["dev 1", "dev 2", "validation 1", "validation 2", "validation 3"]
    first = [{"corpus_id": "d", "score": 2.0}, {"corpus_id": "e", "score": 1.0}]
    second = [{"corpus_id": "d", "score": 1.0}, {"corpus_id": "e", "score": 2.0}]
    metrics = evaluator.compute_metrics([first, first, second, second, first])
    assert metrics["ndcg@k"][10] == metrics["mrr@k"][10] == metrics["recall@k"][10] == metrics["accuracy@k"][1] == 1.0
    # 1 / log2(3) of a passage in second place
    assert metrics["choosing_ndcg@k"][10] == pytest.approx((0.63093 + 0.63093 + 1) / 3, abs=1e-5)


def test_without_a_choice_all_queries_are_reported(tmp_path):
    data = TrainingData({}, {}, {}, {})
    for at_end, count in (("false", 40), ("true", len(FORTY) - _count(FORTY, "dev"))):
        config = config_of(tmp_path, tmp_path / "base", "splade", f"training.load_best_model_at_end={at_end}")
        data.search = []
        data.add_search(search_set(FORTY), None, config)
        assert len(data.search[0].queries) == count
        assert len(choices_of(config, data, None)) == (count < 40)


def test_the_result_line_names_the_searches_whose_score_is_optimistic(tmp_path):
    config = config_of(tmp_path, tmp_path / "base", "splade")
    data = TrainingData({}, {}, {}, {}, search=[divide(search_set(FORTY)), divide(search_set(["a"], name="tiny"))])
    choices = choices_of(config, data, SearchEvaluator(dict.fromkeys(("mine", "tiny", "NanoBEIR-no"))))
    assert checkpoint_line(config, BestCheckpoint("eval_choosing_ndcg@10", choices, {})) == (
        "result    the checkpoint with the highest mean nDCG@10 over the queries that choose; those of tiny, NanoBEIR-no "
        "are reported too, so their score is optimistic"
    )


def test_queries_that_chose_are_known_in_a_changed_copy_of_their_set():
    found = divide(search_set(FORTY))
    manifest = {"checkpoint_chosen_by": [choice_of(found)]}
    texts = {**found.queries, **found.chooser.queries}
    # the copy has other ids, lacks the first query and has one more
    copy = {f"test/default/copy-{n}": text for n, text in enumerate([*list(texts.values())[1:], "one more"])}
    kept, note = reported(
        manifest, "copy", {name: hash_of(text) for name, text in copy.items()}, dict.fromkeys(copy, 0.5)
    )
    assert sorted(copy[name] for name in kept) == sorted([*list(found.queries.values())[1:], "one more"])
    assert note == f"{len(kept)} queries; {len(found.chooser.queries)} others chose the checkpoint and are left out"


def test_a_run_of_before_does_not_say_what_chose_and_that_is_said_of_dev_queries():
    earlier = {"best_checkpoint": "models/x/checkpoints/checkpoint-2"}
    for split, note in (
        ("test", ""),
        ("dev", "an earlier version trained the run and may have chosen its checkpoint by these queries"),
    ):
        assert reported(earlier, "x", {}, {f"{split}/default/q": 0.5}) == ({f"{split}/default/q": 0.5}, note)


def test_the_verdict_leaves_out_a_score_before_training_that_was_of_other_queries():
    manifest = dict.fromkeys(("train_seconds", "total_seconds"), 125) | {
        "samples_per_second": 12.3,
        "padding_share": 0.08,
        "peak_memory_gib": 1.2,
    }
    assert verdict(
        {},
        {"search_ndcg@10": 0.5, "x_query_active_dims": 1, "x_document_active_dims": 2},
        SearchEvaluator({"x": None}),
        manifest,
    ).startswith("verdict   nDCG@10 0.500 · ")


def test_the_quickstarts_queries_are_divided():
    from trainer.data.sources import QUICKSTART

    found = divide(read_search_set(QUICKSTART / "search", "dev", "quickstart"))
    assert choice_of(found) | {"hashes": ""} == {
        "search": "quickstart",
        "split": "dev",
        "rule": "half",
        "queries": 31,
        "hashes": "",
        "also_reported": False,
    }
