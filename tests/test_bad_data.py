import json
import math
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import TINY
from trainer.config import ConfigError, load_config
from trainer.data.loading import load_data
from trainer.data.rows import MOST_LANGUAGES
from trainer.models.scratch import train_vocabulary, without_long_words
from trainer.runs.run import Run
from trainer.training.train import train

GOOD = [{"anchor": f"hva er {n}", "positive": f"svaret er {n}"} for n in range(30)]
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e"
# Anything that can stand in a text: each is trained on as it is.
STRANGE = [
    {"anchor": "מה זה \u202e", "positive": "هذا هو الجواب"},
    {"anchor": "🦄", "positive": "🧌 👩‍👩‍👧"},
    {"anchor": "a\x00b", "positive": "tabs\tand\x1b[2J codes"},
    {"anchor": "x" * 1_000_000, "positive": "uten mellomrom"},
    {"anchor": "lang", "positive": "et ord til " * 90_000},
    {"anchor": "likt", "positive": "likt"},
    {"anchor": f"{INVISIBLE}synlig{INVISIBLE}", "positive": "e" + "\u0301" * 5000},
]
TEXTLESS = ["", " \t\n", INVISIBLE, "\u2028\u00a0", "\x00\x01", None]


def config_with(folder, lines, extra="", suffix="jsonl"):
    if suffix == "jsonl":
        (folder / "rows.jsonl").write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        )
    else:
        pq.write_table(lines, folder / "rows.parquet")
    file = folder / "tiny.yaml"
    source = f"  mine: {{source: rows.{suffix}, eval_rows: 2{extra}}}"
    file.write_text(TINY.replace("  quickstart: {}", source).replace("max_steps: 6", "max_steps: 4"))
    return file


def load(folder, *args, **kwargs):
    return load_data(load_config(config_with(folder, *args, **kwargs)).config)


def refusal(folder, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        load(folder, *args, **kwargs)
    return caught.value.format_message()


def trained(file):
    """What a training says."""
    loaded, lines = load_config(file), []
    train(loaded, Run.create(loaded), echo=lines.append)
    return "\n".join(lines)


@pytest.mark.slow
def test_strange_texts_are_trained_on_and_empty_ones_left_out_with_their_number(tiny):
    folder = tiny.parent
    textless = [{"anchor": "hva", "positive": text} for text in TEXTLESS] + [
        {"anchor": t, "positive": "p"} for t in TEXTLESS
    ]
    config_with(folder, GOOD + STRANGE + textless)
    said = trained(tiny)
    assert f"{len(textless)} rows not trained on: without text" in said
    found = json.loads((folder / "models/tiny/run.json").read_text())["datasets"]["mine"]
    assert found["rows"] + found["eval_rows"] == len(GOOD) + len(STRANGE)
    state = json.loads((folder / "models/tiny/checkpoints/checkpoint-4/trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


@pytest.mark.slow
def test_ten_thousand_identical_rows_among_others_are_trained_on_and_counted(tiny):
    folder = tiny.parent
    config_with(folder, [{"anchor": "hva er det", "positive": "det er dette"}] * 10_000 + GOOD)
    said = trained(tiny)
    # 10,028 rows in 1,254 batches: one of each stays
    assert "8,746 rows sit out each pass: too many share a text" in said
    assert re.search(r"Warning: mine: a pair that is alone .* as in 1,2\d\d of 1,254 batches \(9\d\.\d%\)", said)
    assert "nan" not in said


@pytest.mark.parametrize("text", TEXTLESS)
def test_a_negative_without_text_makes_its_row_a_pair(tiny, text):
    data = load(tiny.parent, [row | {"negative": text if n % 2 else f"ikke {n}"} for n, row in enumerate(GOOD)])
    summary = data.summaries["mine"]
    assert summary.rows == summary.triplets + summary.pairs == 28
    assert summary.pairs in (13, 14, 15)
    assert "without text" not in summary.left_out


def test_a_set_without_any_text_is_refused_with_its_counts(tiny):
    rows = [{"anchor": INVISIBLE, "positive": f"svaret er {n}"} for n in range(30)]
    assert refusal(tiny.parent, rows) == "datasets.mine: no rows to train on (30 without text)"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"anchor": 3, "positive": "x"}, "rows.jsonl:31: column 'anchor' holds 3, not text"),
        ({"anchor": True, "positive": "x"}, "holds true, not text"),
        ({"anchor": ["x"], "positive": "x"}, "not text"),
        ('{"anchor": NaN, "positive": "x"}', "holds NaN, not text"),
        ('{"anchor": "\\ud800", "positive": "x"}', "rows.jsonl:31: column 'anchor' holds half a character"),
        (
            '{"anchor": ' + "9" * 5000 + ', "positive": "x"}',
            "rows.jsonl:31: JSON that cannot be read: Exceeds the limit",
        ),
        ("[" * 100_000, "rows.jsonl:31: JSON that cannot be read: maximum recursion depth"),
        ('{"anchor": "x", "positi', "rows.jsonl:31: not JSON"),
        ("[1]", "rows.jsonl:31: a line must be an object"),
    ],
)
def test_a_row_that_is_no_text_is_refused_by_name(tiny, line, says):
    message = refusal(tiny.parent, [*GOOD, line])
    assert says in message
    assert message.isprintable()


def test_bytes_in_a_parquet_file_that_are_no_text_are_refused(tiny):
    wrong = pa.array([b"caf\xe9", b"\xed\xa0\x80", *[b"svar"] * 28], pa.binary()).view(pa.string())
    table = pa.table({"anchor": [row["anchor"] for row in GOOD], "positive": wrong})
    message = refusal(tiny.parent, table, suffix="parquet")
    assert message.startswith("rows.parquet: column 'positive' holds bytes that are no text in UTF-8: ")


def test_a_language_column_that_lies_changes_nothing_but_the_counts(tiny):
    plain = load(tiny.parent, GOOD)
    lies = ["no", 3, None, "xx\n" * 5, ["a"], "", "\u202e", "q" * 1000]
    tags = [row | {"language": lies[n % len(lies)]} for n, row in enumerate(GOOD)]
    data = load(tiny.parent, tags, ", language: language")
    assert data.summaries["mine"].fingerprint == plain.summaries["mine"].fingerprint
    languages = data.summaries["mine"].languages
    assert sum(languages.values()) == 28
    assert {"no", "?", "3"} <= languages.keys()
    assert all(name.isprintable() and len(name) <= 20 for name in languages)


def test_a_language_column_with_a_value_per_row_fills_no_page(tiny):
    rows = [row | {"language": row["anchor"]} for row in GOOD]
    languages = load(tiny.parent, rows, ", language: language").summaries["mine"].languages
    assert len(languages) == MOST_LANGUAGES + 1
    assert languages["16 others"] == 16
    assert sum(languages.values()) == 28


def test_a_language_column_of_lists_is_refused(tiny):
    table = pa.table({name: [row[name] for row in GOOD] for name in GOOD[0]} | {"language": [{"a": 1}] * 30})
    message = refusal(tiny.parent, table, ", language: language", suffix="parquet")
    assert "column 'language' holds struct<a: int64>, not the names of languages" in message


@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_source_that_stops_half_way_is_refused_by_name(tiny, suffix, part):
    table = pa.table({name: [row[name] for row in GOOD] for name in GOOD[0]})
    file = tiny.parent / f"rows.{suffix}"
    config = config_with(tiny.parent, GOOD if suffix == "jsonl" else table, suffix=suffix)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ConfigError, match=rf"rows.{suffix}"):
        load_data(load_config(config).config)


def test_a_word_of_a_megabyte_does_not_hold_up_the_tokenizer():
    texts = [f"hva er {n} egentlig" for n in range(50)]
    start = time.process_time()
    found = train_vocabulary(300, [*texts, "a" * 1_000_000 + " hva"])
    assert time.process_time() - start < 5
    assert "hva" in found
    assert not [piece for piece in found if "aaaa" in piece]


def test_only_words_that_the_tokenizer_does_not_take_apart_are_left_out():
    assert without_long_words("kort tekst " * 50) == "kort tekst " * 50
    kept, gone = "a" * 100, "b" * 101
    assert without_long_words(f"før {kept} {gone} etter") == f"før {kept} etter"
