from math import log

import pytest

from evaluate.bm25 import BM25
from evaluate.tasks import ISO, LANGUAGES
from trainer.config import ConfigError
from trainer.data.bm25 import STEMMERS, STOPWORDS, BM25Index

CORPUS = {
    "a": "fisk og fisk",
    "b": "fisk i havet",
    "c": "ein båt på havet i dag",
    "d": "båten ligg ved kaia",
    "e": "sol",
    "f": "regn og vind",
}


def score(query, text):
    """BM25 by hand: k1 1.2, b 0.75, idf ln(1 + (N - n + 0.5) / (n + 0.5)); words of one letter do not count."""
    words = {name: [word for word in passage.split() if len(word) > 1] for name, passage in CORPUS.items()}
    own = [word for word in text.split() if len(word) > 1]
    mean = sum(map(len, words.values())) / len(words)
    total = 0.0
    for word in query.split():
        n = sum(word in passage for passage in words.values())
        tf = own.count(word)
        total += log(1 + (6 - n + 0.5) / (n + 0.5)) * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(own) / mean))
    return total


def ranked(query, language=None):
    """Ids of the passages that BM25 finds, best first, with their scores."""
    system = BM25()
    system.index_texts(list(CORPUS.values()), language)
    ((numbers, scores),) = system.search_texts([query], 10)
    return {list(CORPUS)[number]: value for number, value in zip(numbers, scores, strict=True)}


@pytest.mark.parametrize("query", ["fisk", "havet fisk", "båt havet", "sol"])
def test_bm25_gives_six_passages_the_scores_worked_out_by_hand(query):
    expected = {name: score(query, text) for name, text in CORPUS.items() if score(query, text) > 0}
    found = ranked(query)
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(found) == sorted(expected, key=lambda name: -expected[name])


def test_passages_without_a_word_of_the_query_are_not_found():
    assert set(ranked("sol")) == {"e"}
    assert ranked("snø") == {}


@pytest.mark.parametrize(
    "language,query,passage,stopwords",
    [
        ("nob", "båter", "Båten ligger ved kaia.", "og det som"),
        ("nno", "båtar", "Båten ligg ved kaia.", "og eg som"),
        ("dan", "bådene", "En båd ligger ved kajen.", "og jeg der"),
        ("swe", "båtar", "Båten ligger vid kajen.", "och jag att"),
    ],
)
def test_each_language_finds_inflected_words_and_ignores_its_stop_words(language, query, passage, stopwords):
    def numbers(system, text):
        ((found, _),) = system.search_texts([text], 2)
        return sorted(found.tolist())

    analysed, plain = BM25(), BM25()
    analysed.index_texts([passage, f"fjord {stopwords}"], language)
    plain.index_texts([passage, f"fjord {stopwords}"], None)
    assert (numbers(analysed, query), numbers(plain, query)) == ([0], [])
    assert (numbers(analysed, stopwords), numbers(plain, stopwords)) == ([], [1])


def test_every_scandinavian_language_of_the_tasks_has_an_analysis():
    assert {STEMMERS[code] for code in LANGUAGES} == STOPWORDS.keys()


def test_a_language_has_one_analysis_whichever_of_its_codes_is_given():
    for short, code in ISO.items():
        assert STEMMERS[short] == STEMMERS[code.partition("-")[0]]


def test_stop_words_are_words_where_they_are_asked_for():
    """Mining searches for them too, as the query is written."""
    index = BM25Index(["og det som", "fjord"], "no", without_stop_words=False)
    assert index.words_of(["Hvor ligger og fjordene"]) == [["hvor", "ligg", "og", "fjord"]]
    assert index.scores_of(["og"])[0] > 0
    assert BM25Index(["og det som"], "no", without_stop_words=True).is_empty


def test_passages_without_any_word_are_one_line():
    with pytest.raises(ConfigError, match="no passage has a word to search for"):
        BM25().index_texts(["i", "?"], None)
