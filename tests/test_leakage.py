import json
import random
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

import evaluate.leakage
from evaluate.leakage import (
    Forms,
    find_leaks,
    leakage_lines,
    words_of,
)
from evaluate.tasks import select_tasks
from trainer.config import ConfigError

QUESTION = "Hvor mange mennesker bor det i Trondheim kommune?"
PASSAGE = (
    "Mjøsa er Norges største innsjø og ligger på Østlandet mellom Hamar, Gjøvik og Lillehammer. Den er dypere enn havet "
    "utenfor kysten, og båten Skibladner går der."
)
# 24 words: 20 different 5-grams.
NUMBERED = [f"ord{number}" for number in range(24)]


def write_texts(folder, *texts):
    """The training texts of a run, in the file it keeps them in."""
    file = folder / "training_texts.parquet"
    pq.write_table(pa.table({"text": list(texts), "dataset": [f"set-{len(text) % 2}" for text in texts]}), file)
    return file


def local_task(folder, queries, passages):
    """A search set in BEIR layout, as the task that is evaluated."""
    folder.mkdir()
    rows = {"corpus.jsonl": passages, "queries.test.jsonl": queries}
    for name, texts in rows.items():
        lines = [json.dumps({"_id": f"{number}", "text": text}) for number, text in enumerate(texts)]
        (folder / name).write_text("\n".join(lines))
    judgements = [f"{number}\t0\t1" for number in range(len(queries))]
    (folder / "qrels.test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judgements]))
    return select_tasks([str(folder)])


def compare(folder, training, query="hva", passage="noe helt annet"):
    """Kinds of overlap of one query and one passage, and the examples."""
    number = len(list(folder.iterdir()))
    tasks = local_task(folder / f"set{number}", [query], [passage])
    values = find_leaks(write_texts(folder, *training), tasks)["tasks"][f"set{number}"]
    return [key for key in values if key.startswith(("exact", "near")) and values[key]], values["examples"]


def changed(words, *places):
    """The words, with those at some places replaced."""
    return " ".join("annet" if place in places else word for place, word in enumerate(words))


@pytest.mark.parametrize(
    "training",
    [
        QUESTION,
        "HVOR MANGE MENNESKER BOR DET I TRONDHEIM KOMMUNE",
        " «Hvor  mange\tmennesker –\nbor det i: Trondheim_kommune»",
        "Hvor mange mennesker bor det i Ｔｒｏｎｄｈｅｉｍ kommune?",
    ],
)
def test_a_query_is_trained_on_whatever_its_case_punctuation_and_spaces(tmp_path, training):
    kinds, (example,) = compare(tmp_path, ["noe annet", training], query=QUESTION)
    assert kinds == ["exact_queries"]
    assert (example["kind"], example["side"], example["overlap"]) == ("exact", "query", 1.0)
    assert example["training"] == " ".join(training.split())
    assert example["evaluation"] == QUESTION


def test_a_letter_written_as_two_characters_is_the_same_letter():
    assert words_of("Bla\u030abær på Sta\u030al") == ["blåbær", "på", "stål"]


def test_one_other_letter_is_another_text(tmp_path):
    assert compare(tmp_path, ["Hvor ligger Moss?"], query="Hvor ligger Mosse?") == ([], [])


def test_texts_without_a_word_are_not_the_same_text(tmp_path):
    assert compare(tmp_path, ["???", "", "🙂"], query="!!!", passage="🙃")[0] == []


@pytest.mark.parametrize(
    "original,paraphrase",
    [
        (QUESTION, "Hva er folketallet i Trondheim?"),
        ("Hvem skrev romanen Sult fra 1890?", "Hvilken forfatter står bak boken Sult, utgitt i 1890?"),
        ("Når ble Oslo hovedstad i landet Norge?", "Når ble Bergen hovedstad i landet Norge?"),
        (
            PASSAGE,
            "Norges største innsjø heter Mjøsa. Den ligger på Østlandet, har byene Hamar, Gjøvik og Lillehammer ved "
            "bredden, er dypere enn havet like utenfor, og trafikkeres av Skibladner.",
        ),
    ],
)
def test_a_paraphrase_is_neither_exact_nor_near(tmp_path, original, paraphrase):
    assert compare(tmp_path, [original], query=paraphrase, passage=paraphrase) == ([], [])
    assert compare(tmp_path, [original], query=original)[0] == ["exact_queries"]


def test_a_passage_with_a_few_words_changed_is_near(tmp_path):
    training = PASSAGE.replace("Mjøsa", "Mjøsen").replace("båten", "hjuldamperen")
    kinds, (example,) = compare(tmp_path, [training], passage=PASSAGE)
    assert kinds == ["near_passages"]
    # 26 words, 22 5-grams: the first word stands in one of them, and the 23rd (the fourth last) in four.
    assert example["overlap"] == pytest.approx(17 / 22, abs=5e-4)


@pytest.mark.parametrize("places,overlap", [([4], 0.75), ([4, 9], 0.5), ([4, 9, 14], None)])
def test_a_long_text_is_near_when_half_of_its_5_grams_stand_in_a_training_text(tmp_path, places, overlap):
    kinds, examples = compare(tmp_path, [changed(NUMBERED, *places)], passage=" ".join(NUMBERED))
    assert kinds == (["near_passages"] if overlap else [])
    assert [example["overlap"] for example in examples] == ([overlap] if overlap else [])


@pytest.mark.parametrize(
    "query,near",
    [
        ("i Trondheim ligger en domkirke fra middelalderen", True),  # stands there: 5 of 5 3-grams
        ("i Trondheim ligger en domkirke fra vikingtiden", True),  # 4 of 5
        ("i Trondheim ligger en stavkirke fra middelalderen", False),  # 2 of 5
        ("ligger en domkirke fra middelalderen", True),  # 3 of 3
        ("en domkirke fra middelalderen", False),  # of fewer than 5 words
    ],
)
def test_a_short_query_is_near_when_it_stands_in_a_long_training_text_but_for_an_end(tmp_path, query, near):
    training = f"{PASSAGE} Lenger nord, i Trondheim, ligger en domkirke fra middelalderen. {' '.join(NUMBERED)}"
    assert compare(tmp_path, [training], query=query)[0] == (["near_queries"] if near else [])


def test_a_training_text_that_holds_a_small_part_of_a_passage_is_not_near(tmp_path):
    assert compare(tmp_path, [" ".join(NUMBERED[:10])], passage=" ".join(NUMBERED))[0] == []


def test_several_training_texts_do_not_make_one_near_text_together(tmp_path):
    parts = [" ".join(NUMBERED[:12]), " ".join(NUMBERED[12:])]
    assert compare(tmp_path, parts, passage=" ".join(NUMBERED))[0] == []
    assert compare(tmp_path, [" ".join(parts)], passage=" ".join(NUMBERED))[0] == ["exact_passages"]


@pytest.mark.parametrize(
    "training,kind",
    [(f"Mjøsa\n{PASSAGE}", "exact"), (PASSAGE, "exact"), (PASSAGE[10:], "near"), ("Mjøsa", None)],
)
def test_a_passage_is_compared_with_and_without_its_title(tmp_path, training, kind):
    (task,) = local_task(tmp_path / "titled", [QUESTION], ["-"])
    task.load_data()
    corpus = Dataset.from_dict({"id": ["0"], "title": ["Mjøsa"], "text": [PASSAGE]})
    task.dataset["default"]["test"]["corpus"] = corpus
    found = find_leaks(write_texts(tmp_path, training), [task])
    assert [example["kind"] for example in found["tasks"]["titled"]["examples"]] == ([kind] if kind else [])


def test_a_row_of_several_splits_counts_once_and_one_of_several_languages_in_each():
    def split(query, passages):
        rows = [{"id": f"{number}", "title": None, "text": text} for number, text in enumerate(passages)]
        queries = Dataset.from_list([{"id": "q", "text": query}])
        return {"queries": queries, "corpus": Dataset.from_list(rows), "relevant_docs": {}}

    task = SimpleNamespace(
        metadata=SimpleNamespace(name="two"),
        load_data=lambda: None,
        convert_v1_dataset_format_to_v2=lambda num_proc: None,
        hf_subsets=["da", "sv"],
        eval_splits=["dev", "test"],
        dataset={
            "da": {"dev": split("hvad", ["a", "b"]), "test": split("hvem", ["a", "b"]), "train": split("nej", ["c"])},
            "sv": {"dev": split("vad", ["a"]), "test": split("vad", ["x"])},
        },
    )
    items = list(evaluate.leakage.read_items(task, Forms()))
    assert [item.side for item in items] == ["query"] * 3 + ["passage"] * 4


def contained(evaluation, training):
    """The rule, written out: the share of an evaluation text's n-grams in a training text, where it makes it near."""
    evaluation, training = evaluation.split(), training.split()
    if len(evaluation) < 5:
        return None
    n, enough = (5, 0.5) if len(evaluation) >= 20 else (3, 0.8)
    grams, others = (
        {tuple(text[start : start + n]) for start in range(len(text) - n + 1)} for text in (evaluation, training)
    )
    overlap = len(grams & others) / len(grams)
    return round(overlap, 3) if overlap >= enough else None


@pytest.mark.parametrize("batch", [2000, 7])
def test_near_texts_are_those_of_a_plain_comparison_of_every_pair(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(evaluate.leakage, "BATCH", batch)
    monkeypatch.setattr(evaluate.leakage, "EXAMPLES", 1000)
    dice = random.Random(3)
    # Few words, and pieces of one another: n-grams repeat within texts, and some stand in most texts.
    source = dice.choices("abcde", k=60) + dice.choices([f"w{number}" for number in range(40)], k=200)

    def cut():
        start, length = dice.randrange(len(source) - 5), dice.randrange(2, 45)
        return " ".join(word if dice.random() > 0.04 else "z" for word in source[start : start + length])

    evaluation = list(dict.fromkeys(cut() for _ in range(150)))
    training = list(dict.fromkeys(cut() for _ in range(200)))
    expected = {}
    for text in evaluation:
        overlaps = [overlap for other in training if (overlap := contained(text, other))]
        if text in training or overlaps:
            expected[text] = ("exact", 1.0) if text in training else ("near", max(overlaps))
    values = find_leaks(write_texts(tmp_path, *training), local_task(tmp_path / "random", ["hva"], evaluation))
    monkeypatch.undo()
    examples = values["tasks"]["random"]["examples"]
    beginnings = {text[:160]: found for text, found in expected.items()}
    assert len(beginnings) == len(expected) == values["leaks"]
    assert {example["evaluation"]: (example["kind"], example["overlap"]) for example in examples} == beginnings
    assert 20 < len(expected) < len(evaluation) - 20
    assert {kind for kind, _ in expected.values()} == {"exact", "near"}


@pytest.fixture
def values(tmp_path):
    """Six training texts against two sets, counted by hand."""
    training = [QUESTION, PASSAGE, changed(NUMBERED, 4), "Hvem er du?", "Blått hav", "Grønn skog"]
    first = local_task(
        tmp_path / "first",
        [QUESTION.upper(), "Hvor mange mennesker bor det i Trondheim", "Hvem?"],
        [PASSAGE.lower(), " ".join(NUMBERED), "Blått hav.", "GRØNN SKOG", "hvem er du", "Rød sol"],
    )
    second = local_task(tmp_path / "second", ["Hvem er jeg?"], ["Gul sol"])
    return find_leaks(write_texts(tmp_path, *training), first + second)


def test_queries_and_passages_are_counted_exactly_or_nearly_and_never_both(values):
    first, second = values["tasks"]["first"], values["tasks"]["second"]
    examples = first.pop("examples")
    assert first == {
        "queries": 3,
        "passages": 6,
        "exact_queries": 1,
        "near_queries": 1,
        "exact_passages": 4,
        "near_passages": 1,
    }
    assert second == {
        "queries": 1,
        "passages": 1,
        "exact_queries": 0,
        "near_queries": 0,
        "exact_passages": 0,
        "near_passages": 0,
        "examples": [],
    }
    assert values["leaks"] == 7
    assert values["training_texts"] == 6
    assert [example["kind"] for example in examples] == ["exact"] * 5
    assert examples[0]["side"] == "query"
    assert json.loads(json.dumps(values)) == values


def test_examples_name_the_data_set_of_the_training_text(values):
    example = values["tasks"]["first"]["examples"][0]
    assert example["training"] == QUESTION
    assert example["dataset"] == f"set-{len(QUESTION) % 2}"


def test_every_task_is_one_line_with_its_worst_example(values):
    assert list(leakage_lines(values)) == [
        "first: 1 of 3 queries and 4 of 6 passages were trained on (exactly), 1 more query and 1 more passage nearly",
        f'  worst: a query, exactly in set-{len(QUESTION) % 2}: "{QUESTION.upper()}"',
        "second: 0 of 1 queries and 0 of 1 passages were trained on (exactly)",
    ]


def test_a_run_without_training_texts_is_to_be_trained_again(tmp_path):
    with pytest.raises(ConfigError, match="before its texts were recorded"):
        find_leaks(tmp_path / "training_texts.parquet", [])


def test_a_file_that_holds_no_training_texts_is_named(tmp_path):
    file = tmp_path / "training_texts.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="parquet cannot be read"):
        find_leaks(file, [])
