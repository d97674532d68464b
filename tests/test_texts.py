"""What comes in as text, in which form, and what is said of the rest."""

import json
import sys
import unicodedata

import pyarrow as pa
import pytest

from trainer.config import ConfigError
from trainer.data.rows import fingerprint, read_files, rows_from_table
from trainer.data.texts import COMPOSED, MOST_NAMES, Reading, listed

ROLES = {role: role for role in ("anchor", "positive", "negative")}


def read(table, columns=ROLES):
    return rows_from_table(pa.table(table), columns, "no", where="file")


# ---------------------------------------------------------------------------------- kinds of columns
@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
)
def test_a_column_of_any_type_that_holds_text_is_read(kind):
    plain = pa.array(["hva", "hva", None, "hvem"])
    rows = read({"anchor": plain.cast(kind), "positive": ["a", "b", "c", "d"]}).table
    assert rows["anchor"].to_pylist() == ["hva", "hva", "hvem"]
    assert rows["positive"].to_pylist() == ["a", "b", "d"]


def test_a_column_that_holds_no_text_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"column 'negative' holds list<item: string>, not text. Several negatives of a "
                                          r"row go into columns negative_1, negative_2"):  # fmt: skip
        read({"anchor": ["a"], "positive": ["b"], "negative": [["c", "d"]]})


def test_a_negative_that_is_its_rows_own_positive_is_left_out_and_counted():
    rows = read({"anchor": ["a", "b", "c"], "positive": ["p", "q", "r"], "negative": ["x", " q ", None]})
    assert rows.table["negative"].to_pylist() == ["x", None, None]
    assert list(rows.reading.lines()) == ["not read: 1 negatives that are their row's own positive"]
    assert "negative" not in read({"anchor": ["a"], "positive": ["p"], "negative": ["p"]}).table.column_names


# ---------------------------------------------------------------------------------- several negatives
NTUPLES = [
    {"anchor": "a", "positive": "p", "negative_1": "x", "negative_2": "y", "score": 0.1},
    {"anchor": "b", "positive": "q"},
    {"anchor": "c", "positive": None, "negative_1": "x"},
    {"anchor": "d", "positive": "r", "negative_1": " ", "negative_10": "z", "negative_2": "w", "label": 1},
    {"anchor": "e", "positive": "s", "negative_2": "v"},
]
TRIPLETS = [
    ("a", "p", "x"),
    ("a", "p", "y"),
    ("b", "q", None),
    ("d", "r", "w"),
    ("d", "r", "z"),
    ("e", "s", "v"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_negative_of_a_row_becomes_a_triplet_and_other_columns_are_named(tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in NTUPLES))
    else:
        columns = dict.fromkeys(name for row in NTUPLES for name in row)
        pa.parquet.write_table(pa.table({name: [row.get(name) for row in NTUPLES] for name in columns}), file)
    rows = read_files(str(file), None, "no", "key")
    found = [tuple(row[role] for role in ROLES) for row in rows.table.to_pylist()]
    assert found == TRIPLETS
    assert rows.left_out == {"without text": 1}
    assert list(rows.reading.lines()) == [
        "not read: columns score, label",
        "4 triplets are of rows with several negatives, one for each",
    ]


def test_numbered_columns_of_the_users_own_name_are_negatives_and_of_no_name_are_not_read():
    table = {"q": ["a"], "d": ["b"], "hard_1": ["x"], "hard_2": ["y"], "negative_1": ["z"]}
    rows = read(table, {"anchor": "q", "positive": "d", "negative": "hard"})
    assert rows.table["negative"].to_pylist() == ["x", "y"]
    assert next(rows.reading.lines()) == "not read: columns negative_1"
    rows = read(table, {"anchor": "q", "positive": "d"})
    assert "negative" not in rows.table.column_names
    assert list(rows.reading.lines()) == ["not read: columns hard_1, hard_2, negative_1"]


def test_many_names_are_cut_short():
    assert listed(f"c{n}" for n in range(MOST_NAMES + 1_200)) == "c0, c1, c2, c3, c4, c5 and 1,200 more"
    assert listed(["a\nb", "x" * 100]) == f"a b, {'x' * 40}"


# ---------------------------------------------------------------------------------- one form of Unicode
def test_every_character_has_the_form_that_python_gives_it():
    """Also what the search for texts that are perhaps not in NFC passes over."""
    known = (chr(number) for number in range(sys.maxunicode + 1))
    known = [c for c in known if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    texts = [text for c in known for text in (f"x{c}", f"a{c}\u0301", f"{c}\u0323")]
    expected = [unicodedata.normalize("NFC", text) for text in texts]
    reading = Reading()
    assert reading.compose_column(pa.chunked_array([texts[:100], texts[100:]])).to_pylist() == expected
    assert reading.notes[COMPOSED] == sum(map(str.__ne__, texts, expected)) > 4_000


def test_rows_are_trained_on_in_nfc_and_counted_and_text_in_nfc_keeps_its_fingerprint():
    composed = {"anchor": ["på gården", "ja"], "positive": ["Mjøsa", "Ωmega"]}
    apart = {role: [unicodedata.normalize("NFD", text) for text in texts] for role, texts in composed.items()}
    assert apart != composed
    rows, same = read(apart), read(composed)
    assert rows.table.select(list(composed)).to_pydict() == composed
    assert list(rows.reading.lines()) == ["1 texts were not in Unicode's form NFC, and are now"]
    assert not list(same.reading.lines())
    assert fingerprint(rows.table) == fingerprint(same.table) == fingerprint(pa.table(composed))
