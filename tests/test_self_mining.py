"""Negatives mined again with the model that is being trained."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from tests.conftest import TINY
from tests.test_mining import PASSAGES, QUESTIONS, table
from tests.test_models import build
from trainer.config import ConfigError, load_config
from trainer.config.schema import MiningConfig
from trainer.data.loading import load_data
from trainer.data.mining import fill_negatives, search_of, table_of
from trainer.data.negatives import count_negatives
from trainer.data.rows import Rows
from trainer.data.self_mining import ToMine
from trainer.runs.run import Run
from trainer.system.progress_bar import ProgressReport
from trainer.training import mining_rounds
from trainer.training.train import train
from trainer.training.trainer import SparseTrainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


def to_mine(rows, **settings):
    settings = MiningConfig(method="self", every=2, **({"range": [0, 20]} | settings))
    filled, _ = fill_negatives("mine", Rows(rows), [rows], settings)
    return ToMine(settings, filled.table, count_negatives(rows) == 0, search_of(rows, [rows]))


def mined_with(model, mine):
    with ProgressReport(desc="x", total=1, unit="texts") as progress:
        return mine.mine(model, 4, progress)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_negatives_are_what_the_model_ranks_highest_and_is_no_answer(tmp_path, margin):
    model = build(tmp_path, write_bert(tmp_path / "bert"), "splade").eval()
    mine = to_mine(table(QUERIES, DOCUMENTS), per_query=1, margin=margin)
    mined = mined_with(model, mine)
    queries, passages = (model.encode(texts).to_dense() for texts in (mine.search.queries, mine.search.passages))
    scores = (queries @ passages.T).numpy()
    for query, negative in zip(mined["query"].to_pylist(), mined["negative"].to_pylist(), strict=True):
        own = scores[query, mine.search.positives[query]].min()
        scores[query, mine.search.positives[query]] = -1
        scores[query, scores[query] > (np.inf if margin is None else (1 - margin) * own)] = -1
        best = int(scores[query].argmax())
        assert negative == (best if scores[query, best] > 0 else None)


def test_a_row_keeps_its_number_of_negatives_and_those_that_were_given():
    rows = table(QUESTIONS, [PASSAGES[number] for number in (0, 2, 3, 4, 5)], [None, "gitt", None, None, None])
    mine = to_mine(rows, per_query=2)
    counts = count_negatives(mine.rows)
    place = {text: number for number, text in enumerate(mine.search.passages)}
    query = mine.search.queries.index(QUESTIONS[0])
    first = [mine.rows[name][0].as_py() for name in ("negative", "negative2")]
    new = next(text for text in PASSAGES if text in place and text not in (*first, PASSAGES[0]))
    table_found = table_of([(query, [place[new]], 0)])
    found, changed = mine.with_mined(table_found)
    assert count_negatives(found).tolist() == counts.tolist()
    assert [found[name][0].as_py() for name in ("negative", "negative2")] == [new, first[0]]
    assert found["negative"][1].as_py() == "gitt"
    assert changed == 1


def config_text(**mine):
    settings = {"method": "self", "every": 2, "rounds": 2, "range": "[0, 20]", "per_query": 2} | mine
    words = ", ".join(f"{key}: {value}" for key, value in settings.items())
    last = TINY.replace("save_steps: 2", "save_steps: 2\n  load_best_model_at_end: false")
    return last.replace("quickstart: {}", f"quickstart: {{sets: [scandi_qa], mine: {{{words}}}}}")


def run_of(folder, name, text=None):
    (folder / f"{name}.yaml").write_text(text or config_text())
    loaded = load_config(folder / f"{name}.yaml")
    return loaded, Run.create(loaded)


def weights_of(run):
    return {file.relative_to(run.final): load_file(file) for file in run.final.rglob("*.safetensors")}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for file in one:
        for name, values in one[file].items():
            assert torch.equal(values, other[file][name]), (file, name)


def test_batches_hold_the_same_rows_after_a_later_mining(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(config_text())
    config = load_config(tmp_path / "tiny.yaml").config
    data, again = load_data(config), load_data(config)
    ((name, mine),) = again.to_mine.items()
    other = mine.search.passages[::-1]
    rows = mine.rows
    columns = [[other[number % 7] for number in range(len(rows))] for _ in range(2)]
    for column, texts in zip(("negative", "negative2"), columns, strict=True):
        place = rows.column_names.index(column)
        kept = [text if old is not None else None for text, old in zip(texts, rows[column].to_pylist(), strict=True)]
        rows = rows.set_column(place, column, [kept])
    again.replace_mined(name, rows, config)
    assert again.subsets == data.subsets
    for subset in data.subsets[name]:
        before, after = (each.batches(subset, config).batches(0) for each in (data, again))
        assert [batch.tolist() for batch in before] == [batch.tolist() for batch in after]
        assert again.train[subset]["anchor"] == data.train[subset]["anchor"]
    assert any(again.train[subset][:] != data.train[subset][:] for subset in data.subsets[name])


@pytest.mark.slow
def test_a_run_mines_between_its_steps_and_resumed_anywhere_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    loaded, whole = run_of(tmp_path, "whole")
    train(loaded, whole, echo=said.append)
    rounds = [line for line in said if line.startswith("mining")]
    assert [line.split(":")[1].strip() for line in rounds] == [
        "round 1 of 2, after step 2",
        "round 2 of 2, after step 4",
    ]
    assert any("mined again with the model after step 2, 4" in line for line in said)
    assert sum(line.startswith("data") for line in said) == 1  # a round repeats no line of the plan
    assert whole.manifest["steps_done"] == 6

    # without the rounds, other weights come out
    loaded, without = run_of(
        tmp_path, "without", config_text().replace("method: self, every: 2, rounds: 2,", "method: bm25,")
    )
    train(loaded, without, echo=said.append)
    assert whole.manifest["datasets"].keys() == without.manifest["datasets"].keys()
    with pytest.raises(AssertionError):
        assert_equal(weights_of(whole), weights_of(without))

    # killed before the first round's negatives are written, and in a step of the second round
    loaded, killed = run_of(tmp_path, "killed")
    step, mine = SparseTrainer.training_step, mining_rounds._mine

    def dies_at_five(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mining_rounds, "_mine", dies)
    with pytest.raises(KeyboardInterrupt):
        train(loaded, killed, echo=said.append)
    monkeypatch.setattr(mining_rounds, "_mine", mine)
    monkeypatch.setattr(SparseTrainer, "training_step", dies_at_five)
    with pytest.raises(KeyboardInterrupt):
        train(loaded, killed, resume=True, echo=said.append)
    monkeypatch.setattr(SparseTrainer, "training_step", step)
    monkeypatch.setattr(mining_rounds, "_mine", dies)  # both rounds are on disk
    train(loaded, killed, resume=True, echo=said.append)
    assert_equal(weights_of(whole), weights_of(killed))
    assert killed.manifest["rows_trained"] == whole.manifest["rows_trained"]

    # back at the first round: what the later model found is found again, and not read
    for step in (4, 6):
        shutil.rmtree(killed.checkpoints / f"checkpoint-{step}")
    mined = []
    monkeypatch.setattr(mining_rounds, "_mine", lambda *arguments: mined.append(1) or mine(*arguments))
    train(loaded, killed, resume=True, echo=said.append)
    assert len(mined) == 1
    assert_equal(weights_of(whole), weights_of(killed))


@pytest.mark.slow
def test_negatives_of_a_round_that_are_gone_stop_a_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded, run = run_of(tmp_path, "tiny", config_text(every=4, rounds=1).replace("save_steps: 2", "save_steps: 1")
                         .replace("eval_steps: 2", "eval_steps: 1"))  # fmt: skip
    step = SparseTrainer.training_step

    def dies_at_six(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SparseTrainer, "training_step", dies_at_six)
    with pytest.raises(KeyboardInterrupt):
        train(loaded, run, echo=lambda line: None)
    (file,) = (run.folder / "mined").glob("*.parquet")
    file.unlink()
    with pytest.raises(ConfigError, match=r"step-4.parquet is gone, which holds the negatives of this run"):
        train(loaded, run, resume=True, echo=lambda line: None)


@pytest.mark.parametrize(
    ("mine", "says"),
    [
        ("{method: self}", "mine.method' self needs 'datasets.quickstart.mine.every'"),
        ("{method: self, every: 3}", "mine.every' (3) must be a multiple of training.save_steps (2)"),
        ("{every: 2}", "mine.every' has no effect with method bm25"),
        ("{method: self, every: 2, model: ./m}", "mine.model' has no effect with method self"),
    ],
)
def test_settings_that_cannot_work_are_one_line(tmp_path, mine, says):
    (tmp_path / "my.yaml").write_text(TINY.replace("quickstart: {}", f"quickstart: {{mine: {mine}}}"))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "my.yaml")
    assert says in caught.value.format_message()


def test_with_gradcache_the_model_is_not_mined_with(tmp_path):
    (tmp_path / "my.yaml").write_text(config_text().replace("{type: splade", "{type: splade, cached: true"))
    with pytest.raises(ConfigError, match="is for SPLADE without GradCache"):
        load_config(tmp_path / "my.yaml")
