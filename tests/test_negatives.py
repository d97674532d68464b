"""Rows with several negatives: how they are read, counted, cut into rows, and trained on."""

import json

import numpy as np
import pyarrow as pa
import pytest

from tests.checkpoints import write_bert
from tests.test_data import error_of, load, write_lines
from tests.test_models import build
from trainer.config import ConfigError
from trainer.data.negatives import FEW, by_count, parted_like, with_at_most
from trainer.data.roles import negative_roles, negatives_of, roles_of
from trainer.data.rows import DEFAULT_COLUMNS, read_files, rows_from_table
from trainer.data.tokens import Tokeniser

NTUPLES = [
    {"anchor": "a", "positive": "p", "negative_1": "x", "negative_2": "y", "score": 0.1},
    {"anchor": "b", "positive": "q"},
    {"anchor": "c", "positive": None, "negative_1": "x"},
    {"anchor": "d", "positive": "r", "negative_1": " ", "negative_10": "z", "negative_2": "w", "label": 1},
    {"anchor": "e", "positive": "s", "negative_2": "v"},
]
ROWS = [("a", "p", "x", "y"), ("b", "q", None, None), ("d", "r", "w", "z"), ("e", "s", "v", None)]
FLAG_EMBEDDING = [
    {"query": "a", "pos": ["p", "q"], "neg": ["x", "y", "q"], "pos_scores": [9, 8], "neg_scores": [3, 2, 7.5]},
    {"query": "b", "pos": ["r"], "neg": [], "pos_scores": [5], "neg_scores": []},
]
FLAG_COLUMNS = {"anchor": "query", "positive": "pos", "negative": "neg"}
TEVATRON = [
    {
        "query_id": "1",
        "query": "a",
        "positive_passages": [{"docid": "7", "title": "T", "text": "p"}],
        "negative_passages": [{"docid": "8", "title": "", "text": "x"}, {"docid": "9", "title": None, "text": "y"}],
    },
]
TEVATRON_COLUMNS = {"anchor": "query", "positive": "positive_passages", "negative": "negative_passages"}


def written(folder, rows, suffix):
    """The rows as a file of this kind."""
    file = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = dict.fromkeys(name for row in rows for name in row)
        pa.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), file)
    return file


def texts_of(rows):
    return [tuple(row[role] for role in roles_of(rows.table.column_names)) for row in rows.table.to_pylist()]


def in_columns(*rows):
    """A table of (query, positive, negatives…)."""
    width = max(map(len, rows))
    names = ["anchor", "positive", *negative_roles(width - 2)]
    columns = zip(*(row + (None,) * (width - len(row)) for row in rows), strict=True)
    table = {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}
    return pa.table(table | {"language": ["no"] * len(rows)})


# ---------------------------------------------------------------------------------- files
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_numbered_columns_fill_a_rows_negatives_from_the_left(tmp_path, suffix):
    rows = read_files(str(written(tmp_path, NTUPLES, suffix)), None, "no", "key")
    assert texts_of(rows) == ROWS
    assert rows.left_out == {"without text": 1}
    assert list(rows.reading.lines()) == ["not read: columns score, label"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_texts_are_read_and_each_positive_is_a_row(tmp_path, suffix):
    rows = read_files(str(written(tmp_path, FLAG_EMBEDDING, suffix)), FLAG_COLUMNS, "no", "key")
    assert texts_of(rows) == [("a", "p", "x", "y"), ("a", "q", "x", "y"), ("b", "r", None, None)]
    assert list(rows.reading.lines()) == [
        "not read: columns pos_scores, neg_scores; 1 negatives that are their row's own positive",
        "2 rows are of ones with several positives, one for each",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_passages_are_read_with_their_titles(tmp_path, suffix):
    rows = read_files(str(written(tmp_path, TEVATRON, suffix)), TEVATRON_COLUMNS, "no", "key")
    assert texts_of(rows) == [("a", "T p", "x", "y")]


def test_a_list_item_without_text_is_named(tmp_path):
    file = written(tmp_path, [{"query": "a", "pos": ["p", 7], "neg": []}], "jsonl")
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: column 'pos' holds 7, not text"):
        read_files(str(file), FLAG_COLUMNS, "no", "key")
    file = written(tmp_path, [{"query": "a", "pos": [{"body": "p"}], "neg": []}], "jsonl")
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: a passage in column 'pos' has no 'text'. It has: body"):
        read_files(str(file), FLAG_COLUMNS, "no", "key")
    with pytest.raises(ConfigError, match=r"file: column 'pos' holds passages without 'text'. They have: body"):
        rows_from_table(pa.table({"query": ["a"], "pos": [[{"body": "p"}]]}), FLAG_COLUMNS | {"negative": "negative"},
                        "no", where="file")  # fmt: skip


def test_what_is_empty_in_a_list_is_counted_and_strange_types_are_one_line_or_read():
    def read(**columns):
        return rows_from_table(pa.table({"query": ["a"] * 2, **columns}), FLAG_COLUMNS, "no", where="file")

    rows = read(pos=[["p"], ["q"]], neg=[["x", " ", None], []])
    assert next(rows.reading.lines()) == "not read: 2 passages in lists without text"
    assert len(read(pos=[[], []], neg=[[], []])) == 0
    passages = pa.array([[{"title": None, "text": "p"}], [{"title": None, "text": None}]])
    assert texts_of(read(pos=passages, neg=[[], []])) == [("a", "p")]
    large = pa.array([[{"title": "T", "text": "p"}], []], pa.list_(
        pa.struct([("title", pa.string()), ("text", pa.large_string())])))  # fmt: skip
    assert texts_of(read(pos=large, neg=[[], []])) == [("a", "T p")]
    with pytest.raises(ConfigError, match="column 'pos' holds passages whose 'title' is int64, not text"):
        read(pos=pa.array([[{"title": 1, "text": "p"}], []]), neg=[[], []])


def test_a_long_list_widens_no_other_part_of_the_rows(monkeypatch):
    monkeypatch.setattr("trainer.data.rows.ROWS_AT_ONCE", 2)
    lists = [["x"], ["y"], ["z", "w", "v"], [], ["u"]]
    table = pa.table({"query": list("abcde"), "pos": [[f"p{n}"] for n in range(5)], "neg": lists})
    rows = rows_from_table(table, FLAG_COLUMNS, "no", where="file")
    assert [[text for text in row[2:] if text] for row in texts_of(rows)] == lists
    scored = table.append_column("s", [[[1], [1], [1, 2], [], [1]]]).append_column("t", [[[1], [1], [1], [1], [1]]])
    columns = FLAG_COLUMNS | {"positive_scores": "t", "negative_scores": "s"}
    with pytest.raises(ConfigError, match="file: row 3: column 's' holds another number of scores"):
        rows_from_table(scored, columns, "no", where="file")


def test_a_text_that_stands_twice_in_a_row_is_read_once():
    table = pa.table({"q": ["a", "b"], "p": ["r", "s"], "n_1": ["x", "y"], "n_2": [" x", "z"], "n_3": ["w", "y"]})
    rows = rows_from_table(table, {"anchor": "q", "positive": "p", "negative": "n"}, "no", where="file")
    assert texts_of(rows) == [("a", "r", "x", "w"), ("b", "s", "y", "z")]
    assert list(rows.reading.lines()) == ["not read: 2 passages that their row has twice"]


def test_numbered_columns_of_the_users_own_name_are_negatives_and_of_no_name_are_not_read():
    table = pa.table({"q": ["a"], "d": ["b"], "hard_1": ["x"], "hard_2": ["y"], "negative_1": ["z"]})
    rows = rows_from_table(table, {"anchor": "q", "positive": "d", "negative": "hard"}, "no", where="file")
    assert texts_of(rows) == [("a", "b", "x", "y")]
    assert next(rows.reading.lines()) == "not read: columns negative_1"
    rows = rows_from_table(table, {"anchor": "q", "positive": "d"}, "no", where="file")
    assert texts_of(rows) == [("a", "b")]
    assert list(rows.reading.lines()) == ["not read: columns hard_1, hard_2, negative_1"]


# ---------------------------------------------------------------------------------- scores in the data
def labels_of(rows):
    return rows.table["label"].to_pylist()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_scores_follow_the_passages_that_are_read(tmp_path, suffix):
    columns = FLAG_COLUMNS | {"positive_scores": "pos_scores", "negative_scores": "neg_scores"}
    rows = read_files(str(written(tmp_path, FLAG_EMBEDDING, suffix)), columns, "no", "key")
    assert labels_of(rows) == [[9, 3, 2], [8, 3, 2], None]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_column_holds_all_scores_or_the_margin(tmp_path, suffix):
    lists = [row | {"scores": [5, 1, 2]} for row in NTUPLES[:1]] + [row | {"scores": None} for row in NTUPLES[4:]]
    columns = DEFAULT_COLUMNS | {"scores": "scores"}
    assert labels_of(read_files(str(written(tmp_path, lists, suffix)), columns, "no", "key")) == [[5, 1, 2], None]
    unnamed = read_files(str(written(tmp_path, lists, suffix)), None, "no", "key")
    assert "label" not in unnamed.table.column_names
    assert list(unnamed.reading.lines()) == ["not read: columns score, scores"]
    margins = [{"q": "a", "p": "b", "n": "c", "margin": 1.5}, {"q": "d", "p": "e", "n": "f", "margin": None}]
    columns = {"anchor": "q", "positive": "p", "negative": "n", "scores": "margin"}
    assert labels_of(read_files(str(written(tmp_path, margins, suffix)), columns, "no", "key")) == [[1.5, 0], None]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([1, 2], "column 'scores' holds another number of scores than passages"),
        (1.0, "column 'scores' holds one number, so it needs one positive and one negative"),
        ("high", "column 'scores' holds \"high\", not a teacher's score"),
        ([1, 2, float("nan")], "column 'scores' holds NaN, not a teacher's score"),
        (True, "column 'scores' holds true, not a teacher's score"),
        ([1, 2, 10**400], "column 'scores' holds 1000000000"),
    ],
)
def test_scores_that_cannot_be_used_are_one_line(tmp_path, scores, says):
    file = written(tmp_path, [NTUPLES[0] | {"scores": scores}], "jsonl")
    with pytest.raises(ConfigError, match=says):
        read_files(str(file), DEFAULT_COLUMNS | {"scores": "scores"}, "no", "key")


# ---------------------------------------------------------------------------------- how many a row has
def test_a_row_with_more_negatives_than_asked_for_becomes_several_and_loses_none():
    table = in_columns(("a", "p", "1", "2", "3", "4", "5"), ("b", "q"), ("c", "r", "6"))
    table = table.append_column("label", pa.array([[9.0, 1, 2, 3, 4, 5], None, [7.0, 6]], pa.list_(pa.float32())))
    cut = with_at_most(table, 2)
    rows = [tuple(row[role] for role in roles_of(cut.column_names)) for row in cut.to_pylist()]
    assert rows == [
        ("a", "p", "1", "2"), ("a", "p", "3", "4"), ("a", "p", "5", None), ("b", "q", None, None), ("c", "r", "6", None)
    ]  # fmt: skip
    assert cut["label"].to_pylist() == [[9, 1, 2], [9, 3, 4], [9, 5], None, [7, 6]]
    assert with_at_most(table, 5) is table


def test_rows_are_parted_by_their_negatives_and_a_rare_number_is_shared_among_rows_of_frequent_ones():
    many = [(f"a{i}", f"p{i}", f"x{i}", f"y{i}") for i in range(FEW)]
    few = [("b", "q", "1", "2", "3"), ("c", "r", "4", "5", "6")]
    sets = by_count("mine", in_columns(*many, *few, ("d", "s"), ("e", "t", "7")))
    assert {name: table.num_rows for name, table in sets.items()} == {
        "mine-2-negatives": FEW + 2, "mine-triplets": 3, "mine-pairs": 1
    }  # fmt: skip
    last = [(row["anchor"], row["negative"], row["negative2"]) for row in sets["mine-2-negatives"].to_pylist()[FEW:]]
    assert last == [("b", "1", "2"), ("c", "4", "5")]
    assert {(row["anchor"], row["negative"]) for row in sets["mine-triplets"].to_pylist()} == {
        ("b", "3"), ("c", "6"), ("e", "7")
    }  # fmt: skip
    # what is left of a row may be rare too: 5 of 3 + 2
    threes = [(f"a{i}", f"p{i}", f"x{i}", f"y{i}", f"z{i}") for i in range(FEW)]
    sets = by_count("mine", in_columns(*threes, ("b", "q", "1", "2", "3", "4", "5")))
    assert {name: table.num_rows for name, table in sets.items()} == {"mine-3-negatives": FEW + 1, "mine-triplets": 2}
    # where all rows are of one kind, they stay as they are, however few
    assert [*by_count("mine", in_columns(*few))] == ["mine"]


def test_held_out_rows_have_as_many_negatives_as_some_row_that_is_trained_on():
    table = in_columns(("a", "p", "1", "2", "3"), ("b", "q", "4", "5"), ("c", "r", "6"), ("d", "s"))
    sets, left_out = parted_like("mine", table, {2, 0})
    assert {name: table.num_rows for name, table in sets.items()} == {"mine-2-negatives": 2, "mine-pairs": 2}
    assert left_out == 2
    assert sets["mine-2-negatives"].to_pylist()[0]["negative2"] == "2"


def test_the_plan_counts_rows_by_their_negatives(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"d{i}"} | {f"negative_{n}": f"n{i} {n}" for n in range(1, 4)}
            for i in range(70)]  # fmt: skip
    rows += [{"anchor": f"r{i}", "positive": f"e{i}"} for i in range(20)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    data = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 0}}")
    assert data.subsets == {"mine": ["mine-3-negatives", "mine-pairs"]}
    found = data.summaries["mine"]
    assert (found.several, found.triplets, found.pairs, found.rows) == ({"3": 70}, 0, 20, 90)
    assert data.columns == 5
    data = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 0}}\n  negatives_per_row: 2")
    found = data.summaries["mine"]
    assert (found.several, found.triplets, found.pairs, found.rows) == ({"2": 70}, 70, 20, 160)
    assert found.notes == ["70 rows more, since datasets.negatives_per_row is 2"]
    negatives = [
        text for rows in data.train.values() for name in negatives_of(rows.column_names) for text in rows[name]
    ]
    assert len(set(negatives)) == len(negatives) == 210


def test_columns_of_scores_that_exclude_each_other_are_one_line(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"anchor": "q", "positive": "d"}])
    columns = "{anchor: q, positive: p, negative: n, positive_scores: s}"
    assert "negative_scores' is missing" in error_of(tmp_path, f"  mine: {{source: {source}, columns: {columns}}}")


def test_ids_of_texts_are_the_same_for_equal_texts_of_any_column(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [
        {"anchor": "q", "positive": "p", "negative_1": "x", "negative_2": "y"},
        {"anchor": "r", "positive": "y", "negative_1": "p", "negative_2": "x"},
    ])  # fmt: skip
    ids = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 0}}").text_ids("mine")
    assert ids.shape == (2, 4)
    assert (ids[0, 1], ids[0, 2], ids[0, 3]) == (ids[1, 2], ids[1, 3], ids[1, 1])
    assert len(np.unique(ids)) == 5


def test_token_ids_that_are_kept_are_of_the_rows_as_they_are_parted(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("trainer.data.tokens.MIN_TEXTS_ON_DISK", 1)
    base = write_bert(tmp_path / "bert")
    model = build(tmp_path, base, "splade")
    rows = [
        {"anchor": f"q{i}", "positive": f"p{i}"} | {f"negative_{n}": f"n{i} {n}" for n in range(4)} for i in range(9)
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    for most in (4, 2, 4, 1):
        data = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 0}}\n  negatives_per_row: {most}")
        data.tokenise(Tokeniser(model, {}, print))
        tokens, table = data.tokens["mine"], data.train["mine"]
        assert [column.name for column in tokens.columns] == roles_of(table.column_names)
        for column in tokens.columns:
            expected = [model.tokenizer(text)["input_ids"] for text in table[column.name]]
            assert [ids.tolist() for ids in column.texts(range(len(table)))] == expected
