from math import log, log2

import pytest

from evaluate.bm25 import mean_ndcg, search
from trainer.beir import SearchSet

CORPUS = {
    "a": "fisk og fisk",
    "b": "fisk i havet",
    "c": "ein båt på havet i dag",
    "d": "båten ligg ved kaia",
    "e": "sol",
    "f": "regn og vind",
}


def score(query, text):
    """BM25 by hand: k1 1.2, b 0.75, idf ln(1 + (N - n + 0.5) / (n + 0.5)), without Lucene's constant factor."""
    words = {name: passage.split() for name, passage in CORPUS.items()}
    mean = sum(map(len, words.values())) / len(words)
    total = 0.0
    for word in query.split():
        n = sum(word in passage for passage in words.values())
        tf = text.split().count(word)
        total += log(1 + (6 - n + 0.5) / (n + 0.5)) * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(text.split()) / mean))
    return total


@pytest.mark.parametrize("query", ["fisk", "havet fisk", "båt havet", "sol"])
def test_bm25_ranks_six_passages_as_worked_out_by_hand(query):
    expected = sorted(CORPUS, key=lambda name: -score(query, CORPUS[name]))
    matching = [name for name in expected if score(query, CORPUS[name]) > 0]
    found = search(SearchSet("six", {"q": query}, CORPUS, {}), None)["q"]
    assert found[: len(matching)] == matching


def test_a_stemmer_finds_the_inflected_word():
    found = SearchSet("six", {"q": "båter"}, CORPUS, {})
    assert set(search(found, "no")["q"][:2]) == {"c", "d"}


def test_ndcg_equals_a_hand_worked_case():
    relevant = {"q1": {"a"}, "q2": {"a", "b"}}
    ranked = {"q1": ["x", "a", "y"], "q2": ["b", "x", "a"]}
    first = (1 / log2(3)) / 1
    second = (1 + 1 / log2(4)) / (1 + 1 / log2(3))
    assert mean_ndcg(ranked, relevant) == pytest.approx((first + second) / 2)
    assert mean_ndcg({"q1": ["x"] * 10 + ["a"], "q2": []}, relevant) == 0
