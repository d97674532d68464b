"""Differences between systems, their intervals, and results written by mteb."""

import json
import math
import random
import re
from pathlib import Path

import mteb
import numpy as np
import pytest
from mteb.results import TaskResult
from scipy.stats import binom

from evaluate.compare import baseline_name, compare, compare_lines
from trainer.config import ConfigError
from trainer.data.choosing import half_of
from trainer.runs.choice import hash_of
from trainer.runs.intervals import paired_interval
from trainer.runs.results import EvalFolder, TaskScore, read_system
from trainer.system.files import write_json


def score(task, ndcg, languages=("nob-Latn",), per_query=None, part="test/default"):
    return TaskScore(task, {part: (ndcg, tuple(languages))}, per_query or {})


def system(**ndcg):
    return {task: score(task, value) for task, value in ndcg.items()}


def of_queries(task, values, part="test/default"):
    """A system that has been run on one task, with a score for every query."""
    return {task: score(task, float(np.mean(values)), (), {f"{part}/q{n}": value for n, value in enumerate(values)})}


def against(main, other, **options):
    return compare("main", {"main": main, "other": other}, **options)["against"]["other"]


# ---------------------------------------------------------------------------------- intervals
def test_a_difference_that_is_the_same_for_every_query_has_an_interval_of_no_width():
    """Queries are paired by id: unpaired, scores spread over 0 … 0.75 would give an interval wider than 0.1."""
    scores = np.random.default_rng(1).uniform(0, 0.75, 200)
    main, other = of_queries("a", scores + 0.25), of_queries("a", scores)
    shuffled = list(other["a"].per_query.items())
    random.Random(1).shuffle(shuffled)
    row = against(main, {"a": score("a", other["a"].main, (), dict(shuffled))})["tasks"]["a"]
    assert row == pytest.approx({"delta": 0.25, "low": 0.25, "high": 0.25, "queries": 200})


def test_the_interval_of_normal_differences_is_the_analytic_one():
    """Mean ± 1.96 s/√n."""
    differences = np.random.default_rng(2).normal(0.02, 0.3, 1_000)
    half = 1.959964 * differences.std(ddof=1) / math.sqrt(1_000)
    low, high = paired_interval([differences], 0, 10_000)
    assert low == pytest.approx(differences.mean() - half, abs=0.03 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.03 * half)


@pytest.mark.parametrize("won", [5, 20, 42])
def test_the_interval_of_won_and_lost_queries_is_the_binomial_one(won):
    """Resampling 50 differences, `won` of which are 1 and the others 0, counts as Binomial(50, won / 50)."""
    low, high = paired_interval([[1.0] * won + [0.0] * (50 - won)], 0, 10_000)
    expected = binom.ppf([0.025, 0.975], 50, won / 50) / 50
    assert [low, high] == pytest.approx(expected, abs=0.0201)


def test_swapping_the_two_systems_negates_the_difference_and_its_interval():
    chance = np.random.default_rng(3)
    one, two = of_queries("a", chance.uniform(0, 1, 60)), of_queries("a", chance.uniform(0, 1, 60))
    row, swapped = against(one, two)["tasks"]["a"], against(two, one)["tasks"]["a"]
    assert row["low"] < row["delta"] < row["high"]
    negated = [-swapped["delta"], -swapped["high"], -swapped["low"]]
    assert [row["delta"], row["low"], row["high"]] == pytest.approx(negated)


def test_the_interval_is_about_the_score_in_which_languages_count_the_same():
    """200 queries in Norwegian gain nothing, 50 in Swedish gain 0.2 ± 0.1: the task's score gains 0.1, not 0.04."""
    swedish = np.random.default_rng(4).normal(0.2, 0.1, 50)
    names = [f"test/no/q{n}" for n in range(200)] + [f"test/sv/q{n}" for n in range(50)]
    main = score("a", swedish.mean() / 2, (), dict(zip(names, [*np.zeros(200), *swedish], strict=True)))
    row = against({"a": main}, {"a": score("a", 0.0, (), dict.fromkeys(names, 0.0))})["tasks"]["a"]
    half = 1.96 * swedish.std(ddof=1) / math.sqrt(50) / 2
    assert row["delta"] == pytest.approx(0.1, abs=0.02)
    assert [row["low"], row["high"]] == pytest.approx([row["delta"] - half, row["delta"] + half], abs=0.1 * half)


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_the_same():
    chance = np.random.default_rng(5)
    main, other = of_queries("a", chance.uniform(0, 1, 40)), of_queries("a", chance.uniform(0, 1, 40))
    first, again, another = (against(main, other, seed=seed)["tasks"]["a"] for seed in (0, 0, 1))
    assert first == again
    assert first != another
    assert first["low"] == pytest.approx(another["low"], abs=0.01)


def test_difference_interval_and_win_are_over_the_queries_that_both_have():
    """The mean of main's four is 0.15 above the mean of the other's three; of each shared query it is 0.1 below."""
    main, other = of_queries("a", [0.3, 0.4, 0.5, 1.0]), of_queries("a", [0.4, 0.5, 0.6])
    found = against(main, other)
    assert found["tasks"]["a"] == pytest.approx({"delta": -0.1, "low": -0.1, "high": -0.1, "queries": 3, "left_out": 1})
    assert found["mean_delta"] == pytest.approx(-0.1)
    assert (found["wins"], found["losses"]) == (0, 1)
    swapped = against(other, main)["tasks"]["a"]
    assert (swapped["delta"], swapped["left_out"]) == (pytest.approx(0.1), 1)


def test_a_score_without_queries_gives_a_difference_and_no_interval():
    assert against(of_queries("a", [0.7, 0.7]), system(a=0.5))["tasks"]["a"] == pytest.approx({"delta": 0.2})


def test_one_shared_query_gives_its_difference_and_no_interval():
    row = against(of_queries("a", [0.7, 0.1]), of_queries("a", [0.5]))["tasks"]["a"]
    assert row == pytest.approx({"delta": 0.2, "left_out": 1})


def test_tasks_with_no_query_in_common_are_missing():
    main = of_queries("a", [0.7, 0.7]) | of_queries("b", [0.5, 0.5])
    other = of_queries("a", [0.4, 0.6], "dev/default") | of_queries("b", [0.4, 0.4])
    found = against(main, other)
    assert found["tasks"].keys() == {"b"}
    assert found["missing"] == ["a (no query in common)"]


# ---------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize(
    ("gains", "counts"),
    [
        ([0.2] * 9 + [0.1], (1, 0, 0)),  # every resample gains
        ([-0.2] * 9 + [-0.1], (0, 1, 0)),
        ([0.5, -0.3] * 5, (0, 0, 1)),  # +0.1 on average; 6 losses among 10 draws already lose
        ([0.3, -0.5] * 5, (0, 0, 1)),
    ],
)
def test_a_win_or_a_loss_has_an_interval_without_zero(gains, counts):
    main, other = of_queries("a", [0.5 + gain for gain in gains]), of_queries("a", [0.5] * 10)
    found = against(main, other)
    row = found["tasks"]["a"]
    assert (row["low"] <= 0 <= row["high"]) == bool(counts[2])
    assert (found["wins"], found["losses"], found["ties"]) == counts
    # without scores per query nothing but the sign is known
    signs = against({"a": score("a", main["a"].main, ())}, {"a": score("a", 0.5, ())})
    assert (signs["wins"], signs["losses"]) == ((1, 0) if row["delta"] > 0 else (0, 1))


def test_without_intervals_wins_losses_and_ties_go_by_the_four_decimals_that_are_reported():
    found = against(system(a=0.5002, b=0.49991, c=0.50004, d=0.5), system(a=0.5, b=0.5001, c=0.5, d=0.5))
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 2)


def test_missing_tasks_are_named_with_who_lacks_them_and_the_mean_is_over_the_others():
    """b and c would each move the mean by a lot."""
    found = against(system(a=0.6, b=0.9, d=0.3), system(a=0.5, c=0.9, d=0.4))
    assert found["missing"] == ["b (other)", "c (main)"]
    assert list(found["tasks"]) == ["a", "d"]
    assert found["mean_delta"] == pytest.approx((0.1 - 0.1) / 2)
    assert found["wins"] + found["losses"] + found["ties"] == 2


def test_all_scores_are_in_one_table_with_the_languages_of_their_tasks():
    dense = {"b": score("b", 0.3, ["swe-Latn"])}
    values = compare("main", {"bm25": system(a=0.5), "main": system(a=0.6) | dense, "dense": dense})
    assert values["systems"] == ["main", "bm25", "dense"]
    assert values["tasks"] == {"a": {"main": 0.6, "bm25": 0.5}, "b": {"main": 0.3, "dense": 0.3}}
    assert values["languages"] == {"a": ["nob-Latn"], "b": ["swe-Latn"]}
    assert json.loads(json.dumps(values)) == values


def test_a_task_measured_in_other_languages_is_not_compared():
    main = system(a=0.6) | {"nano": score("nano", 0.5, ["nob-Latn", "swe-Latn"])}
    other = system(a=0.5) | {"nano": score("nano", 0.7, ["nob-Latn", "swe-Latn", "tha-Thai"])}
    found = against(main, other)
    assert list(found["tasks"]) == ["a"]
    assert found["missing"] == ["nano (main in nob, swe; other in nob, swe, tha)"]


def test_a_folder_in_no_stated_language_is_compared_with_one_whose_language_is_known():
    unknown = {"a": score("a", 0.5, ["mis-Latn"])}
    assert list(against(system(a=0.6), unknown)["tasks"]) == ["a"]


@pytest.mark.parametrize(
    "systems,line",
    [
        ({"other": system(a=0.5)}, "main has no results to compare. Score it first"),
        ({"main": {}, "other": system(a=0.5)}, "main has no results to compare. Score it first"),
        (
            {"main": system(a=0.5), "other": system(b=0.5)},
            "main and other have no task in common. Score both on the same ones. Missing: a (other), b (main)",
        ),
    ],
)
def test_nothing_to_compare_is_one_line(systems, line):
    with pytest.raises(ConfigError) as caught:
        compare("main", systems)
    assert line in caught.value.format_message()
    assert "\n" not in caught.value.format_message()


# ---------------------------------------------------------------------------------- results from elsewhere
MTEB_2 = {
    "dataset_revision": "9d2e3a1",
    "task_name": "NorQuadRetrieval",
    "mteb_version": "2.1.0",
    "scores": {
        "test": [
            {
                "ndcg_at_10": 0.25,
                "mrr_at_10": 0.2,
                "recall_at_10": 0.4,
                "recall_at_100": 0.9,
                "main_score": 0.25,
                "hf_subset": "default",
                "languages": ["nob-Latn"],
            }
        ]
    },
    "evaluation_time": 3.5,
    "kg_co2_emissions": None,
}


def test_a_results_tree_of_mteb_is_a_baseline(tmp_path):
    folder = tmp_path / "results" / "intfloat__multilingual-e5-small" / "c007d7e"
    write_json(folder / "NorQuadRetrieval.json", MTEB_2)
    write_json(folder / "model_meta.json", {"name": "intfloat/multilingual-e5-small"})
    for path in (folder, folder.parent, folder / "NorQuadRetrieval.json"):
        name = baseline_name(path)
        values = compare("main", {"main": system(NorQuadRetrieval=0.3), name: read_system(path)})
        assert name == "intfloat__multilingual-e5-small"
        assert values["against"][name]["tasks"] == {"NorQuadRetrieval": {"delta": pytest.approx(0.05)}}


def test_what_mteb_writes_itself_is_compared_with_what_this_project_keeps_beside_it(tmp_path):
    task = mteb.get_task("SwednRetrieval")
    results = EvalFolder(tmp_path)
    for name, values in {"main": [0.5, 0.7, 0.9], "bm25": [0.4, 0.4, 0.7]}.items():
        file = results.score_file(name, "SwednRetrieval")
        file.parent.mkdir(parents=True)
        row = {"ndcg_at_10": sum(values) / 3, "main_score": sum(values) / 3}
        TaskResult.from_task_results(task, {"test": {"default": row}}, 1.0).to_disk(file)
        queries = {f"test/default/q{n}": value for n, value in enumerate(values)}
        write_json(results.query_file(name, "SwednRetrieval"), {"made_with": {}, "ndcg_at_10": queries})
    values = compare("main", results.systems())
    assert values["languages"] == {"SwednRetrieval": ["swe-Latn"]}
    row = values["against"]["bm25"]["tasks"]["SwednRetrieval"]
    assert row == pytest.approx({"delta": 0.2, "low": 0.1, "high": 0.3, "queries": 3}, abs=1e-5)
    file = results.score_file("bm25", "SwednRetrieval")
    assert baseline_name(file) == baseline_name(file.parent) == "bm25"
    assert compare("main", {"main": results.systems()["main"], "file": read_system(file)})["against"]["file"][
        "tasks"
    ] == {"SwednRetrieval": row}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"mteb_version": "1.1.1", "mteb_dataset_name": "NorQuadRetrieval", "test": {"ndcg_at_10": 0.25}}),
        json.dumps(MTEB_2 | {"scores": {"test": {"ndcg_at_10": 0.25}}}),
        json.dumps(MTEB_2 | {"scores": {}}),
        json.dumps([0.25]),
        "task,score\nNorQuadRetrieval,0.25\n",
    ],
)
def test_results_of_an_old_mteb_or_in_an_unknown_format_are_one_line_with_the_file(tmp_path, text):
    (tmp_path / "dense.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_system(tmp_path / "dense.json")
    assert "dense.json" in caught.value.format_message()
    assert "\n" not in caught.value.format_message()


@pytest.mark.parametrize(
    "path,name",
    [
        ("dense.json", "dense"),
        ("e5-small-v1.5", "e5-small-v1.5"),
        ("results/BAAI__bge-m3", "BAAI__bge-m3"),
        ("results/BAAI__bge-m3/5617a9f", "BAAI__bge-m3"),
        ("results/BAAI__bge-m3/5617a9f/SNLRetrieval.json", "BAAI__bge-m3"),
        ("models/mine/eval/scores/mine", "mine"),
        ("models/mine/eval/scores/mine/SNLRetrieval.json", "mine"),
    ],
)
def test_a_baseline_is_called_as_its_model_or_else_as_its_file(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    if path.endswith(".json"):
        write_json(Path(path), MTEB_2)
    else:
        Path(path).mkdir(parents=True)
    assert baseline_name(Path(path)) == name
    assert baseline_name(Path("..") / tmp_path.name / path) == name


def test_a_models_folder_of_mteb_copied_elsewhere_keeps_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "downloads" / "BAAI__bge-m3" / "5617a9f"
    write_json(folder / "model_meta.json", {"name": "BAAI/bge-m3"})
    monkeypatch.chdir(folder)
    assert baseline_name(folder) == baseline_name(Path(".")) == "BAAI__bge-m3"


# ---------------------------------------------------------------------------------- lines
def test_the_lines_are_a_table_and_what_main_gains_against_each_other_system():
    values = {
        "main": "splade",
        "systems": ["splade", "bm25", "BAAI__bge-m3"],
        "tasks": {
            "norquad": {"splade": 0.4321, "bm25": 0.45},
            "nano": {"splade": 0.5, "bm25": 0.458, "BAAI__bge-m3": 0.61},
            "local": {"splade": 1.0},
            "elsewhere": {"BAAI__bge-m3": 0.2},
        },
        "languages": {
            "norquad": ["nob-Latn"],
            "nano": ["nob-Latn", "swe-Latn"],
            "local": ["mis-Latn"],
            "elsewhere": ["deu-Latn"],
        },
        "against": {
            "bm25": {
                "tasks": {
                    "norquad": {"delta": -0.0179, "low": -0.031, "high": -0.0061, "queries": 90},
                    "nano": {"delta": 0.042, "left_out": 1},
                },
                "mean_delta": 0.01205,
                "wins": 1,
                "losses": 1,
                "ties": 0,
                "missing": ["local (bm25)"],
            },
            "BAAI__bge-m3": {
                "tasks": {"nano": {"delta": 0.00001}},
                "mean_delta": 0.00001,
                "wins": 0,
                "losses": 0,
                "ties": 1,
                "missing": [f"t{n} (splade)" for n in range(10)],
            },
        },
    }
    assert list(compare_lines(values)) == [
        "compare     nDCG@10            splade    bm25  BAAI__bge-m3",
        "            norquad (nob)      0.4321  0.4500             -",
        "            nano (nob, swe)    0.5000  0.4580        0.6100",
        "            local              1.0000       -             -",
        "            against bm25: mean +0.012 over 2 of 3 tasks, 1 win, 1 loss; "
        "norquad -0.018 [-0.031, -0.006], nano +0.042 (1 query left out: only one of the two has a score)",
        "            missing: local (bm25)",
        "            against BAAI__bge-m3: mean +0.000 over 1 of 11 tasks, 0 wins, 0 losses, 1 not told apart; nano +0.000",
        "            missing: t0 (splade), t1 (splade), t2 (splade), t3 (splade), t4 (splade), t5 (splade), "
        "t6 (splade), t7 (splade) and 2 more",
    ]


def test_a_system_alone_is_a_table_without_differences():
    assert list(compare_lines(compare("main", {"main": system(a=0.6)}))) == [
        "compare     nDCG@10      main",
        "            a (nob)    0.6000",
    ]


def result(value, revision="abc", version="2.26.24", **parts):
    rows = {
        split: [{"ndcg_at_10": x, "main_score": x, "hf_subset": "default", "languages": ["nob-Latn"]}]
        for split, x in parts.items()
    }
    return {"task_name": "T", "dataset_revision": revision, "mteb_version": version, "scores": rows} | value


def read(tmp_path, name, **values):
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(result({}, **values)))
    return read_system(file)


def test_results_on_other_data_or_other_splits_are_missing_and_extra_splits_are_left_out(tmp_path):
    own = read(tmp_path, "own", test=0.5)
    wider = compare("own", {"own": own, "wider": read(tmp_path, "wider", test=0.4, validation=0.9)})
    assert wider["against"]["wider"]["mean_delta"] == pytest.approx(0.1)
    same = read(tmp_path, "same", test=0.1)
    for name, values, reason in (
        ("data", {"revision": "xyz", "test": 0.4}, "T (other data: revision abc and xyz)"),
        ("split", {"validation": 0.4}, "T (other splits: test/default and validation/default)"),
    ):
        other = read(tmp_path, name, **values)
        with pytest.raises(ConfigError, match=re.escape(reason)):
            compare("own", {"own": own, "same": same, name: other})


def test_results_of_another_version_of_mteb_are_said_in_a_line(tmp_path):
    systems = {"own": read(tmp_path, "own", test=0.5), "old": read(tmp_path, "old", test=0.4, version="1.20.0")}
    assert "            made by different versions of mteb: 1.20.0, 2.26.24" in list(
        compare_lines(compare("own", systems))
    )


# ---------------------------------------------------------------------------------- queries that chose the checkpoint
def chosen_by(rule, other=""):
    chose = [n for n in range(20) if rule == "all" or half_of(f"a/{n}") == "dev"]
    hashes = " ".join(hash_of(f"question {n}{other}") for n in chose)
    return {"checkpoint_chosen_by": [{"search": "s", "split": "dev", "rule": rule, "queries": 9, "hashes": hashes}]}


def write_half(folder, system, knows_texts, chose, others):
    """A system's results on a task of twenty queries, with one score for those of the half that chooses."""
    results = EvalFolder(folder)
    queries = {f"dev/default/a/{n}": chose if half_of(f"a/{n}") == "dev" else others for n in range(20)}
    row = {"ndcg_at_10": 0.5, "main_score": 0.5, "languages": ["nob-Latn"], "hf_subset": "default"}
    write_json(results.score_file(system, "s"), {"task_name": "s", "scores": {"dev": [row]}})
    twin = {"made_with": {}, "ndcg_at_10": queries}
    if knows_texts:
        twin["queries"] = {f"dev/default/a/{n}": hash_of(f"question {n}") for n in range(20)}
    write_json(results.query_file(system, "s"), twin)


def test_all_systems_are_compared_on_the_queries_that_did_not_choose_the_checkpoint(tmp_path):
    write_half(tmp_path, "main", True, chose=1.0, others=0.25)
    write_half(tmp_path, "bm25", False, chose=0.0, others=0.5)  # an earlier result, which does not say of which queries
    left = sum(half_of(f"a/{n}") == "test" for n in range(20))
    systems = EvalFolder(tmp_path, chosen_by("half")).systems()
    assert {name: found["s"].main for name, found in systems.items()} == {"main": 0.25, "bm25": 0.5}
    assert systems["main"]["s"].note == f"{left} queries; {20 - left} others chose the checkpoint and are left out"
    values = compare("main", systems)
    assert values["against"]["bm25"]["tasks"]["s"]["delta"] == -0.25
    assert "left_out" not in values["against"]["bm25"]["tasks"]["s"]
    assert f"            s: {20 - left} queries chose the checkpoint and are left out" in list(compare_lines(values))


def test_a_baseline_that_has_no_scores_per_query_is_not_compared_with_a_half(tmp_path):
    write_half(tmp_path, "main", True, chose=1.0, others=0.25)
    write_half(tmp_path, "bm25", True, chose=1.0, others=0.25)
    systems = EvalFolder(tmp_path, chosen_by("half")).systems()
    with pytest.raises(ConfigError, match="published has no scores per query, and some queries chose the checkpoint"):
        compare("main", systems | {"published": {"s": score("s", 0.9, part="dev/default")}})


@pytest.mark.parametrize(
    ("manifest", "note"),
    [
        ({}, ""),
        (chosen_by("half", other=" of another set"), ""),
        (chosen_by("all"), "these queries also chose the checkpoint, so the score is optimistic"),
    ],
)
def test_all_queries_are_reported_where_none_or_all_of_them_chose(tmp_path, manifest, note):
    write_half(tmp_path, "main", True, chose=1.0, others=0.25)
    found = EvalFolder(tmp_path, manifest).systems()["main"]["s"]
    assert (found.main, len(found.per_query), found.note) == (0.5, 20, note)


def test_scores_on_nanobeir_are_said_to_be_optimistic_where_it_chose():
    manifest = {"checkpoint_chosen_by": [{"search": "NanoBEIR-no", "rule": "all", "also_reported": True}]}
    notes = [score(task, 0.5).without_choosers(manifest, {}).note for task in ("MultilingualNanoNQRetrieval", "NQ")]
    assert notes == ["these queries also chose the checkpoint, so the score is optimistic", ""]
