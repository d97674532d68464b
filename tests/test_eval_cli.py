"""python -m evaluate, from the command line to the files it leaves."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from evaluate.cli import main
from evaluate.scores import ndcg_per_query
from tests.checkpoints import write_dense
from tests.conftest import ROOT, run_trainer
from tests.test_models import build
from trainer.data.beir import read_search_set
from trainer.data.sources import QUICKSTART
from trainer.models.build import save_model
from trainer.publish.card import build_model_card
from trainer.runs.results import Ranking
from trainer.runs.run import Run


def evaluate(where, *arguments):
    """python -m evaluate in this process, working in `where`."""
    with contextlib.chdir(where):
        return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def evaluated(trained_once, tmp_path_factory):
    """A finished run that was evaluated with everything, and what was printed."""
    where = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained_once, where, dirs_exist_ok=True)
    result = run_trainer(where, "run", "tiny.yaml", "--tasks", f"{QUICKSTART / 'search'}:no", module="evaluate")
    assert result.returncode == 0, result.stderr
    return where, result


def test_one_command_measures_everything_into_the_runs_folder(evaluated):
    where, result = evaluated
    run = where / "models/tiny"
    for part in ("sparsity", "latency", "leakage", "hybrid", "compare", "terms", "failed"):
        assert (run / f"eval/{part}.json").is_file(), part
    scores = {file.parent.name for file in (run / "eval/scores").rglob("*.json")}
    assert scores == {"tiny", "bm25"}
    assert (run / "report/index.html").is_file()
    assert (run / "report/summary.md").is_file()
    printed = result.stdout
    for word in (
        "tiny        search: nDCG@10 0.",
        "bm25        search: nDCG@10 0.",
        "hybrid ",
        "sparsity ",
        "latency ",
        "leakage ",
    ):
        assert word in printed
    assert "DEBUG" not in printed + result.stderr
    assert json.loads((run / "eval/failed.json").read_text()) == {}


def test_the_score_is_the_one_that_training_ended_with_on_queries_that_did_not_choose(evaluated):
    where, result = evaluated
    run = where / "models/tiny"
    manifest = json.loads((run / "run.json").read_text())
    per_query = json.loads((run / "eval/per_query/tiny/search.json").read_text())["ndcg_at_10"]
    odd = [value for name, value in per_query.items() if hashlib.sha256(name[12:].encode()).digest()[-1] % 2]
    assert (len(per_query), len(odd)) == (72, 41)  # names begin with dev/default/
    assert fmean(odd) == pytest.approx(manifest["after"]["quickstart_ndcg@10"], abs=2e-3)
    words = "41 queries; 31 others chose the checkpoint and are left out"
    for system in ("tiny", "bm25"):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{system:<12}search: nDCG")]
        assert line.endswith(f"{words})")
    longer = "100.0% of the documents have more than 32 tokens; 66.0% of the text is cut off"
    assert f"tiny        search: nDCG@10 {fmean(odd):.4f} ({longer}; {words})" in result.stdout
    compared = json.loads((run / "eval/compare.json").read_text())
    assert compared["tasks"]["search"]["tiny"] == pytest.approx(fmean(odd))
    assert compared["against"]["bm25"]["tasks"]["search"]["queries"] == 41
    # the test half of hybrid is the same one
    fused = json.loads((run / "eval/hybrid.json").read_text())[0]["tasks"]["search"]
    assert fused["test"]["tiny"] == pytest.approx(fmean(odd))
    for page in ("summary.md", "index.html"):
        text = (run / "report" / page).read_text()
        assert f"{fmean(odd):.3f}" in text
        assert f"tiny: {longer}; {words} (search)." in text
        assert "31 queries of quickstart (half of dev)" in text
    with contextlib.chdir(where):
        card = build_model_card(Run.finished("tiny"), "org/model", 800).text
    assert f"| search | {fmean(odd):.4f} |" in card
    assert f"tiny: {longer}; {words} (search)." in card
    assert "Against bm25, with 95 % bootstrap intervals: search " in card
    sparsity = json.loads((run / "eval/sparsity.json").read_text())
    assert (sparsity["routes"]["query"]["texts"], sparsity["judged_queries"]) == (72, 41)


def test_measuring_leaves_the_model_as_it_is_and_the_published_card_says_how_much_was_trained_on(
    evaluated, trained_once
):
    where, _ = evaluated
    final, before = where / "models/tiny/final", trained_once / "models/tiny/final"
    files = [file.relative_to(before) for file in before.rglob("*") if file.is_file()]
    assert [file for file in files if (final / file).read_bytes() != (before / file).read_bytes()] == []
    assert len(files) == len([file for file in final.rglob("*") if file.is_file()]) > 5
    values = json.loads((where / "models/tiny/eval/leakage.json").read_text())
    assert values["training_texts"] > 500
    row = values["tasks"]["search"]
    counts = [row[f"{kind}{side}"] for side in ("queries", "passages") for kind in ("", "exact_", "near_")]
    with contextlib.chdir(where):
        card = build_model_card(Run.finished("tiny"), "org/model", 800).text
    assert f"among the {values['training_texts']:,} training texts" in card
    assert f"| search | {' | '.join(f'{count:,}' for count in counts)} |" in card


def test_a_second_run_keeps_what_is_finished(evaluated):
    where, _ = evaluated
    files = sorted((where / "models/tiny/eval/scores").rglob("*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    again = evaluate(where, "mteb", "tiny.yaml", "--tasks", f"{QUICKSTART / 'search'}:no")
    assert again.exit_code == 0, again.stderr
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_planted_leak_fails_the_command_that_must_not_find_one(trained, folder):
    file = trained / "models/tiny/training_texts.parquet"
    texts = [*pq.read_table(file).to_pylist(), {"dataset": "planted", "text": "HVOR ligger  Mjøsa?"}]
    pq.write_table(pa.Table.from_pylist(texts), file)
    quiet = evaluate(trained, "leakage", "tiny.yaml", "--tasks", str(folder))
    assert quiet.exit_code == 0, quiet.stderr
    assert "leakage     four: 1 of 4 queries and 0 of 4 passages were trained on (exactly)" in quiet.stdout
    strict = evaluate(trained, "leakage", "tiny.yaml", "--tasks", str(folder), "--fail-on-leak")
    assert strict.exit_code == 1


def test_a_failed_task_is_in_the_exit_status_and_the_report(trained, folder):
    (folder / "corpus.jsonl").write_text("")
    result = evaluate(trained, "mteb", "tiny.yaml", "--tasks", f"{folder} {QUICKSTART / 'search'}")
    assert result.exit_code == 1
    assert "four: FAILED (" in result.stdout
    assert "no passages" in result.stdout
    assert "tiny        search: nDCG@10 0." in result.stdout
    assert json.loads((trained / "models/tiny/eval/failed.json").read_text())["tiny"].keys() == {"four"}


def test_a_dense_model_is_scored_behind_its_own_prompts_and_fused_beside_bm25(trained, tmp_path):
    dense = write_dense(tmp_path / "dense-model")
    settings = dense / "config_sentence_transformers.json"
    prompts = {"query": "hva er: ", "passage": "tekst: "}  # stock `encode_document` passes over a "passage"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompts": prompts}))
    result = evaluate(trained, "hybrid", "tiny.yaml", "--dense", str(dense), "--tasks", str(QUICKSTART / "search"))
    assert result.exit_code == 0, result.output
    pairs = json.loads((trained / "models/tiny/eval/hybrid.json").read_text())
    assert [(pair["first"], pair["second"]) for pair in pairs] == [("tiny", "bm25"), ("tiny", "dense")]
    expected = SentenceTransformer(str(dense), device="cpu")
    data = read_search_set(QUICKSTART / "search", "dev", "search")
    hits = semantic_search(
        expected.encode([f"hva er: {text}" for text in data.queries.values()], convert_to_tensor=True),
        expected.encode([f"tekst: {text}" for text in data.corpus.values()], convert_to_tensor=True),
        top_k=10,
    )
    found = {
        query: {list(data.corpus)[hit["corpus_id"]]: hit["score"] for hit in row}
        for query, row in zip(data.queries, hits, strict=True)
    }
    relevant = {query: dict.fromkeys(passages, 1) for query, passages in data.relevant.items()}
    ndcg = ndcg_per_query(Ranking(found, relevant))
    assert pairs[1]["tasks"]["search"]["all"]["dense"] == pytest.approx(sum(ndcg.values()) / len(ndcg), abs=1e-3)


def test_a_baseline_may_not_take_the_name_of_another_system(trained, folder):
    assert evaluate(trained, "mteb", "tiny.yaml", "--tasks", str(folder)).exit_code == 0
    assert evaluate(trained, "bm25", "tiny.yaml", "--tasks", str(folder)).exit_code == 0
    shutil.copytree(trained / "models/tiny/eval/scores/bm25", trained / "other/bm25")
    result = evaluate(trained, "compare", "tiny.yaml", "--baseline", "other/bm25")
    assert (result.exit_code, "there is a system 'bm25' already" in result.stderr) == (2, True)
    (trained / "other/bm25").rename(trained / "other/elastic")
    result = evaluate(trained, "compare", "tiny.yaml", "--baseline", "other/elastic")
    assert result.exit_code == 0, result.output
    assert "against elastic: mean" in result.stdout


def test_a_failure_stays_in_the_report_until_the_task_has_run(trained, folder):
    tasks = ("tiny.yaml", "--tasks", str(folder))
    corpus = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text("")
    assert evaluate(trained, "mteb", *tasks).exit_code == 1
    assert evaluate(trained, "mteb", "tiny.yaml", "--tasks", str(QUICKSTART / "search")).exit_code == 0
    assert evaluate(trained, "report", *tasks).exit_code == 0
    page = trained / "models/tiny/report/index.html"
    assert "no passages" in page.read_text()
    (folder / "corpus.jsonl").write_text(corpus)
    assert evaluate(trained, "mteb", *tasks).exit_code == 0
    assert evaluate(trained, "report", *tasks).exit_code == 0
    assert "no passages" not in page.read_text()


def test_another_run_is_a_baseline(trained, folder):
    shutil.copytree(trained / "models/tiny", trained / "models/earlier")
    tasks = ("--tasks", str(folder))
    refused = evaluate(trained, "compare", "tiny.yaml", *tasks, "--baseline", "models/earlier")
    assert (refused.exit_code, "the run has not been evaluated" in refused.stderr) == (2, True)
    for model in ("models/tiny", "models/earlier"):
        assert evaluate(trained, "mteb", "--model", model, *tasks).exit_code == 0
    result = evaluate(trained, "compare", "tiny.yaml", *tasks, "--baseline", "models/earlier")
    assert result.exit_code == 0, result.output
    assert "against earlier: mean +0.000 over 1 of 1 task, 0 wins, 0 losses, 1 not told apart" in result.stdout


def test_a_report_keeps_the_comparison_with_baselines(trained, folder):
    tasks = ("tiny.yaml", "--tasks", str(folder))
    assert evaluate(trained, "mteb", *tasks).exit_code == 0
    shutil.copytree(trained / "models/tiny/eval/scores/tiny", trained / "other/elastic")
    assert evaluate(trained, "compare", *tasks, "--baseline", "other/elastic").exit_code == 0
    assert evaluate(trained, "report", *tasks).exit_code == 0
    assert "elastic" in (trained / "models/tiny/report/summary.md").read_text()


def test_a_task_too_small_to_choose_a_weight_on_is_fused_and_reported_all_the_same(trained, folder):
    tasks = ("tiny.yaml", "--tasks", str(folder))
    fused = evaluate(trained, "hybrid", *tasks)
    assert fused.exit_code == 0, fused.output
    report = evaluate(trained, "report", *tasks)
    assert report.exit_code == 0, report.output
    assert "a weight needs 10 of each" in (trained / "models/tiny/report/index.html").read_text()


def test_a_dense_model_may_not_take_the_runs_name_and_changed_weights_are_scored_again(trained, tmp_path):
    dense = write_dense(tmp_path / "dense-model").rename(tmp_path / "tiny")
    tasks = ("--tasks", str(QUICKSTART / "search"))
    refused = evaluate(trained, "hybrid", "tiny.yaml", "--dense", str(dense), *tasks)
    assert (refused.exit_code, "Rename the folder" in refused.stderr) == (2, True)
    assert not (trained / "models/tiny/eval/scores").exists()
    dense = dense.rename(tmp_path / "other")
    scores = trained / "models/tiny/eval/scores/other/search.json"
    evaluate(trained, "hybrid", "tiny.yaml", "--dense", str(dense), *tasks)
    before = scores.read_text()
    weights = load_file(dense / "model.safetensors")
    save_file(
        {name: torch.randn_like(tensor) for name, tensor in weights.items()},
        dense / "model.safetensors",
        {"format": "pt"},
    )
    evaluate(trained, "hybrid", "tiny.yaml", "--dense", str(dense), *tasks)
    assert scores.read_text() != before


def test_a_part_that_cannot_run_is_said_and_the_report_is_written_all_the_same(trained, folder):
    (trained / "models/tiny/training_texts.parquet").unlink()
    result = evaluate(trained, "run", "tiny.yaml", "--tasks", str(folder))
    assert result.exit_code == 1
    assert "leakage     not done: " in result.stdout
    assert "against bm25: mean" in result.stdout
    assert (trained / "models/tiny/report/index.html").is_file()


def test_a_baseline_that_is_not_there_stops_before_anything_is_scored(trained, folder):
    result = evaluate(trained, "run", "tiny.yaml", "--tasks", str(folder), "--baseline", "none.json")
    assert (result.exit_code, "nDCG" in result.stdout) == (2, False)


@pytest.mark.parametrize("part", ["sparsity", "latency", "leakage"])
def test_a_task_whose_data_is_spoilt_is_said_and_in_the_exit_status_of_every_part(trained, folder, part):
    (folder / "corpus.jsonl").write_text("")
    result = evaluate(trained, part, "tiny.yaml", "--tasks", f"{folder} {QUICKSTART / 'search'}")
    assert result.exit_code == 1
    assert "data        four: FAILED (" in result.stdout


def test_a_gate_that_cannot_measure_does_not_pass(trained, folder):
    shutil.copytree(trained / "models/tiny/final", trained / "plain")
    result = evaluate(trained, "leakage", "--model", "./plain", "--tasks", str(folder), "--fail-on-leak")
    assert (result.exit_code, "is no run of this project" in result.stderr) == (2, True)


def test_a_csr_model_is_measured_too(tmp_path, folder):
    save_model(build(tmp_path, write_dense(tmp_path / "base"), "csr"), tmp_path / "csr")
    result = evaluate(tmp_path, "run", "--model", "./csr", "--tasks", str(folder))
    assert result.exit_code == 0, result.output
    assert "dimensions are no words" in (tmp_path / "csr/report/index.html").read_text()


def test_bm25_needs_no_model(tmp_path, folder):
    result = evaluate(tmp_path, "bm25", "--tasks", f"{folder}:no")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("bm25        four: nDCG@10 ")


def test_a_dense_model_is_scored_alone_and_a_csr_config_names_its_parent(tmp_path, folder):
    dense = write_dense(tmp_path / "model")
    alone = evaluate(tmp_path, "dense", str(dense), "--tasks", str(folder), "--output", "alone")
    assert alone.exit_code == 0, alone.output
    sets = f"model.base_model={dense} model.revision=null hardware.device=cpu"
    parent = evaluate(
        tmp_path, "dense", "--parent-of", "csr", "--set", sets, "--tasks", str(folder), "--output", "parent"
    )
    assert parent.exit_code == 0, parent.output
    files = [tmp_path / where / "scores/dense/four.json" for where in ("alone", "parent")]
    scores = [json.loads(file.read_text())["scores"] for file in files]
    assert scores[0] == scores[1]
    refused = evaluate(tmp_path, "dense", "--parent-of", "quickstart", "--tasks", str(folder))
    assert (refused.exit_code, "is no dense model that CSR makes sparse" in refused.stderr) == (2, True)
    assert "say which dense model" in evaluate(tmp_path, "dense", "--tasks", str(folder)).stderr


def test_the_hub_being_unreachable_is_one_line_per_task_and_status_1(trained):
    result = evaluate(trained, "bm25", "--tasks", "NorQuadRetrieval")
    assert result.exit_code == 1
    (line,) = result.stdout.strip().splitlines()
    assert line.startswith("bm25        NorQuadRetrieval: FAILED (the data of NorQuadRetrieval cannot be loaded: ")


@pytest.mark.parametrize(
    "arguments,line",
    [
        (("run",), "Error: say what to evaluate"),
        (("run", "nothing"), "Error: there is no config 'nothing'"),
        (("run", "--model", "models/typo"), "Error: there is no model at models/typo"),
        (("run", "tiny.yaml", "--tasks", "NorQuadRetrival"), "Did you mean 'NorQuadRetrieval'?"),
        (("compare", "tiny.yaml", "--baseline", "none.json"), "Error: there are no results at none.json"),
        (
            ("sparsity", "--model", "some/model", "--tasks", f"{QUICKSTART}/search"),
            "Error: some/model cannot be loaded: ",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(trained, arguments, line):
    result = evaluate(trained, *arguments)
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_is_quick_because_heavy_libraries_are_imported_inside_commands():
    code = "import sys, evaluate.cli; sys.exit(any(name in sys.modules for name in ('torch', 'mteb', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "quiet",
    [
        "trainer.system.libraries import set_up_libraries as quiet; quiet(False)",
        "evaluate.cli import set_up_libraries as quiet; quiet()",
    ],
)
def test_attempts_to_reach_the_hub_are_not_told_one_by_one(quiet):
    attempt = "import logging; logging.getLogger('huggingface_hub.utils._http').warning('Retrying in 8s')"
    found = subprocess.run(
        [sys.executable, "-c", f"from {quiet}; {attempt}"], capture_output=True, text=True, check=True
    )
    assert found.stdout + found.stderr == ""
