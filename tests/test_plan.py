import json
import re
from dataclasses import FrozenInstanceError

import pytest

from tests.checkpoints import write_bert
from tests.conftest import ROOT, TINY, run_trainer
from tests.test_models import config_of
from trainer.config import load_config
from trainer.data.loading import load_data
from trainer.runs.run import Run
from trainer.training.describe import data_lines, steps_line
from trainer.training.prepare import Decisions, check, prepare
from trainer.training.progress import Progress
from trainer.training.resume import Start
from trainer.training.train import train


def decisions_of(loaded):
    """What `make check` prints."""
    decisions = Decisions(lambda line: None)
    check(loaded, decisions)
    return decisions.lines


def lines_of(file, *overrides):
    return decisions_of(load_config(file, overrides))


def lines_about(config, data):
    """What is said of the rows and of the steps."""
    progress = Progress(config, data)
    progress.plan()
    return [*data_lines(config, data, progress.steps), steps_line(config, progress)]


def line_with(lines, word):
    return next(line for line in lines if word in line)


def test_the_plan_names_model_rates_rows_steps_memory_and_output(tiny):
    lines = lines_of(tiny)
    assert line_with(lines, "output") == "output    models/tiny"
    assert line_with(lines, "model ") == "model     inference-free-splade built from scratch"
    assert line_with(lines, "0.01:") == "          0.01: 800 parameters: 0.sub_modules.query.0.weight"
    ddsc = re.search(
        r"quickstart_ddsc: 162 rows \(66 triplets \+ 96 pairs; no (\d+), (da|sv) (\d+), (da|sv) (\d+)\)",
        "\n".join(lines),
    )
    assert sum(map(int, ddsc.group(1, 3, 5))) == 162
    assert "18 rows not trained on: held out for the evaluation loss" in line_with(lines, "not trained on")
    assert "steps     6 of 8 rows" in line_with(lines, "steps")
    chosen = "31 others choose the checkpoint (half of dev)"
    assert f"search    quickstart: 41 queries over 256 passages; {chosen}" in lines
    assert re.fullmatch(
        r"memory    at most about weights and optimizer 0\.0 GiB, head 0\.0 GiB, activations 0\.0 GiB, for 16 texts of 32 "
        "tokens per step",
        line_with(lines, "memory    "),
    )


def test_check_never_trains_writes_or_uploads(tiny):
    before = sorted(tiny.parent.rglob("*"))
    result = run_trainer(tiny.parent, "check", "tiny.yaml", "--set", "hub.push=true", "--set", "hub.repo=org/name")
    assert result.returncode == 0, result.stderr
    assert "pushed to org/name" in result.stdout
    assert sorted(tiny.parent.rglob("*")) == before


def test_offline_the_plan_answers_what_it_can_and_says_what_needs_the_hub(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = lines_of(ROOT / "configs/training_config_splade.yaml")
    assert [line.split(":")[0].split()[-1] for line in lines if line.endswith("needs the hub")] == [
        "nli",
        "scandi_qa",
        "ddsc",
    ]
    assert "steps     needs the hub: the number of rows is not known" in lines
    assert "rates     needs the hub: ltg/norbert3-xs" in lines
    assert "model     inference-free-splade from ltg/norbert3-xs at main" in lines


def test_rows_that_share_too_many_texts_are_counted_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"anchor": f"spørsmål {i}", "positive": f"svar {i % 2}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = TINY.replace("  quickstart: {}", "  mine: {source: rows.jsonl, eval_rows: 0}")
    (tmp_path / "mine.yaml").write_text(text)
    # two batches of eight, each of which can hold each text once
    assert "batches   mine: 12 rows sit out each pass" in line_with(lines_of(tmp_path / "mine.yaml"), "sit out")


def test_a_local_base_model_is_described_even_when_the_data_needs_the_hub(tmp_path):
    config_of(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade")
    text = (tmp_path / "config.yaml").read_text()
    text = re.sub(r"  quickstart:\n(    .*\n)+", "  nli: {source: Fremtind/all-nli-norwegian, revision: main}\n", text)
    (tmp_path / "config.yaml").write_text(text)
    lines = lines_of(tmp_path / "config.yaml")
    assert "data      nli: needs the hub" in lines
    assert any("162 parameters: 0.sub_modules.query.0.weight" in line for line in lines)
    for revision, said in (
        ("main", ""),
        ("a" * 40, f" at {'a' * 40}"),
    ):  # a folder has no branch, but may be a commit's copy
        named = lines_of(tmp_path / "config.yaml", f"model.revision={revision}")
        assert f"model     inference-free-splade from {tmp_path / 'base'}{said}" in named
    for of_the_texts in ("model.head=fit", "model.vocabulary=texts"):
        lines = lines_of(tmp_path / "config.yaml", of_the_texts)
        assert "rates     needs the hub: the model is made from the training texts" in lines


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        (["training.max_steps=-1", "training.num_train_epochs=1"], 63, 1),  # three sets of ceil(162 / 8) = 21 batches
        (["training.max_steps=-1", "training.num_train_epochs=2"], 126, 2),
        (["training.max_steps=-1", "training.gradient_accumulation_steps=2"], 32, 1),
        (["training.max_steps=30"], 30, 30 / 63),
    ],
)
def test_steps_are_those_the_trainer_takes(tiny, overrides, steps, epochs):
    config = load_config(tiny, overrides).config
    progress = Progress(config, load_data(config))
    assert progress.steps == steps
    assert progress.epochs == pytest.approx(epochs)


@pytest.mark.slow
def test_the_padding_said_before_training_is_what_an_epoch_has(tiny):
    options = ("training.max_steps=-1", "training.eval_steps=100", "training.save_steps=100")
    loaded, lines = load_config(tiny, options), []
    train(loaded, Run.create(loaded), echo=lines.append)
    manifest = json.loads((tiny.parent / "models/tiny/run.json").read_text())
    planned = re.search(r"padding   (\d+)% of the positions", "\n".join(lines))
    share = int(planned[1])
    assert manifest["padding_share"] == pytest.approx(share / 100, abs=0.006)  # said in whole per cent
    assert 2 * share < int(re.search(r"padding   (\d+)%", "\n".join(lines_of(tiny, "datasets.length_window=1")))[1])
    assert f"{manifest['padding_share']:.0%} padding" in line_with(lines, "verdict")
    assert manifest["tokens_encoded"] < manifest["tokens_trained"]  # queries are looked up
    assert planned.group(0) in "\n".join(lines_of(tiny, *options))  # make check says the same of small sets


def test_the_planned_steps_are_taken_and_every_row_is_seen_in_an_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"anchor": f"hva er {i}", "positive": f"svaret er {i}", "negative": None if i % 3 else f"ikke {i}"}
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = TINY.replace("  quickstart: {}", "  mine: {source: rows.jsonl, eval_rows: 0}").replace(
        "max_steps: 6", "max_steps: -1"
    )
    (tmp_path / "mine.yaml").write_text(text)
    result = run_trainer(tmp_path, "train", "mine.yaml")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "models/mine/run.json").read_text())
    assert manifest["steps"] == manifest["steps_done"] == 2 + 3  # 10 triplets and 20 pairs in batches of 8
    assert manifest["datasets"]["mine"]["rows_seen"] == manifest["datasets"]["mine"]["rows_drawn"] == 30


def test_the_plan_for_a_gpu_is_that_of_a_gpu_on_a_machine_without_one_too(tiny):
    lines = lines_of(tiny, "hardware.device=cuda", "training.bf16=true")
    assert any(line.startswith("attention varlen, texts packed without padding, if") for line in lines)
    assert "padding   none: texts are packed (model.attention), so datasets.length_window has no effect" in lines


def test_what_a_run_is_prepared_with_cannot_be_changed_and_holds_the_lines_that_were_printed(tiny):
    loaded, printed = load_config(tiny), []
    prepared = prepare(loaded, Run.create(loaded), Start(), Decisions(printed.append))
    assert list(prepared.decisions) == printed
    assert printed[-1].startswith("result    the checkpoint with the highest mean nDCG@10")
    with pytest.raises(FrozenInstanceError):
        prepared.loss = None
    # `make check` says the same of what it makes too
    shared = set(printed) & set(lines_of(tiny))
    assert {line.split()[0] for line in shared} >= {"data", "search", "steps", "model", "head", "attention", "rates"}
