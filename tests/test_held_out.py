"""Rows of the evaluation loss share no text with rows that are trained on, in whatever set."""

import json
import random

import pytest

from tests.conftest import TINY
from tests.test_plan import lines_about
from trainer.config import load_config
from trainer.data.loading import load_data


def load(folder, **sets):
    """sets: rows and options by name."""
    lines = []
    for name, (rows, options) in sets.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines.append(f"  {name}: {{source: {folder / name}.jsonl{options}}}")
    return load_lines(folder, lines)


def load_lines(folder, lines):
    (folder / "config.yaml").write_text(TINY.replace("  quickstart: {}", "\n".join(lines)))
    config = load_config(folder / "config.yaml").config
    data = load_data(config)
    return data, "\n".join(lines_about(config, data))


def texts(sets, name=""):
    subsets = (rows for subset, rows in sets.items() if subset.startswith(name))
    return {text for rows in subsets for row in rows for text in row.values()}


def shared_among(rows, passages, seed, negatives=True):
    """Questions of their own, with passages that others have too."""
    draw = random.Random(seed)
    found = [
        {"anchor": f"{seed}: spørsmål {i}", "positive": f"avsnitt {draw.randrange(passages)}"} for i in range(rows)
    ]
    return [row | {"negative": f"avsnitt {draw.randrange(passages)}"} if negatives else row for row in found]


@pytest.mark.parametrize(
    ("rows", "passages", "negatives"),
    [(2000, 3000, True), (2000, 500, False), (600, 600, True), (40, 4, False), (300, 20, True)],
)
def test_no_text_of_a_held_out_row_is_trained_on_however_rows_share_them(tmp_path, rows, passages, negatives):
    own = shared_among(rows, passages, 1, negatives)
    data, _ = load(tmp_path, one=(own, ", eval_rows: 100"), two=(shared_among(rows, passages, 2), ", eval_rows: 50"))
    assert texts(data.eval).isdisjoint(texts(data.train))
    for name, most in (("one", 100), ("two", 50)):
        summary = data.summaries[name]
        left = sum(summary.left_out.values())
        assert summary.rows + left == rows
        assert left <= rows // 10  # those held out are in it
        assert summary.eval_rows == summary.left_out.get("held out for the evaluation loss", 0)
        assert summary.eval_rows + sum(summary.eval_left_out.values()) == min(most, rows // 10)
    if rows == 2000:  # some are found in both, though most passages are in both
        assert min(summary.eval_rows for summary in data.summaries.values()) > 0


def test_rows_of_one_passage_are_held_out_together(tmp_path):
    rows = [{"anchor": f"spørsmål {i}", "positive": f"avsnitt {i // 4}"} for i in range(400)]
    data, said = load(tmp_path, one=(rows, ", eval_rows: 20"))
    assert len(texts(data.eval) & {row["positive"] for row in rows}) == 5
    assert data.summaries["one"].left_out == {"held out for the evaluation loss": 20}
    assert "not evaluated on" not in said


def test_a_row_with_several_negatives_is_held_out_or_trained_on_as_a_whole(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"p{i}", "negative_1": f"n{i}", "negative_2": f"m{i}"} for i in range(100)]
    data, _ = load(tmp_path, one=(rows, ", eval_rows: 10"))
    assert len(data.eval["one"]) == 10
    assert texts(data.eval).isdisjoint(texts(data.train))


def test_rows_that_cannot_be_held_out_are_said_to_be_trained_on(tmp_path):
    data, said = load(tmp_path, one=([{"anchor": f"q{i}", "positive": "ett svar"} for i in range(60)], ""))
    assert (data.summaries["one"].rows, len(data.eval)) == (60, 0)
    assert "6 rows not evaluated on: each shares its texts with too many" in said


def test_the_same_rows_are_held_out_whatever_else_is_trained_on(tmp_path):
    rows = shared_among(500, 800, 3)
    alone, _ = load(tmp_path, one=(rows, ""))
    again, _ = load(tmp_path, one=(rows, ""))
    beside, _ = load(
        tmp_path, other=([{"anchor": f"a{i}", "positive": f"b{i}"} for i in range(90)], ""), one=(rows, "")
    )
    assert texts(alone.eval) == texts(again.eval) == texts(beside.eval, "one") != set()


def test_rows_of_a_split_of_its_own_that_share_a_text_with_training_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "beir"
    folder.mkdir()
    corpus = [{"_id": f"p{i}", "text": f"avsnitt {i}"} for i in range(20)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    for split, passages in (("train", range(12)), ("dev", range(9, 20))):
        queries = [{"_id": f"{split}{i}", "text": f"{split}-spørsmål {i}"} for i in passages]
        (folder / f"queries.{split}.jsonl").write_text("\n".join(map(json.dumps, queries)))
        rows = [f"{split}{i}\tp{i}\t1" for i in passages]
        (folder / f"qrels.{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    data, said = load_lines(tmp_path, [f"  mine: {{source: {folder}}}"])
    assert data.eval["mine"]["positive"] == [f"avsnitt {i}" for i in range(12, 20)]
    assert data.summaries["mine"].rows == 12
    assert "3 rows not evaluated on: they share a text with rows that are trained on" in said
    assert len(data.search[0].queries) == 11  # a search is made in all passages anyway


def test_no_mined_negative_is_a_passage_of_a_held_out_row(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    rows = [{"anchor": f"innsjø nummer {i}", "positive": f"innsjø {i % 30} ligger i fjellet"} for i in range(60)]
    data, _ = load(tmp_path, one=(rows, ", mine: {method: bm25, range: [0, 50]}"))
    assert data.summaries["one"].mined["negatives"] > 50
    assert len(data.eval["one"]) == 6
    assert texts(data.eval).isdisjoint(texts(data.train))
