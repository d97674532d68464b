"""Fusion of stored rankings, and the weight chosen on one half of the queries."""

import json
import random

import pytest
from mteb.models import HybridSearch
from mteb.models.models_protocols import SearchProtocol

from evaluate import hybrid as module
from evaluate.bm25 import BM25
from evaluate.hybrid import choose_weight, fuse, hybrid, hybrid_lines, mean_ndcg, queries_of
from evaluate.scores import best, ndcg_per_query, score_system
from evaluate.search import SearchSystem
from evaluate.tasks import local_task
from trainer.config import ConfigError
from trainer.data.choosing import half_of
from trainer.runs.results import EvalFolder, Ranking

# Six passages. The first system finds a, b, c, d in this order, the second d, b, e.
FIRST = {"a": 9.0, "b": 7.0, "c": 4.0, "d": 1.0}
SECOND = {"d": 0.8, "b": 0.6, "e": 0.3}
PASSAGES = [f"p{number:02}" for number in range(12)]
DEV, TEST = ([query for query in map(str, range(60)) if half_of(query) == half][:20] for half in ("dev", "test"))


def one_query(found, relevant="a"):
    return {"test/default": Ranking({"q": found}, {"q": {relevant: 1}})}


def ranking(places):
    """Twelve passages for each query, p00 at its place (0 is the best), and p00 the relevant one."""
    found = {}
    for query, place in places.items():
        order = PASSAGES[1:]
        order.insert(place, "p00")
        found[query] = {passage: float(len(order) - rank) for rank, passage in enumerate(order)}
    return Ranking(found, {query: {"p00": 1} for query in places})


def at_random(seed, queries, passages=30, found=20):
    """Rankings in which queries and passages are found at random, some by one system only."""
    chance = random.Random(seed)
    names = [f"p{number}" for number in range(passages)]
    return {query: {name: chance.uniform(-5, 5) for name in chance.sample(names, found)} for query in queries}


def store(folder, task="a", **systems):
    for name, parts in systems.items():
        folder.write_rankings(name, task, parts if isinstance(parts, dict) else {"test/default": parts})
    return folder


@pytest.fixture
def folder(tmp_path):
    return EvalFolder(tmp_path)


def test_grades_choose_the_weight():
    """The first puts a in front of b, the second b in front of a. Where both are as relevant, no weight is better."""
    found = {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0}
    for grades, weight in (({"a": 1, "b": 1}, 0.5), ({"a": 3, "b": 1}, 0.55), ({"a": 1, "b": 3}, 0.5)):
        first, second = ({"test/default": Ranking({"q": passages}, {"q": grades})} for passages in found)
        assert choose_weight(first, second) == weight
    # at 0.5 both have the same score, and trec_eval puts b first
    assert mean_ndcg(first) == pytest.approx(0.7967, abs=1e-4) and mean_ndcg(second) == 1


# ---------------------------------------------------------------------------------- fusion
def test_reciprocal_rank_fusion_of_six_passages_is_that_worked_out_by_hand():
    """Half of 1 / (60 + rank) from each; b is second twice and beats a, which is first once. f was never found."""
    found = fuse(one_query(FIRST), one_query(SECOND), "rrf")["test/default"].found["q"]
    expected = {
        "a": (1 / 61) / 2,
        "b": (1 / 62 + 1 / 62) / 2,
        "c": (1 / 63) / 2,
        "d": (1 / 64 + 1 / 61) / 2,
        "e": (1 / 63) / 2,
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(best({"q": found})["q"]) == ["b", "d", "a", "e", "c"]


@pytest.mark.parametrize(
    "weight,expected",
    [
        (0.5, {"a": 0.5, "b": 0.375 + 0.3, "c": 0.1875, "d": 0.5, "e": 0.0}),
        (0.2, {"a": 0.2, "b": 0.15 + 0.48, "c": 0.075, "d": 0.8, "e": 0.0}),
    ],
)
def test_weighted_fusion_of_six_passages_is_that_worked_out_by_hand(weight, expected):
    """Scaled to 0 … 1 the first gives a 1, b 6/8, c 3/8, d 0, and the second d 1, b 3/5, e 0."""
    found = fuse(one_query(FIRST), one_query(SECOND), "rsf", weight)["test/default"].found["q"]
    assert found == pytest.approx(expected)


class Replayed(SearchSystem):
    """Finds again what is stored."""

    def __init__(self, found):
        super().__init__("replayed")
        self.found = found

    def search(self, queries, **options):
        return self.found


@pytest.mark.parametrize("strategy,weight", [("rrf", 0.5), ("rsf", 0.5), ("rsf", 0.35)])
def test_fusing_what_was_found_gives_what_mteb_finds_when_both_systems_search(strategy, weight):
    one, two = at_random(1, "abcdef"), at_random(2, "cdefgh", found=12)
    relevant = {query: {"p3": 1, "p7": 1} for query in "abcdefgh"}
    search = HybridSearch([Replayed(one), Replayed(two)], weights=[weight, 1 - weight], fusion_strategy=strategy)
    options = dict.fromkeys(["task_metadata", "hf_split", "hf_subset", "encode_kwargs"])
    expected = search.search([{"id": query} for query in relevant], top_k=100, **options)
    found = fuse({"test/no": Ranking(one, relevant)}, {"test/no": Ranking(two, relevant)}, strategy, weight)
    assert isinstance(Replayed(one), SearchProtocol)
    assert best(found["test/no"].found) == expected
    assert found["test/no"].relevant == relevant


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_system_with_all_the_weight_is_that_system_alone(weight):
    relevant = {query: {"p3": 1, "p7": 2} for query in "abcdef"}
    systems = [Ranking(at_random(seed, "abcdef"), relevant) for seed in (3, 4)]
    one, two = ({"test/default": system} for system in systems)
    fused = ndcg_per_query(fuse(one, two, "rsf", weight)["test/default"])
    assert fused == ndcg_per_query(systems[weight == 0.0])
    assert fused != ndcg_per_query(systems[weight == 1.0])


def test_a_query_that_one_system_has_not_answered_is_answered_by_the_other():
    one, two = one_query({}), one_query(FIRST)
    assert mean_ndcg(one) == 0
    for strategy in ("rrf", "rsf"):
        assert mean_ndcg(fuse(one, two, strategy)) == mean_ndcg(fuse(two, one, strategy)) == 1


# ---------------------------------------------------------------------------------- halves
def test_a_query_is_in_dev_when_the_hash_of_its_id_is_even():
    """`printf q1 | sha256sum` ends in …43cb, q2's in …67e1, æ's in …bf60."""
    assert [half_of(query) for query in ("q1", "q2", "æ")] == ["test", "test", "dev"]


def test_the_halves_are_about_as_large_and_hold_every_query_once():
    queries = [f"query-{number}" for number in range(2_000)]
    parts = {"test/default": Ranking({}, {query: {"p": 1} for query in queries})}
    dev, test = (list(queries_of(parts, half)["test/default"].relevant) for half in ("dev", "test"))
    assert sorted(dev + test) == sorted(queries)
    assert abs(len(dev) - 1_000) < 100  # 4.5 standard deviations


def test_a_query_is_in_the_same_half_in_every_language():
    places = dict.fromkeys(DEV[:2] + TEST[:3], 0)
    parts = {"test/no": ranking(places), "test/sv": ranking(places)}
    for half, queries in (("dev", DEV[:2]), ("test", TEST[:3])):
        kept = queries_of(parts, half)
        assert {part: set(values.relevant) for part, values in kept.items()} == {part: set(queries) for part in parts}
        assert {part: set(values.found) for part, values in kept.items()} == {part: set(queries) for part in parts}


# ---------------------------------------------------------------------------------- the weight
def test_the_weight_is_chosen_on_dev_and_judged_on_test_where_the_opposite_would_win(folder):
    """On dev the first is right and the second is wrong, on test the other way round."""
    store(
        folder,
        splade=ranking(dict.fromkeys(DEV, 0) | dict.fromkeys(TEST, 11)),
        bm25=ranking(dict.fromkeys(DEV, 11) | dict.fromkeys(TEST, 0)),
    )
    values = hybrid(folder, "splade", "bm25", ["a"])["tasks"]["a"]
    assert values["weight"] > 0.5
    assert values["dev"]["weighted"] == values["dev"]["splade"] == 1
    assert values["test"]["weighted"] < 0.5 < values["test"]["bm25"] == 1
    assert (values["dev_queries"], values["test_queries"]) == (20, 20)


def test_what_happens_on_test_does_not_move_the_weight(folder):
    chance = random.Random(6)
    places = {query: (chance.randrange(8), chance.randrange(8)) for query in DEV}
    found = []
    for seed in range(5):
        chance = random.Random(seed)
        places |= {query: (chance.randrange(12), chance.randrange(12)) for query in TEST}
        one, two = (ranking({query: pair[number] for query, pair in places.items()}) for number in (0, 1))
        found.append(hybrid(store(folder, splade=one, bm25=two), "splade", "bm25", ["a"])["tasks"]["a"])
    assert len({(row["weight"], json.dumps(row["dev"])) for row in found}) == 1
    assert len({json.dumps(row["test"]) for row in found}) == 5
    parts = [folder.rankings(name, "a") for name in ("splade", "bm25")]
    assert choose_weight(*(queries_of(part, "test") for part in parts)) != found[0]["weight"]


def test_each_half_is_scored_with_the_fusions_that_are_named(folder):
    relevant = {query: {"p3": 1, "p7": 1} for query in DEV + TEST}
    one, two = ({"test/default": Ranking(at_random(seed, relevant), relevant)} for seed in (9, 10))
    values = hybrid(store(folder, splade=one, bm25=two), "splade", "bm25", ["a"])["tasks"]["a"]
    parts = {
        "splade": one,
        "bm25": two,
        "rrf": fuse(one, two, "rrf"),
        "weighted": fuse(one, two, "rsf", values["weight"]),
    }
    for half in ("dev", "test"):
        assert values[half] == {name: mean_ndcg(queries_of(rankings, half)) for name, rankings in parts.items()}
        assert len(set(values[half].values())) == 4


def test_the_weight_is_the_best_of_all_twentieths_on_dev():
    relevant = {query: {"p3": 1, "p7": 1} for query in DEV}
    one, two = ({"test/default": Ranking(at_random(seed, DEV), relevant)} for seed in (7, 8))
    scores = {step / 20: mean_ndcg(fuse(one, two, "rsf", step / 20)) for step in range(21)}
    weight = choose_weight(one, two)
    assert scores[weight] == max(scores.values()) > min(scores.values())
    assert len(scores) == 21


def test_of_equally_good_weights_the_one_nearest_to_a_half_is_chosen():
    right, wrong = ({"test/default": ranking(dict.fromkeys(DEV, place))} for place in (0, 11))
    assert choose_weight(right, right) == 0.5
    good = [step / 20 for step in range(21) if mean_ndcg(fuse(right, wrong, "rsf", step / 20)) == 1]
    assert choose_weight(right, wrong) == min(good)
    assert choose_weight(wrong, right) == pytest.approx(1 - min(good))


# ---------------------------------------------------------------------------------- tasks
def test_scores_are_those_of_the_systems_and_parts_count_the_same(folder):
    """Norwegian has 40 queries with the passage first, Swedish 20 with it second: (1 + 1 / log2(3)) / 2."""
    parts = {"test/no": ranking(dict.fromkeys(DEV + TEST, 0)), "test/sv": ranking(dict.fromkeys(DEV, 1))}
    values = hybrid(store(folder, splade=parts, bm25=parts), "splade", "bm25", ["a"])["tasks"]["a"]
    assert values["all"] == pytest.approx(dict.fromkeys(["splade", "bm25", "rrf"], (1 + 0.63093) / 2), abs=1e-5)
    assert values["dev"] == pytest.approx(
        dict.fromkeys(["splade", "bm25", "rrf", "weighted"], (1 + 0.63093) / 2), abs=1e-5
    )
    assert set(values["test"].values()) == {1.0}  # Swedish has no query there
    assert (values["dev_queries"], values["test_queries"], values["weight"]) == (40, 20, 0.5)


def test_scores_are_those_that_mteb_gives_the_systems(tmp_path):
    """BM25 on a folder, with the passages of every third query spoilt."""
    texts = [f"ord{number} felles{number % 5} tekst" for number in range(40)]
    data = tmp_path / "made"
    data.mkdir()
    for name, column in (("corpus.jsonl", "d"), ("queries.test.jsonl", "q")):
        rows = [
            {"_id": f"{column}{number}", "text": text if number % 3 or column == "d" else f"felles{number % 5}"}
            for number, text in enumerate(texts)
        ]
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{number}\td{number}\t1\n" for number in range(40))
    (data / "qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    folder = EvalFolder(tmp_path / "eval")
    for name in ("one", "two"):
        assert score_system(name, BM25, name, [local_task(data, None)], folder, print) == {}
    values = hybrid(folder, "one", "two", ["made"])["tasks"]["made"]
    score = folder.systems()["one"]["made"].main
    assert 0.5 < score < 1
    assert values["all"] == pytest.approx({"one": score, "two": score, "rrf": score}, abs=1e-5)
    assert values["dev_queries"] + values["test_queries"] == 40
    assert values["test"]["weighted"] == pytest.approx(values["test"]["one"])


def test_too_few_queries_get_no_weight_and_the_mean_is_over_the_other_tasks(folder):
    few = ranking(dict.fromkeys(DEV + TEST[:9], 0))
    enough = ranking(dict.fromkeys(DEV[:10] + TEST[:10], 1))
    store(folder, "few", splade=few, bm25=few)
    store(folder, "enough", splade=enough, bm25=enough)
    values = hybrid(folder, "splade", "bm25", ["few", "enough"])
    assert values["tasks"]["few"] == {
        "dev_queries": 20,
        "test_queries": 9,
        "weight": None,
        "why": "20 dev and 9 test queries; a weight needs 10 of each",
        "all": {"splade": 1.0, "bm25": 1.0, "rrf": 1.0},
    }
    assert values["mean_test"] == values["tasks"]["enough"]["test"]
    assert hybrid(folder, "splade", "bm25", ["few"])["mean_test"] == {}
    assert json.loads(json.dumps(values)) == values


def test_a_system_that_has_not_run_is_one_line(folder):
    store(folder, splade=ranking({"q": 0}))
    with pytest.raises(ConfigError, match="bm25 has not been run on a: there is no "):
        hybrid(folder, "splade", "bm25", ["a"])


@pytest.mark.parametrize("other", [{"test/sv": ranking({"q": 0})}, ranking({"q": 0, "q2": 0})])
def test_rankings_of_different_data_are_not_fused(folder, other):
    store(folder, splade=ranking({"q": 0}), bm25=other)
    with pytest.raises(ConfigError, match=r"^splade and bm25 were run on different data of a. Run both again$"):
        hybrid(folder, "splade", "bm25", ["a"])


# ---------------------------------------------------------------------------------- lines
def test_the_lines_are_a_table_of_the_test_halves_and_the_small_tasks_below():
    row = {"splade": 0.43, "my-bm25-run": 0.45, "rrf": 0.47, "weighted": 0.48125}
    values = {
        "first": "splade",
        "second": "my-bm25-run",
        "tasks": {
            "norquad": {"dev_queries": 500, "test_queries": 1_012, "test": row, "weight": 0.35},
            "tiny": {"dev_queries": 3, "test_queries": 4, "weight": None, "all": row, "why": "too few"},
        },
        "mean_test": row,
    }
    assert list(hybrid_lines(values)) == [
        "hybrid      nDCG@10                         splade  my-bm25-run     rrf  weighted  weight of splade",
        "            norquad (1,012 test queries)    0.4300       0.4500  0.4700    0.4813  0.35",
        "            mean over 1 of 2 tasks          0.4300       0.4500  0.4700    0.4813",
        "hybrid      tiny, all queries: splade 0.4300, my-bm25-run 0.4500, rrf 0.4700; no weight: too few",
    ]
    assert module.MIN_QUERIES == 10
