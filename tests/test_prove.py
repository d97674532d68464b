"""`make prove`: what it plans, how it goes on after a failure, and what it writes. With steps that only pretend."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import mteb
import pytest
import torch
from click.testing import CliRunner

from evaluate.cli import main
from evaluate.prove import prove as prove_module
from evaluate.prove.child import Outcome, reason_of, run_child
from evaluate.prove.dry_run import UNKNOWN
from evaluate.prove.estimate import rows_of, seconds_of
from evaluate.prove.expected import run_differences, score_differences
from evaluate.prove.journal import Journal
from evaluate.prove.plan import CONFIGS, DENSE, SPARSE, Subject, make_plan
from evaluate.prove.results import END, START, between_markers
from evaluate.prove.rows import Row, against_bm25, mean_of, scores_of
from evaluate.prove.sources import Source, fetch_all, size_of, sources_of
from evaluate.tasks import NANO
from tests.conftest import ROOT
from tests.shelf import Shelf
from tests.standins import write_norbert
from tests.test_shipped_configs import NAMES
from trainer.config import ConfigError, find_config, load_config, render
from trainer.hub.download import Snapshot
from trainer.runs.results import TaskScore
from trainer.system.files import write_json

TASK = f"{ROOT}/trainer/data/quickstart/search:no"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def plan_of(*only, tasks=TASK, sets=()):
    return make_plan(only, tasks, sets, lambda line: None)


def keys(plan):
    return [step.key for step in plan.steps]


# ------------------------------------------------------------------------------------------- the plan
def test_the_eight_configs_are_the_shipped_ones_without_the_quickstart():
    assert set(CONFIGS) <= set(NAMES) - {"quickstart"}
    assert len(CONFIGS) == 8


def test_baselines_come_first_then_each_config_is_trained_and_measured():
    baselines = ["bm25", *DENSE, SPARSE, "thivy/norbert4-base-scandinavian-embedding"]
    expected = [f"{verb} {name}" for name in CONFIGS for verb in ("train", "evaluate")]
    assert keys(plan_of()) == [*(f"baseline {name}" for name in baselines), *expected]


def test_only_leaves_out_other_configs_and_a_parent_that_none_of_them_has():
    plan = plan_of("splade_h100")
    assert keys(plan)[-2:] == ["train splade_h100", "evaluate splade_h100"]
    assert len(keys(plan)) == 7
    assert not [key for key in keys(plan) if "thivy" in key]
    assert "train csr" in [step.key for step in plan.others]


def test_every_step_is_a_command_that_parses():
    from trainer.cli import main as trainer_main

    groups = {"trainer": trainer_main, "evaluate": main}
    for step in plan_of(tasks="scandinavian nano", sets=["training.max_steps=2"]).steps:
        module, name, *options = step.command
        context = groups[module].commands[name].make_context(name, options)
        expected = ("training.max_steps=2",) if step.trains or "--parent-of" in step.command else ()
        assert context.params.get("overrides", ()) == expected


def test_a_config_for_a_mac_trains_on_the_gpu_that_is_here_and_a_line_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = []
    plan = make_plan(["splade", "splade_h100"], TASK, [], said.append)
    trains = [shlex.join(step.command) for step in plan.steps if step.trains]
    assert trains == ["trainer train splade --set hardware.device=cuda", "trainer train splade_h100"]
    assert said == ["device    splade: cuda in place of the GPU of a Mac, which is not here"]


def test_a_device_that_the_user_says_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = plan_of("splade", sets=["hardware.device=cpu", "training.bf16=false"])
    assert [loaded.config.hardware.device for loaded in plan.configs] == ["cpu"]


@pytest.mark.parametrize(
    ("only", "tasks", "says"),
    [("slpade", TASK, "Did you mean 'splade'?"), ("splade", "NorQuadRetrival", "Did you mean 'NorQuadRetrieval'?")],
)
def test_a_mistyped_config_or_task_is_one_line_before_anything_starts(only, tasks, says):
    result = CliRunner().invoke(main, ["prove", "--only", only, "--tasks", tasks])
    assert (result.exit_code, says in result.stderr) == (2, True)


def test_every_source_of_the_configs_the_baselines_and_the_tasks_is_downloaded_once():
    sources = [source.repository for source in sources_of(plan_of(tasks="scandinavian nano"))]
    for name in ("ltg/norbert3-xs", "ltg/norquad", "alexandrainst/scandi-qa", "lightonai/NanoBEIR-sv", *DENSE, SPARSE):
        assert sources.count(name) == 1
    for task in ("NorQuadRetrieval", "SwednRetrieval", *NANO):
        assert mteb.get_task(task).metadata.dataset["path"] in sources
    off = sources_of(plan_of("splade", sets=["datasets.nli.enabled=false", "evaluation.nanobeir_datasets=[]"]))
    assert not {"Fremtind/all-nli-norwegian", "lightonai/NanoBEIR-no"} & {source.repository for source in off}


def test_code_that_is_not_trusted_stops_with_the_command_that_pins_this_config(tmp_path, monkeypatch):
    snapshot = Snapshot("ltg/norbert3-xs", write_norbert(tmp_path / "norbert3", "norbert3"), "f" * 40)
    monkeypatch.setattr("trainer.models.build.fetch", lambda *_, **__: snapshot)
    with pytest.raises(ConfigError, match=r"which is not trusted yet.* run: make pin CONFIG=splade$"):
        fetch_all(plan_of("splade"), print)
    monkeypatch.setattr("evaluate.cli.set_up_libraries", lambda: None)
    result = CliRunner().invoke(main, ["dense", "--parent-of", "csr", "--tasks", TASK])
    assert (result.exit_code, result.stderr.strip()[-24:]) == (2, "run: make pin CONFIG=csr")


# ------------------------------------------------------------------------------------------- the estimate
def test_an_epoch_is_as_many_rows_of_each_set_as_the_smallest_or_the_largest_has():
    rows = {name: rows_of(load_config(find_config(name)).config) for name in ("splade_h100", "splade_large_h100")}
    assert rows == {"splade_h100": 3 * 143_000, "splade_large_h100": 3 * 968_000}


def test_few_steps_take_less_than_an_epoch_and_an_unknown_model_has_no_estimate():
    (epoch,) = [seconds_of(step) for step in plan_of("splade_h100").steps if step.trains]
    (short,) = [seconds_of(step) for step in plan_of("splade_h100", sets=["training.max_steps=9"]).steps if step.trains]
    assert 300 < short < epoch / 2
    unknown = plan_of("splade", sets=["model.base_model=org/other"])
    assert [seconds_of(step) for step in unknown.steps if step.trains] == [None]


def test_a_dry_run_prints_steps_downloads_hours_and_disk_and_writes_nothing(tmp_path):
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(main, ["prove", "--dry-run", "--only", "splade_h100", "--tasks", TASK])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("download  model ltg/norbert4-large at 49475ca0e59c")]
    assert UNKNOWN in result.stdout
    assert any(re.fullmatch(r"step      train splade_h100: about [\d.]+ (min|h)", line) for line in lines)
    assert "          python -m trainer train splade_h100" in lines
    assert any(re.fullmatch(r"hours     about [\d.]+ on one H100", line) for line in lines)
    assert (
        "disk      about 16 GB for the run folders, and the downloads" in lines
    )  # 360 million × (3 × 12 + 2 × 4) bytes
    assert not any(tmp_path.iterdir())


def test_the_size_of_a_download_is_that_of_the_files_that_are_taken(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(b"x" * 30)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 500)
    (tmp_path / "tf_model.h5").write_bytes(b"x" * 9_000)
    with Shelf(COMMIT) as shelf:
        shelf.add("org/model", tmp_path)
        shelf.add("org/data", tmp_path, "dataset")
        monkeypatch.setattr("evaluate.prove.sources.HfApi", lambda: _api(shelf.url))
        assert size_of(Source("org/model", "main", "model", "")) == 530
        assert size_of(Source("org/data", None, "dataset", "")) == 9_530
        assert size_of(Source("org/nothing", None, "model", "")) is None


def _api(url):
    """The hub's client, without the switch that keeps the tests offline."""
    import httpx2

    def about(kind):
        def ask(name, revision, files_metadata, timeout):
            answer = httpx2.get(f"{url}/api/{kind}/{name}/revision/{revision or 'main'}", timeout=timeout)
            answer.raise_for_status()
            return SimpleNamespace(siblings=[SimpleNamespace(**file) for file in answer.json()["siblings"]])

        return ask

    return SimpleNamespace(model_info=about("models"), dataset_info=about("datasets"))


# ------------------------------------------------------------------------------------------- a child
@pytest.fixture
def script(tmp_path, monkeypatch):
    """Write a module that run_child starts."""

    def write(text):
        (tmp_path / "pretended.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path / "logs/step.log"

    return write


def test_the_output_of_a_child_is_shown_and_kept_and_its_memory_is_its_own(script):
    log = script(
        "import sys, time; x = bytearray(300 * 2**20); print('one'); time.sleep(0.6)\n"
        "print('two', file=sys.stderr); sys.exit(3)"
    )
    shown = []
    outcome = run_child(["pretended"], log, shown.append)
    assert (outcome.status, outcome.reason, outcome.received) == (3, "two", None)
    assert shown == log.read_text().splitlines() == ["one", "two"]
    assert 0.29 < outcome.peak_gib < 0.45  # 300 MiB and Python itself, though the tests take more
    assert 0 < outcome.seconds < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_child_once_and_is_told(script, number):
    text = """
import signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
print("ready")
while not got: time.sleep(0.01)
time.sleep(0.1)
print("got", [int(number) for number in got]); sys.exit(7)
"""
    log, shown = script(text), []

    def stop():
        while not shown:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(number)
    outcome = run_child(["pretended"], log, shown.append)
    assert (outcome.status, outcome.received) == (7, number)
    assert shown == ["ready", f"got [{int(number)}]"]
    assert signal.getsignal(number) is before


def test_the_reason_of_a_failure_is_the_line_that_names_it():
    lines = ["splade      NorQuadRetrieval: FAILED (no data)", "report      models/splade/report/index.html", ""]
    assert reason_of(lines) == lines[0]
    assert reason_of(["a", "ValueError: b"]) == "ValueError: b"
    assert reason_of([]) == "it said nothing"


# ------------------------------------------------------------------------------------------- steps that only pretend
def write_run(name, status="finished", sets=(), run_id="first"):
    """A run folder as far as `make prove` reads it."""
    from trainer.runs.run import MODELS

    folder = MODELS / name
    (folder / "final").mkdir(parents=True, exist_ok=True)
    loaded = load_config(find_config(name), sets)
    (folder / "config.yaml").write_text(render(loaded))
    manifest = {"id": run_id, "name": name, "status": status, "device": "1 × NVIDIA H100", "total_seconds": 7200}
    manifest |= {"peak_memory_gib": 61.25, "steps_done": 10, "git_commit": "f" * 40}
    manifest |= {"base_model": {"source": "org/base", "commit": COMMIT}, "datasets": {}}
    write_json(folder / "run.json", manifest)


def write_score(folder, system, values, task="search"):
    """A system's score, as an evaluation stores it."""
    rows = [
        {"ndcg_at_10": sum(values) / len(values), "main_score": 0, "hf_subset": "default", "languages": ["nob-Latn"]}
    ]
    write_json(folder / f"scores/{system}/{task}.json", {"task_name": task, "scores": {"dev": rows}})
    queries = {f"dev/default/q{n}": value for n, value in enumerate(values)}
    write_json(folder / f"per_query/{system}/{task}.json", {"ndcg_at_10": queries})


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Steps that write what theirs would, in an empty checkout. `fail` names those that end with an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text(f"# Results\n\n{START}\nold\n{END}\n\nThe end.\n")
    found = SimpleNamespace(ran=[], fail={}, stop={}, folder=tmp_path)

    def pretended(command, log, echo):
        words = list(command)
        found.ran.append(shlex.join(words))
        for part, reason in found.fail.items():
            if part in found.ran[-1]:
                return Outcome(2, 1.0, 0.5, reason)
        for part, number in found.stop.items():
            if part in found.ran[-1]:
                if words[1] == "train":
                    write_run(words[2], status="stopped")
                return Outcome(128 + number, 60.0, 9.0, "Stopped at step 5", number)
        if words[1] == "train":
            write_run(words[2])
        elif words[1] == "run" and words[3].startswith("models/"):
            folder = tmp_path / words[3]
            write_score(folder / "eval", folder.name, [0.5, 0.75])
        elif words[1] == "bm25":
            write_score(tmp_path / "models/prove/eval", "bm25", [0.25, 0.5])
        return Outcome(0, 3600.0, 3.0, "")

    monkeypatch.setattr(prove_module, "run_child", pretended)
    monkeypatch.setattr("evaluate.prove.rows.RESAMPLES", 100)
    monkeypatch.setattr(prove_module, "fetch_all", lambda plan, echo: {})
    return found


def prove(*only, sets=()):
    said = []
    return prove_module.prove(plan_of(*only, sets=sets), said.append), "\n".join(said)


def rows_of_table(text):
    """The first cell of each row of the first table, with the others."""
    lines = text.split("| search |")[1].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in rows)}


def test_finished_steps_are_not_run_again(pretend):
    assert prove("splade")[0] == 0
    assert len(pretend.ran) == 7
    assert pretend.ran[-2:] == ["trainer train splade", f"evaluate run --model models/splade --tasks {TASK}"]
    pretend.ran.clear()
    status, said = prove("splade")
    assert (status, pretend.ran) == (0, [])
    assert "train splade: done before (1 h 0 min)" in said


def test_the_page_gets_the_table_between_its_markers_and_keeps_the_rest(pretend):
    prove("splade")
    page = (pretend.folder / "docs/results.md").read_text()
    assert page.startswith(f"# Results\n\n{START}\n")
    assert page.endswith(f"{END}\n\nThe end.\n")
    assert "old" not in page
    table = rows_of_table(page)
    assert table["splade"] == ["62.5", "62.5", "+25.0 [+25.0, +25.0]", "-"]
    assert table["BM25"] == ["37.5", "37.5", "-", "-"]
    # 7,200 s of training, 3,600 s of evaluation; the GPU's peak is the run's, the machine's that of the process
    assert "| splade | 1 × NVIDIA H100 | 10 | 2.00 | 1.00 | 61.2 | 3.0 | ffffffffffff |" in page
    assert f"org/base@{COMMIT[:12]}" in page
    assert (pretend.folder / "models/prove/results.md").read_text() in page


def test_the_results_are_copied_in_the_layout_of_mteb(pretend):
    prove("splade")
    files = {file.relative_to(pretend.folder / "models/prove/mteb/results") for file in pretend.folder.rglob("search.json")
             if "mteb" in file.parts}  # fmt: skip
    assert {(file.parts[0], file.name) for file in files} == {
        ("nordsparse__splade", "search.json"),
        ("nordsparse__bm25", "search.json"),
    }
    for file in files:
        meta = json.loads((pretend.folder / "models/prove/mteb/results" / file.parent / "model_meta.json").read_text())
        assert meta["revision"] == file.parts[1]


def test_a_config_that_fails_is_listed_with_its_reason_and_the_others_go_on(pretend):
    pretend.fail = {"train splade_large ": "Error: no such device"}
    status, said = prove("splade_large", "splade", sets=["training.seed=42"])
    assert status == 1
    assert "failed    train splade_large: Error: no such device (models/prove/logs/train-splade_large.log)" in said
    assert "evaluate splade_large: left out, for want of 'train splade_large'" in said
    page = (pretend.folder / "docs/results.md").read_text()
    assert "- train splade_large: Error: no such device (" in page
    assert set(rows_of_table(page)) == {"splade", "BM25"}
    pretend.ran.clear()
    pretend.fail = {}
    assert prove("splade_large", "splade", sets=["training.seed=42"])[0] == 0
    assert [command.split()[:3] for command in pretend.ran] == [
        ["trainer", "train", "splade_large"],
        ["evaluate", "run", "--model"],
    ]


def test_a_stopped_training_is_resumed_and_its_time_adds_up(pretend):
    pretend.stop = {"train splade": signal.SIGTERM}
    status, said = prove("splade")
    assert status == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "Stopped in the step 'train splade'. To go on: the same command again"
    pretend.stop = {}
    pretend.ran.clear()
    assert prove("splade")[0] == 0
    assert pretend.ran[0] == "trainer train splade --resume"
    known = Journal(pretend.folder / "models/prove/steps.json").steps["train splade"]
    assert (known["seconds"], known["peak_gib"], known["status"]) == (3660.0, 9.0, "done")


def test_a_run_that_was_trained_by_hand_is_measured_and_not_trained_again(pretend):
    write_run("splade")
    assert prove("splade")[0] == 0
    assert not [command for command in pretend.ran if command.startswith("trainer")]
    assert "splade" in rows_of_table((pretend.folder / "docs/results.md").read_text())


def test_a_run_of_another_config_is_not_taken_for_the_one_that_was_asked_for(pretend):
    write_run("splade", sets=["training.max_steps=50"])
    status, said = prove("splade")
    assert status == 1
    assert "models/splade was trained with another config: training.max_steps is 50 there, -1 here. Move" in said
    assert not [command for command in pretend.ran if "models/splade" in command]


def test_a_run_that_was_trained_anew_is_measured_anew(pretend):
    prove("splade")
    write_run("splade", run_id="second")
    pretend.ran.clear()
    prove("splade")
    assert [command.split()[:2] for command in pretend.ran] == [["evaluate", "run"]]


def test_the_table_keeps_the_configs_of_earlier_commands(pretend):
    prove("splade")
    prove("splade_h100")
    page = (pretend.folder / "docs/results.md").read_text()
    assert list(rows_of_table(page))[:2] == ["splade", "splade_h100"]
    assert "- train splade_large: not yet (about " in page


def test_a_page_without_markers_stays_and_the_table_is_in_models(pretend):
    page = pretend.folder / "docs/results.md"
    page.write_text("mine")
    status, said = prove("splade")
    assert (status, page.read_text()) == (0, "mine")
    assert f"docs/results.md stays as it is: it has no line '{START}'" in said
    assert (pretend.folder / "models/prove/results.md").is_file()


def test_code_that_is_not_trusted_stops_before_anything_runs(pretend, monkeypatch):
    from evaluate.prove import sources

    def refuse(config, pin_command):
        if not config.model.trust_remote_code:
            raise ConfigError("model.base_model: x comes with Python code of its own")

    monkeypatch.setattr(prove_module, "fetch_all", sources.fetch_all)
    monkeypatch.setattr(sources, "fetch_base_model", refuse)
    with pytest.raises(ConfigError, match=r"^model\.base_model: x comes with Python code of its own$"):
        prove("splade")
    said = []
    with pytest.raises(ConfigError, match=r'^splade, csr cannot .* leave them out: ONLY="splade_h100"$'):
        prove_module.prove(plan_of("splade", "csr", "splade_h100"), said.append)
    assert "csr: model.base_model: x comes with Python code of its own" in said
    assert pretend.ran == []


def test_two_commands_at_once_are_refused(pretend):
    code = "from trainer.runs.lock import only_one_in\nfrom pathlib import Path\nimport sys\n"
    code += "with only_one_in(Path('models/prove'), print): print('held', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="Stop it first, or wait"):
            prove("splade")
    finally:
        holder.communicate("")


# ------------------------------------------------------------------------------------------- rows and expectations
def nano_system(value, topics=NANO):
    parts = {"test/no": (value, ("nob-Latn",)), "test/sv": (value / 2, ("swe-Latn",))}
    return {task: TaskScore(task, parts) for task in topics}


def test_nanobeir_is_a_column_for_each_language_and_no_part_of_the_mean():
    system = nano_system(0.5) | {"SNLRetrieval": TaskScore("SNLRetrieval", {"test/default": (0.9, ("nob-Latn",))})}
    scores = scores_of(system)
    assert scores == {"SNLRetrieval": 0.9, "NanoBEIR no": 0.5, "NanoBEIR sv": 0.25}
    assert mean_of(Row(Subject("x", None, "x"), system, scores), ["SNLRetrieval", *NANO]) == 0.9
    assert scores_of(nano_system(0.5, NANO[:5])) == {}


def test_a_score_over_one_point_from_the_published_one_is_listed():
    scores = {"SNLRetrieval": 0.955, "NorQuadRetrieval": 0.239, "TV2Nordretrieval": 0.927}
    found = [*score_differences("intfloat__multilingual-e5-base", "e5", scores)]
    assert found == [
        "e5 on NorQuadRetrieval: 23.9, published 21.9 (+2.0)",
        "e5 on SNLRetrieval: 95.5, published 94.2 (+1.3)",
    ]
    assert [*score_differences("splade", "splade", scores)] == []


def test_a_missed_target_a_slow_training_and_a_warning_are_listed():
    (step,) = [step for step in plan_of("splade_h100").steps if step.trains]
    on_target = {"name": "x", "device": "1 × NVIDIA H100", "total_seconds": 60}
    assert [*run_differences(step, on_target)] == []
    sparsity = {
        "document": {"target_dims": 100, "active_dims": 111.0},
        "query": {"target_dims": 10, "active_dims": 9.5},
    }
    manifest = on_target | {"sparsity": sparsity, "total_seconds": 10**6, "warnings": ["dead", "dense"]}
    found = [*run_differences(step, manifest)]
    assert found[0] == "x: 111 active dims per training document at the end, target 100"
    assert found[1].startswith("x: training took 277.8 h, the estimate was ")
    assert found[2:] == ["x: warning in training: dead and 1 more"]
    assert [*run_differences(step, manifest | {"device": "cpu", "sparsity": {}, "warnings": []})] == []


def test_the_difference_to_bm25_is_a_mean_over_tasks_each_with_the_same_weight():
    def row(name, **tasks):
        system = {
            task: TaskScore(task, {}, {f"test/default/q{n}": value for n, value in enumerate(values)})
            for task, values in tasks.items()
        }
        return Row(Subject(name, None, name), system, {})

    main, bm25 = row("x", a=[0.5, 0.5], b=[0.9] * 8), row("bm25", a=[0.1, 0.1], b=[0.7] * 8)
    assert against_bm25(main, bm25) == pytest.approx((0.3, 0.3, 0.3))  # (0.4 + 0.2) / 2
    assert against_bm25(bm25, bm25) is None


def test_the_page_of_the_checkout_has_the_markers():
    page = (ROOT / "docs/results.md").read_text()
    assert (page.count(START), page.count(END)) == (1, 1)
    changed = between_markers(page, "x\n")
    assert between_markers(changed, "y\n") == between_markers(page, "y\n")
