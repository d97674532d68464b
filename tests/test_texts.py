"""What comes in as text, in which form, and what is said of the rest."""

import sys
import unicodedata

import pyarrow as pa
import pytest

from trainer.config import ConfigError
from trainer.data.rows import fingerprint, rows_from_table
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


def test_a_column_that_holds_no_text_is_refused():
    with pytest.raises(ConfigError, match="file: column 'negative' holds int64, not text"):
        read({"anchor": ["a"], "positive": ["b"], "negative": [1]})
    with pytest.raises(ConfigError, match="file: column 'anchor' holds list<item: string>, not text"):
        read({"anchor": [["a"]], "positive": ["b"]})


def test_a_negative_that_is_its_rows_own_positive_is_left_out_and_counted():
    rows = read({"anchor": ["a", "b", "c"], "positive": ["p", "q", "r"], "negative": ["x", " q ", None]})
    assert rows.table["negative"].to_pylist() == ["x", None, None]
    assert list(rows.reading.lines()) == ["not read: 1 negatives that are their row's own positive"]
    assert "negative" not in read({"anchor": ["a"], "positive": ["p"], "negative": ["p"]}).table.column_names


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
