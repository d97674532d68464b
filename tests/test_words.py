"""Several values in one text come apart where a person would part them."""

import shlex

import pytest
import yaml

from trainer.config.words import split_names, split_pairs, split_paths


@pytest.mark.parametrize(
    "pairs",
    [
        ["training.max_steps=50", "hardware.device=cpu"],
        ["a.b=[10, 100]", "c.d=1"],
        ['model_card.model_name="Our model"', "datasets.x.mine.range=[10, 100]"],
        ["model_card.model_name=Our own model", "a.b=2"],
        ["model_card.model_name=Ola's model", "a.b=it's"],
        ["a.b='it''s c.d=2'", "e.f=3"],
        ['a.b="c.d=1 \\" e.f=2"', "g.h={i: [1, 2], j: 'k l.m=3'}"],
        ["datasets.scandi-qa.source=data/my rows.jsonl", "datasets.x={source: a b, columns: {anchor: q}}"],
        ["a.b=x=y", "c.d=https://host/path?e=f"],
        ["extends=base.yaml"],
        ["a.b=", "c.d=2"],
        ["a.b=[1, 2"],
        ["model_card.model_name=NB] and more", "a.b=2"],
    ],
)
def test_pairs_come_apart_where_they_were_put_together(pairs):
    for blank in (" ", "   ", "\t"):
        assert split_pairs(blank.join(pairs)) == pairs
    assert split_pairs("  ") == []


def test_values_without_blanks_come_apart_as_a_shell_parts_words():
    text = "training.max_steps=50 hardware.device=cpu  datasets.a.columns={anchor:q}"
    assert split_pairs(text) == shlex.split(text)


def test_quoted_values_are_what_yaml_reads_in_a_file():
    (pair,) = split_pairs("""a.b="it's [1, 2 c.d=3" """)
    assert yaml.safe_load(pair.partition("=")[2]) == "it's [1, 2 c.d=3"


def test_names_come_apart_at_blanks_and_commas_and_those_that_exist_stay_whole():
    there = {"our search", "Ola's, new", "a", "a b"}
    found = split_names("norwegian,our search  Ola's, new, a b c", there.__contains__)
    assert found == ["norwegian", "our search", "Ola's, new", "a b", "c"]
    assert split_names(" , ", there.__contains__) == []
    assert split_names("a, b", set().__contains__) == ["a", "b"]


def test_several_baselines_come_apart_and_one_that_is_not_there_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my results.json", "other"):
        (tmp_path / name).touch()
    assert list(map(str, split_paths(("my results.json other",)))) == ["my results.json", "other"]
    assert list(map(str, split_paths(("my resluts.json",)))) == ["my resluts.json"]
