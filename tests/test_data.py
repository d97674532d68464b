import json
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, TINY
from tests.test_shipped_configs import NAMES
from trainer.config import ConfigError, load_config
from trainer.data.beir import read_search_set
from trainer.data.loading import load_data
from trainer.data.rows import fingerprint
from trainer.data.sources import QUICKSTART, QUICKSTART_SETS
from trainer.hub.download import HubUnreachable
from trainer.models.build import fetch_base_model


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def write_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def load(tmp_path, datasets, *overrides):
    file = tmp_path / "data.yaml"
    file.write_text(TINY.replace("  quickstart: {}", datasets))
    return load_data(load_config(file, overrides).config)


def error_of(tmp_path, datasets, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, datasets, *overrides)
    message = caught.value.format_message()
    assert "\n" not in message
    return message


def rows_of(dataset):
    return [tuple(row.values()) for row in dataset]


# ---------------------------------------------------------------------------------- the user's own files
def test_json_lines_become_anchor_and_positive_and_every_other_column_goes(tmp_path):
    write_lines(
        tmp_path / "a.jsonl", [{"q": f"q{i}", "doc": f"d{i}", "instruction": "x", "score": i} for i in range(5)]
    )
    data = load(tmp_path, f"  mine: {{source: {tmp_path}/*.jsonl, columns: {{anchor: q, positive: doc}}}}")
    assert data.train["mine"].column_names == ["anchor", "positive"]
    assert rows_of(data.train["mine"]) == [(f"q{i}", f"d{i}") for i in range(5)]


def test_a_glob_reads_every_file_and_parquet_and_json_lines_give_the_same_rows(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"d{i}", "negative": f"n{i}"} for i in range(6)]
    write_parquet(tmp_path / "p/a.parquet", rows[:3])
    write_parquet(tmp_path / "p/b.parquet", rows[3:])
    write_lines(tmp_path / "j/a.jsonl", rows)
    one = load(tmp_path, f"  mine: {{source: {tmp_path}/p/*.parquet, eval_rows: 0}}")
    two = load(tmp_path, f"  mine: {{source: {tmp_path}/j/a.jsonl, eval_rows: 0}}")
    assert rows_of(one.train["mine"]) == rows_of(two.train["mine"]) == [tuple(row.values()) for row in rows]
    assert one.summaries["mine"].fingerprint == two.summaries["mine"].fingerprint


def test_rows_without_a_negative_are_kept_as_pairs_beside_the_triplets(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"d{i}", "negative": f"n{i}" if i % 5 < 2 else None} for i in range(20)]
    rows[7]["negative"] = "  "
    data = load(tmp_path, f"  mine: {{source: {write_lines(tmp_path / 'a.jsonl', rows)}, eval_rows: 0}}")
    assert data.subsets == {"mine": ["mine-triplets", "mine-pairs"]}
    assert data.train["mine-triplets"].column_names == ["anchor", "positive", "negative"]
    assert data.train["mine-pairs"].column_names == ["anchor", "positive"]
    assert (len(data.train["mine-triplets"]), len(data.train["mine-pairs"])) == (8, 12)
    assert None not in data.train["mine-triplets"]["negative"]


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    rows = [{"anchor": "q", "positive": "d"}, {"anchor": "", "positive": "d2"}, {"anchor": "q3", "positive": None}]
    data = load(tmp_path, f"  mine: {{source: {write_lines(tmp_path / 'a.jsonl', rows)}}}")
    assert rows_of(data.train["mine"]) == [("q", "d")]
    assert data.summaries["mine"].left_out == {"without text": 2}


def test_the_same_rows_are_held_out_every_time_and_never_trained_on(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"anchor": f"q{i}", "positive": f"d{i}"} for i in range(50)])
    data = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 10}}")
    again = load(tmp_path, f"  mine: {{source: {source}, eval_rows: 10}}")
    held_out = set(data.eval["mine"]["anchor"])
    assert len(held_out) == 5  # a tenth, since 10 would be more
    assert held_out.isdisjoint(data.train["mine"]["anchor"])
    assert held_out == set(again.eval["mine"]["anchor"])
    assert len(data.train["mine"]) == 45


def test_max_samples_takes_a_random_sample_and_the_plan_says_so(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"anchor": f"q{i}", "positive": f"d{i}"} for i in range(100)])
    data = load(tmp_path, f"  mine: {{source: {source}, max_samples: 30, eval_rows: 0}}")
    assert len(data.train["mine"]) == 30
    assert data.train["mine"]["anchor"] != [f"q{i}" for i in range(30)]
    assert data.summaries["mine"].left_out == {"over max_samples": 70}


def test_rows_are_counted_per_language(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"d{i}", "lang": "da" if i < 3 else "sv"} for i in range(5)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    assert load(tmp_path, f"  mine: {{source: {source}, language: lang}}").summaries["mine"].languages == {
        "da": 3,
        "sv": 2,
    }
    assert load(tmp_path, f"  mine: {{source: {source}, language: 'no'}}").summaries["mine"].languages == {"no": 5}


def test_languages_are_counted_after_sampling_and_holding_out(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"d{i}", "lang": i % 3} for i in range(100)]  # numbers are languages too
    source = write_lines(tmp_path / "a.jsonl", rows)
    summary = load(tmp_path, f"  mine: {{source: {source}, language: lang, max_samples: 50, eval_rows: 4}}").summaries[
        "mine"
    ]
    assert set(summary.languages) == {"0", "1", "2"}
    assert sum(summary.languages.values()) == summary.rows == 46


def test_a_fingerprint_changes_with_any_text_and_does_not_depend_on_chunks():
    table = pa.table({"anchor": ["a", "b"], "positive": ["c", None]})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert fingerprint(table) == fingerprint(chunked)
    assert fingerprint(table) != fingerprint(pa.table({"anchor": ["a", "b"], "positive": ["c", ""]}))
    assert fingerprint(table) != fingerprint(pa.table({"anchor": ["ab", ""], "positive": ["c", None]}))


# ---------------------------------------------------------------------------------- BEIR layout
def beir(folder, corpus, queries, qrels, split="train"):
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / f"queries.{split}.jsonl", queries)
    (folder / f"qrels.{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{line}\n" for line in qrels))
    return folder


CORPUS = [{"_id": "d1", "title": "Mjøsa", "text": "En innsjø."}, {"_id": "d2", "text": "En elv."}]
QUERIES = [{"_id": "q1", "text": "hvilken innsjø"}, {"_id": "q2", "text": "hvilken elv"}]


def test_a_beir_folder_trains_on_its_train_split_and_is_searched_on_its_dev_split(tmp_path):
    folder = beir(tmp_path / "set", CORPUS, QUERIES, ["q1\td1\t1", "q2\td2\t0", "q2\td1\t2"])
    beir(folder, CORPUS, [{"_id": "q3", "text": "hvilken bekk"}], ["q3\td2\t1"], split="dev")
    data = load(tmp_path, f"  mine: {{source: {folder}}}")
    assert rows_of(data.train["mine"]) == [("hvilken innsjø", "Mjøsa En innsjø."), ("hvilken elv", "Mjøsa En innsjø.")]
    assert rows_of(data.eval["mine"]) == [("hvilken bekk", "En elv.")]
    assert data.search[0].relevant == {"q3": {"d2": 1}}


def test_what_of_a_beir_folder_is_not_read_is_named(tmp_path):
    apart = [row | {"url": "x", "text": unicodedata.normalize("NFD", row["text"] + " å")} for row in CORPUS]
    folder = beir(tmp_path / "set", apart, QUERIES, ["q1\td1\t1"])
    for split in ("dev", "test"):
        beir(folder, apart, [row | {"source": "x"} for row in QUERIES], ["q2\td2\t1"], split)
    data = load(tmp_path, f"  mine: {{source: {folder}}}", f"evaluation.search=[{folder}]")
    composed = "2 texts were not in Unicode's form NFC, and are now"
    without = "1 queries without a relevant passage"
    files = "files qrels.test.tsv, queries.test.jsonl"
    assert data.summaries["mine"].notes == [f"not read: columns url; {files}; {without}", composed]
    assert [list(found.reading.lines()) for found in data.search] == [
        [f"not read: columns source; {without}"],
        [f"not read: columns url, source; files qrels.test.tsv, qrels.train.tsv, queries.test.jsonl, queries.train.jsonl; "
         f"{without}", composed],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("qrels", "says"),
    [
        (["q1\td9\t1"], "qrels.train.tsv:2: passage 'd9' is not in corpus.jsonl"),
        (["q1\td1\t1", "q9\td1\t1"], "qrels.train.tsv:3: query 'q9' is not in queries.train.jsonl"),
        (["q1 d1 1"], "qrels.train.tsv:2: expected query-id, corpus-id and a whole number"),
        (["q1\td1\t0"], "no relevant passage for any query"),
        (["q1\td1\t²"], "expected query-id, corpus-id and a whole number"),
    ],
)
def test_a_bad_relevance_file_is_named_with_its_line(tmp_path, qrels, says):
    folder = beir(tmp_path / "set", CORPUS, QUERIES, qrels)
    assert says in error_of(tmp_path, f"  mine: {{source: {folder}}}")


# ---------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"anchor": "q", "positive": 7}\n', "a.jsonl:1: column 'positive' holds 7, not text"),
        ('{"anchor": "q", "positive": "d"}\n{"anchor": ["x"], "positive": "d"}\n', "a.jsonl:2: column 'anchor' holds"),
        ('{"anchor": "q"}\n', "a.jsonl:1: there is no column 'positive'. The line has: anchor"),
        ('{"anchor": "q", \n', "a.jsonl:1: not JSON"),
        ("[1]\n", "a.jsonl:1: a line must be an object"),
        ("", "a.jsonl: no rows"),
        ('{"anchor": "", "positive": "d"}\n', "datasets.mine: no rows to train on (1 without text)"),
        (b"\xff\xfe{}", "not text in UTF-8"),
        ('{"anchor": "\\ud83d", "positive": "d"}\n', "a.jsonl:1: column 'anchor' holds half a character"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_line_and_column(tmp_path, content, says):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in error_of(tmp_path, f"  mine: {{source: {file}}}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("./nothing.jsonl", "datasets.mine.source: no file matches ./nothing.jsonl"),
        ("./*.jsonl", "datasets.mine.source: no file matches ./*.jsonl"),
        ("./data.txt", "is neither .jsonl[.gz] nor .parquet"),
        ("./folder", "is not in BEIR layout"),
    ],
)
def test_a_source_that_is_not_there_is_named(tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.txt").write_text("x")
    assert says in error_of(tmp_path, f"  mine: {{source: '{source}'}}")


def test_a_column_of_a_parquet_file_that_is_missing_or_no_text_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"q": "a", "d": 1}])
    prefix = f"  mine: {{source: {tmp_path}/a.parquet, columns: "
    assert "there is no column 'x'. It has: q, d" in error_of(tmp_path, prefix + "{anchor: x, positive: d}}")
    assert "column 'd' holds int64, not text" in error_of(tmp_path, prefix + "{anchor: q, positive: d}}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be read as parquet" in error_of(tmp_path, prefix + "{anchor: q, positive: d}}")


def test_parquet_files_that_differ_in_an_unused_column_are_read_together(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"anchor": "q1", "positive": "d1", "id": 1}])
    write_parquet(tmp_path / "b.parquet", [{"anchor": "q2", "positive": "d2", "id": "two"}])
    assert len(load(tmp_path, f"  mine: {{source: {tmp_path}/*.parquet}}").train["mine"]) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("eval_split: dev", "'datasets.mine.eval_split' has no effect on the source"),
        ("revision: main", "'datasets.mine.revision' has no effect on the source"),
        ("columns: {anchor: a, positive: a}", "'datasets.mine.columns' names one column twice"),
    ],
)
def test_a_key_without_effect_is_refused(tmp_path, more, says):
    source = write_lines(tmp_path / "a.jsonl", [{"anchor": "q", "positive": "d"}])
    assert says in error_of(tmp_path, f"  mine: {{source: {source}, {more}}}")


def test_a_set_cannot_take_the_name_of_an_embedded_one(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"anchor": "q", "positive": "d"}])
    assert "is the name of an embedded set" in error_of(tmp_path, f"  quickstart_nli: {{source: {source}}}")


def test_a_negative_column_that_is_asked_for_and_not_there_is_named(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"q": "a", "d": "b"}])
    columns = "{anchor: q, positive: d, negative: hard}"
    assert "there is no column 'hard'" in error_of(tmp_path, f"  mine: {{source: {source}, columns: {columns}}}")


# ---------------------------------------------------------------------------------- the three families, from local copies
def write_copies(root):
    """Copies of the hub's data sets, small, in their own columns and layouts."""

    def words(prefix, count, **more):
        return [{column: f"{prefix} {text} {i}" for column, text in more.items()} for i in range(count)]

    nli = words("nli", 30, anchor="a", positive="p", negative="n")
    write_parquet(root / "nli/default/train/0.parquet", nli)
    write_parquet(root / "nli/default/dev/0.parquet", words("dev", 6, anchor="a", positive="p", negative="n"))
    write_parquet(root / "norquad/default/train/0.parquet", words("nq", 10, question="q", context="c", answers="x"))
    facts = [
        row | {"fact": None if i % 2 else row["fact"]}
        for i, row in enumerate(words("ob", 10, question_stem="q", fact="f"))
    ]
    write_parquet(root / "noropenbookqa/nb/train/0.parquet", facts)
    for language in ("no", "da", "sv"):
        write_parquet(root / f"scandiqa/{language}/train/0.parquet", words(language, 10, question="q", context="c"))
    supervised = [row | {"label": 1} for row in words("sd", 10, query="q", pos="p")]
    write_parquet(root / "supervised_da/default/train/0.parquet", supervised)
    for subset in ("nb", "nn"):
        paws = [{"sentence1": f"{subset} s{i}", "sentence2": f"{subset} same {i}", "label": 1} for i in range(6)] + [
            {"sentence1": f"{subset} s{i}", "sentence2": f"{subset} near {i}", "label": 0} for i in range(4, 8)
        ]
        write_parquet(root / f"paws_x/{subset}/train/0.parquet", paws)
    ddsc = [
        {
            "query": f"dd q{i}",
            "positive": f"dd p{i}",
            "negative": f"dd n{i}" if i % 5 < 2 else None,
            "instruction": "finn",
            "task": "retrieval",
            "language": ["no", "da", "da", "sv"][i % 4],
            "prompt": "x",
            "response": "y",
        }
        for i in range(40)
    ]
    write_parquet(root / "ddsc/default/train/0.parquet", ddsc)
    return root


@pytest.fixture
def copies(tmp_path):
    return write_copies(tmp_path / "copies")


def families(root, without=()):
    lines = [
        f"  nli: {{source: {root}/nli, revision: main}}",
        "  scandi_qa:",
        *(
            f"    {name}: {{source: {root}/{name}, revision: main, enabled: {str(name not in without).lower()}}}"
            for name in ("norquad", "noropenbookqa", "scandiqa", "supervised_da", "paws_x")
        ),
        f"  ddsc: {{source: {root}/ddsc, revision: main, eval_rows: 4}}",
    ]
    return "\n".join(lines)


def test_the_three_families_become_anchor_positive_negative_and_nothing_else(tmp_path, copies):
    data = load(tmp_path, families(copies))
    assert data.subsets == {
        "nli": ["nli"],
        "scandi_qa": ["scandi_qa-triplets", "scandi_qa-pairs"],
        "ddsc": ["ddsc-triplets", "ddsc-pairs"],
    }
    for name, dataset in data.train.items():
        columns = ["anchor", "positive"] if name.endswith("-pairs") else ["anchor", "positive", "negative"]
        assert dataset.column_names == columns
    assert data.summaries["nli"].rows == 30
    assert set(data.eval["nli"]["anchor"]) == {f"dev a {i}" for i in range(6)}
    ddsc = data.summaries["ddsc"]
    assert (ddsc.rows, ddsc.triplets, ddsc.pairs, ddsc.eval_rows) == (36, ddsc.triplets, 36 - ddsc.triplets, 4)
    assert set(ddsc.languages) == {"no", "da", "sv"}


def test_each_source_of_scandi_qa_has_its_own_switch_and_none_invents_rows(tmp_path, copies):
    data = load(tmp_path, families(copies), "datasets.scandi_qa.eval_rows=0")
    # norquad 10, noropenbookqa 5 with a fact, scandiqa 30, supervised_da 10, paws 12 paraphrases
    assert data.summaries["scandi_qa"].rows == 10 + 5 + 30 + 10 + 12
    assert data.summaries["scandi_qa"].triplets == 4  # paws sentences 4 and 5, in nb and nn
    assert data.summaries["scandi_qa"].left_out == {
        "without text": 5,
        "near misses without a paraphrase of the same sentence": 4,
    }
    fewer = load(tmp_path, families(copies, without=("paws_x", "scandiqa")), "datasets.scandi_qa.eval_rows=0")
    assert fewer.summaries["scandi_qa"].rows == 10 + 5 + 10
    assert fewer.subsets["scandi_qa"] == ["scandi_qa"]


def test_a_near_miss_that_is_not_used_is_left_out_for_its_own_reason(tmp_path, copies):
    said = ["s0", "s0", "s0", "s0", "s1", "s1"]
    rows = [{"sentence1": a, "sentence2": f"b{n}", "label": int(n in (0, 3))} for n, a in enumerate(said)]
    for subset in ("nb", "nn"):
        write_parquet(copies / f"paws_x/{subset}/train/0.parquet", rows)
    summary = load(tmp_path, families(copies), "datasets.scandi_qa.eval_rows=0").summaries["scandi_qa"]
    assert summary.triplets == 4  # both paraphrases of s0 with its last near miss, in nb and nn
    assert summary.left_out == {
        "without text": 5,
        "near misses without a paraphrase of the same sentence": 4,
        "near misses beside another of the same sentence": 2,
    }


def test_a_paraphrase_label_that_is_no_number_is_told_in_one_line(tmp_path, copies):
    rows = [{"sentence1": "a", "sentence2": "b", "label": "yes"}]
    write_parquet(copies / "paws_x/nb/train/0.parquet", rows)
    error = error_of(tmp_path, families(copies))
    assert error.startswith("datasets.scandi_qa.paws_x")
    assert "nb has a label that is not 1 (a paraphrase) or 0" in error and "yes" in error


def test_a_search_set_is_not_called_what_the_mean_over_several_is_called(tmp_path, folder):
    one, other = (shutil.copytree(folder, tmp_path / name) for name in ("search", "choosing"))
    write_lines(tmp_path / "a.jsonl", [{"anchor": f"q{i}", "positive": f"d{i}"} for i in range(4)])
    rows = f"  mine: {{source: {tmp_path}/a.jsonl}}"
    data = load(tmp_path, rows, f"evaluation.search=[{one}]", "evaluation.nanobeir_datasets=[]")
    assert [found.name for found in data.search] == ["search"]
    for folders, name in ((f"[{one}, {folder}]", "search"), (f"[{other}]", "choosing")):
        message = error_of(tmp_path, rows, f"evaluation.search={folders}")
        assert f"so a set cannot be called '{name}'. Rename its folder" in message


def test_columns_and_splits_that_are_not_read_are_named(tmp_path, copies):
    write_parquet(copies / "scandiqa/no/test/0.parquet", [{"question": "q", "context": "c"}])
    write_parquet(copies / "scandiqa/no/validation/0.parquet", [{"question": "q", "context": "c"}])
    summaries = load(tmp_path, families(copies)).summaries
    assert summaries["nli"].notes == []
    assert summaries["scandi_qa"].notes == ["not read: columns answers, label; splits no/test, no/validation"]
    assert summaries["ddsc"].notes == ["not read: columns instruction, task, prompt, response"]


def test_a_question_without_a_fact_never_becomes_its_own_positive(tmp_path, copies):
    data = load(tmp_path, families(copies, without=("norquad", "scandiqa", "supervised_da", "paws_x")))
    for row in data.train["scandi_qa"]:
        assert row["positive"].startswith("ob f")


def test_a_source_that_cannot_be_loaded_stops_the_run_instead_of_changing_the_mix(tmp_path, copies):
    (copies / "paws_x/nn/train/0.parquet").unlink()
    assert "datasets.scandi_qa.paws_x.source" in error_of(tmp_path, families(copies))


def test_a_hub_repository_with_columns_reads_like_a_file(tmp_path, copies):
    data = load(
        tmp_path, f"  mine: {{source: {copies}/supervised_da, columns: {{anchor: query, positive: pos}}, eval_rows: 0}}"
    )
    assert rows_of(data.train["mine"])[0] == ("sd q 0", "sd p 0")


def test_rows_of_the_evaluation_split_are_not_counted_among_those_trained_on(tmp_path):
    row = {"anchor": "q", "positive": "d", "negative_1": "x", "negative_2": "n"}
    for split in ("train", "dev"):
        rows = [{column: f"{split} {text}{n}" for column, text in row.items()} for n in range(10)]
        write_parquet(tmp_path / f"copy/default/{split}/0.parquet", rows)
    columns = "{anchor: anchor, positive: positive, negative: negative}"
    summary = load(tmp_path, f"  mine: {{source: {tmp_path}/copy, columns: {columns}, eval_split: dev}}").summaries[
        "mine"
    ]
    assert (summary.rows, summary.several, summary.eval_rows) == (10, {"2": 10}, 10)


def test_without_the_hub_one_line_says_which_repository_why_and_what_to_do(tmp_path):
    message = error_of(tmp_path, "  nli: {source: Fremtind/all-nli-norwegian, revision: main}")
    assert message.startswith("cannot download Fremtind/all-nli-norwegian (the Norwegian NLI data): ")
    assert "hf download Fremtind/all-nli-norwegian --repo-type dataset --revision main" in message
    assert message.endswith("set datasets.nli.source=DIR")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_each_shipped_config_stops_at_its_first_download_with_one_line(name):
    config = load_config(ROOT / f"configs/training_config_{name}.yaml").config
    with pytest.raises(HubUnreachable, match=r"cannot download Fremtind/all-nli-norwegian \(the Norwegian NLI data\)"):
        load_data(config)
    with pytest.raises(HubUnreachable) as caught:
        fetch_base_model(config)
    message = caught.value.format_message()
    assert message.startswith(f"cannot download {config.model.base_model} (the base model): ")
    assert message.endswith("set model.base_model=DIR")
    assert "\n" not in message


# ---------------------------------------------------------------------------------- the embedded data
def test_the_quickstart_data_has_the_shapes_of_the_real_sets(tmp_path):
    data = load(tmp_path, "  quickstart: {}")
    sets = data.summaries
    assert list(sets) == ["quickstart_nli", "quickstart_scandi_qa", "quickstart_ddsc"]
    assert sum(summary.rows for summary in sets.values()) >= 400
    assert sets["quickstart_nli"].pairs == sets["quickstart_scandi_qa"].triplets == 0
    assert sets["quickstart_ddsc"].triplets > 50 < sets["quickstart_ddsc"].pairs
    assert set(sets["quickstart_scandi_qa"].languages) == {"nb", "nn", "da", "sv"}


def test_the_quickstart_search_set_is_held_out_of_its_training_rows(tmp_path):
    search = read_search_set(Path(QUICKSTART) / "search", "dev", "quickstart")
    assert len(search.queries) >= 60
    assert len(search.corpus) >= 250
    data = load(tmp_path, "  quickstart: {}")
    trained = {
        text for dataset in [*data.train.values(), *data.eval.values()] for row in dataset for text in row.values()
    }
    assert trained.isdisjoint(search.queries.values())
    assert trained.isdisjoint(search.corpus.values())
    passages = {json.loads(line)["text"] for line in (QUICKSTART / "search/corpus.jsonl").read_text().splitlines()}
    assert trained.isdisjoint(passages)


def embedded_rows(name):
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", QUICKSTART_SETS)
def test_an_embedded_set_holds_no_row_twice(name):
    rows = [tuple(row.values()) for row in embedded_rows(name)]
    assert len(set(rows)) == len(rows) > 100


def test_a_question_of_sister_languages_and_its_answer_are_in_two_languages(tmp_path):
    rows = embedded_rows("sister_languages")
    assert Counter(row["language"] for row in rows) == dict.fromkeys(("nb", "nn", "da", "sv"), 240)
    search = read_search_set(QUICKSTART / "sister_languages", "dev", "sister_languages")
    assert len(search.queries) == 216
    for query, passages in search.relevant.items():
        assert [passage[:2] != query[:2] for passage in passages] == [True]


def test_what_is_searched_in_sister_languages_is_in_no_training_row(tmp_path):
    data = load(tmp_path, "  quickstart: {sets: [nli, scandi_qa, ddsc, sister_languages]}")
    search = read_search_set(QUICKSTART / "sister_languages", "dev", "sister_languages")
    trained = {*data.queries(), *data.passages()}
    assert trained.isdisjoint(search.queries.values())
    assert trained.isdisjoint(search.corpus.values())
    known = {word for row in embedded_rows("sister_languages") for word in words_of(" ".join(row.values()))}
    assert known.issuperset(word for text in search.queries.values() for word in words_of(text))


def test_the_words_of_a_question_of_sister_languages_are_together_in_no_training_text():
    search = read_search_set(QUICKSTART / "sister_languages", "dev", "sister_languages")
    rows = embedded_rows("sister_languages")
    trained = [words_of(row[key]) for row in rows for key in ("question", "context")]
    asking = set(["hvem", "kven", "vem", "hva", "kva", "hvad", "vad", "hvor", "kvar", "var", "gjorde", "lavede"])
    assert any(words_of(rows[0]["question"]) - asking <= words for words in trained)
    for text in search.queries.values():
        asked = words_of(text) - asking
        assert len(asked) >= 3
        assert not any(asked <= words for words in trained), text


def words_of(text):
    return set(re.findall(r"\w+", text.casefold()))
