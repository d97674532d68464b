import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.checkpoints import write_dense
from tests.conftest import TINY
from tests.test_plan import lines_about
from trainer.config import ConfigError, load_config
from trainer.config.schema import MiningConfig
from trainer.data import roles
from trainer.data.loading import load_data
from trainer.data.mining import fill_negatives, is_near_duplicate
from trainer.data.rows import Rows
from trainer.hub.cache import cached_table, cached_tables
from trainer.hub.download import HubUnreachable
from trainer.system.progress_bar import ProgressReport

# The query's words are in all passages but the last; the second and third positives are near copies of the first.
PASSAGES = [
    "mjøsa er norges største innsjø og ligger på østlandet",
    "Mjøsa er Norges største innsjø, og ligger på Østlandet.",
    "mjøsa har hatt dampskipet skibladner siden 1856",
    "mjøsa og randsfjorden er innsjøer i innlandet",
    "en innsjø er vann som er omgitt av land",
    "lofoten er en øygruppe",
]
QUESTIONS = ["hvor ligger mjøsa", "hva heter dampskipet på mjøsa", "hvilke innsjøer er i innlandet", "hva er en innsjø",
             "hva er lofoten"]  # fmt: skip
ANSWERS = [0, 2, 3, 4, 5]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "nordsparse"


def table(anchors, positives, negatives=None, language="no"):
    columns = {"anchor": pa.array(anchors, pa.string()), "positive": pa.array(positives, pa.string())}
    if negatives is not None:
        columns["negative"] = pa.array(negatives, pa.string())
    return pa.table(columns | {"language": pa.array([language] * len(anchors))})


def pairs():
    return table(QUESTIONS, [PASSAGES[number] for number in ANSWERS])


def mined(rows, *, everything=None, **settings):
    settings = {"range": [0, 100]} | settings
    return fill_negatives("mine", Rows(rows), everything or [rows], MiningConfig(**settings))


def negatives_of(rows, anchor):
    names = roles.negatives_of(rows.table.column_names)
    return [row[name] for row in rows.table.to_pylist() if row["anchor"] == anchor for name in names]


def test_every_pair_gets_the_passage_bm25_ranks_highest_after_its_own():
    filled, counts = mined(pairs())
    # "ligger" is in no other passage and "mjøsa" in two: the one with fewer words (letters alone are none) ranks higher
    assert negatives_of(filled, "hvor ligger mjøsa") == [PASSAGES[3]]
    assert (counts["queries"], counts["negatives"]) == (5, len(filled) - filled.table["negative"].null_count)
    assert filled.table.column_names == ["anchor", "positive", "negative", "language"]


def test_a_query_of_which_no_word_is_found_elsewhere_stays_a_pair():
    rows = table(["lofoten", *QUESTIONS[:2]], [PASSAGES[5], PASSAGES[0], PASSAGES[2]])
    filled, counts = mined(rows)
    assert negatives_of(filled, "lofoten") == [None]
    assert counts["queries_filled"] == 2


def test_no_positive_of_the_query_becomes_its_negative_not_even_a_held_out_one():
    held_out = table(QUESTIONS[:1], [PASSAGES[3]])
    filled, _ = mined(pairs(), everything=[pairs(), held_out])
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[2]]
    # the opposite: without the held-out row it is the first choice
    filled, _ = mined(pairs())
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[3]]


def test_a_passage_of_held_out_rows_only_is_never_trained_on():
    rows = pairs().slice(0, 2)
    filled, _ = mined(rows, everything=[pairs()])
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[2]]
    assert set(filled.table["negative"].to_pylist()) <= set(rows["positive"].to_pylist()) | {None}


def test_near_duplicates_of_a_positive_are_passed_over_and_counted():
    rows = table([*QUESTIONS, "annet"], [*(PASSAGES[number] for number in ANSWERS), PASSAGES[1]])
    filled, counts = mined(rows)
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[3]]
    assert counts["near_duplicates_passed_over"] > 0
    assert is_near_duplicate(PASSAGES[0], PASSAGES[1])
    assert not is_near_duplicate(PASSAGES[2], PASSAGES[3])


def test_several_negatives_stand_in_the_row_of_their_query_and_given_ones_stay():
    rows = table(QUESTIONS, [PASSAGES[number] for number in ANSWERS], [None, "gitt", None, None, None])
    filled, _ = mined(rows, per_query=2)
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[3], PASSAGES[2]]
    assert negatives_of(filled, QUESTIONS[1]) == ["gitt", None]
    assert len(filled) == len(rows)


def test_ranks_before_the_range_are_skipped():
    filled, _ = mined(pairs(), range=[1, 100])
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[2]]


def test_a_margin_leaves_out_passages_that_score_like_the_answer():
    # both passages hold the whole query once and are equally long
    rows = table(["rød bil", "annet"], ["rød bil her", "rød bil der"])
    assert negatives_of(mined(rows)[0], "rød bil") == ["rød bil der"]
    assert negatives_of(mined(rows, margin=0.05)[0], "rød bil") == []


def test_negatives_are_in_the_language_of_their_query():
    rows = pa.concat_tables([pairs(), table(["hvor är mjøsa"], ["sverige"], language="sv"),
                             table(["annat"], ["mjøsa är i norge"], language="sv")])  # fmt: skip
    filled, _ = mined(rows)
    assert negatives_of(filled, "hvor är mjøsa") == ["mjøsa är i norge"]
    assert negatives_of(filled, QUESTIONS[0]) == [PASSAGES[3]]


def test_mining_twice_reads_what_was_kept_and_changed_rows_are_mined_anew(own_cache, monkeypatch):
    first, _ = mined(pairs())
    monkeypatch.setattr("trainer.data.mining._BM25Miner.mine", lambda *_: pytest.fail("mined again"))
    assert mined(pairs())[0].table.equals(first.table)
    with pytest.raises(BaseException, match="mined again"):
        mined(pairs().slice(1))


def test_what_a_killed_run_half_wrote_is_never_taken_for_whole(tmp_path):
    made = []

    def make(part):
        if made == [[0, 1], [2, 3]]:
            raise KeyboardInterrupt
        made.append(part)
        return pa.table({"square": [number**2 for number in part]})

    (tmp_path / f".part-00002.parquet.{os.getpid() + 1}").write_bytes(b"PAR1 half")
    with pytest.raises(KeyboardInterrupt):
        cached_tables(tmp_path, [0, 1, 2, 3, 4], 2, make, ProgressReport())
    assert sorted(file.name for file in tmp_path.glob("part*")) == ["part-00000.parquet", "part-00001.parquet"]
    made.append("resumed")
    parts = cached_tables(tmp_path, [0, 1, 2, 3, 4], 2, make, progress := ProgressReport())
    assert progress.n == 5
    assert made == [[0, 1], [2, 3], "resumed", [4]]
    assert pa.concat_tables(parts)["square"].to_pylist() == [0, 1, 4, 9, 16]


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(table, file, **_):
        file.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        cached_table(tmp_path / "a.parquet", lambda: pa.table({"a": [1]}))
    assert list(tmp_path.glob("*a.parquet*")) == []


def test_a_dense_model_finds_what_it_holds_similar(tmp_path, own_cache):
    import numpy as np
    from sentence_transformers import SentenceTransformer

    folder = write_dense(tmp_path)
    settings = {"method": "model", "model": str(folder)}
    filled, counts = mined(pairs(), **settings)
    model = SentenceTransformer(str(folder))
    passages = [PASSAGES[number] for number in ANSWERS]
    scores = model.encode(QUESTIONS, normalize_embeddings=True) @ model.encode(passages, normalize_embeddings=True).T
    np.fill_diagonal(scores, -1)
    expected = [passages[place] for place in scores.argmax(1)]
    assert [negatives_of(filled, question)[0] for question in QUESTIONS] == expected
    assert counts["method"] == str(folder)
    assert len(list((own_cache / "vectors").rglob("part-00000.parquet"))) == 2


def test_a_model_that_cannot_be_downloaded_is_one_line():
    with pytest.raises(
        HubUnreachable, match=r"cannot download org/model \(negatives of 'mine'\).*datasets.mine.mine.model"
    ):
        mined(pairs(), method="model", model="org/model", revision="main")


def test_the_plan_and_the_manifest_say_what_was_mined(tiny):
    config = load_config(tiny, ["datasets.quickstart.mine.range=[0, 50]"]).config
    data = load_data(config)
    qa = data.summaries["quickstart_scandi_qa"]
    assert qa.mined["queries"] == 162 == qa.triplets + qa.pairs
    assert qa.triplets == qa.mined["negatives"] > 100
    lines = lines_about(config, data)
    assert any(
        f"{qa.triplets} negatives mined by bm25 for {qa.mined['queries_filled']} of 162 queries" in line
        for line in lines
    )
    assert json.loads(json.dumps(data.manifest()))["quickstart_scandi_qa"]["mined"] == qa.mined
    # the given negatives of the others stay, and no row is its own negative
    for rows in data.train.values():
        if "negative" in rows.column_names:
            assert not any(row["negative"] == row["positive"] for row in rows)


@pytest.mark.parametrize(
    ("mine", "says"),
    [
        ("{method: model}", "'datasets.mine.mine.method' model needs 'datasets.mine.mine.model'"),
        ("{method: model, model: org/model}", "needs 'datasets.mine.mine.revision'"),
        ("{model: org/model}", "has no effect with method bm25"),
        ("{range: [10, 11], per_query: 2}", "has fewer ranks than per_query (2) asks for"),
        ("{range: [10]}", "'datasets.mine.mine.range'"),
    ],
)
def test_settings_that_cannot_work_are_one_line(tmp_path, mine, says):
    file = tmp_path / "my.yaml"
    file.write_text(TINY.replace("quickstart: {}", f"mine: {{source: rows.jsonl, mine: {mine}}}"))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert says in caught.value.format_message()
