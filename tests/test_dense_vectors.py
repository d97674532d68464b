"""A frozen dense model under CSR encodes each different text once, and training reads its vectors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoints import write_dense
from tests.test_models import build_from, config_of
from trainer.config import load_config
from trainer.data import dense_vectors
from trainer.data.batches import text_ids
from trainer.data.dense_vectors import DenseVectors, let_vectors_pass, pays, texts_to_encode
from trainer.data.loading import load_data
from trainer.data.tokens import Tokeniser
from trainer.runs.run import Run
from trainer.training import prepare
from trainer.training.arguments import routes_of
from trainer.training.callbacks.throughput import Throughput
from trainer.training.prepare import Decisions, check
from trainer.training.progress import Progress
from trainer.training.train import train


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))


def csr(folder, *overrides):
    base = folder / "base"
    return config_of(folder, base / "dense" if base.exists() else write_dense(base), "csr", *overrides)


def tokenised(config):
    data = load_data(config)
    Progress(config, data).plan()
    model = build_from(config)
    data.tokenise(Tokeniser(model, routes_of(config), lambda line: None))
    return model, data


def trained(folder, monkeypatch, name, once=True):
    """Train for the 6 steps of a config in `folder`, and return the printed lines, the losses and the final weights.

    once: encode each text once, though in 6 steps that is more work.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(prepare, "pays", lambda *_: once)
    csr(folder)
    loaded, lines = load_config(folder / "config.yaml"), []
    run = Run.create(loaded, name)
    train(loaded, run, echo=lines.append)
    events = EventAccumulator(str(run.logs))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss/total")]
    return lines, losses, load_file(next(run.final.glob("*SparseAutoEncoder/model.safetensors")))


def test_vectors_are_those_that_the_dense_model_gives_for_the_texts_themselves(tmp_path):
    config = csr(tmp_path)
    model, data = tokenised(config)
    stock = SentenceTransformer(str(tmp_path / "base/dense"), device="cpu")
    found = 0
    for name, tokens in data.tokens.items():
        for column in DenseVectors(model, None).add_to(name, tokens).columns:
            expected = stock.encode(data.train[name][column.name][:40], show_progress_bar=False)
            vectors = column.features(np.arange(len(expected)))["sentence_embedding"]
            np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-5)
            found += 1
    assert found >= 2


@pytest.mark.slow
def test_a_run_that_reads_vectors_learns_what_a_run_that_encodes_every_batch_does(tmp_path, monkeypatch):
    lines, losses, weights = trained(tmp_path, monkeypatch, "once")
    others, expected, expected_weights = trained(tmp_path, monkeypatch, "each", once=False)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
    assert sum(line.startswith("vectors") for line in lines) == 1
    assert not any(line.startswith("padding") for line in lines)
    assert not any(line.startswith("vectors") for line in others)


@pytest.mark.slow
def test_a_second_run_finds_the_vectors_and_its_network_encodes_nothing(tmp_path, monkeypatch):
    _, losses, _ = trained(tmp_path, monkeypatch, "first")

    def never(*_):
        raise AssertionError("a text was encoded again")

    monkeypatch.setattr(DenseVectors, "_encode", never)
    _, again, _ = trained(tmp_path, monkeypatch, "second")
    assert again == losses


def test_a_killed_computation_goes_on_behind_the_files_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_vectors, "TEXTS_PER_FILE", 5)
    config = csr(tmp_path)
    model, data = tokenised(config)
    name, tokens = next(iter(data.tokens.items()))
    encode, calls = DenseVectors._encode, []

    def killed(self, texts, layout):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return encode(self, texts, layout)

    monkeypatch.setattr(DenseVectors, "_encode", killed)
    with pytest.raises(KeyboardInterrupt):
        DenseVectors(model, None).add_to(name, tokens)
    monkeypatch.setattr(DenseVectors, "_encode", lambda self, *rest: calls.append(0) or encode(self, *rest))
    vectors = DenseVectors(model, None)
    vectors.add_to(name, tokens)
    files = sum(-(-len(file) // 5) for file in {id(column.file): column.file for column in tokens.columns}.values())
    assert len(calls) == files  # two files before the kill, and the rest after it


def test_other_weights_texts_or_precision_have_other_vectors(tmp_path):
    config = csr(tmp_path)
    model, data = tokenised(config)
    name, tokens = next(iter(data.tokens.items()))
    DenseVectors(model, None).add_to(name, tokens)
    folder = tmp_path / "hub" / "nordsparse" / "dense"
    first, anchor = len(list(folder.iterdir())), data.train[name]["anchor"][0]
    model[0].model.register_buffer("scalar", torch.tensor(1.0))  # no dimension to view as bytes
    DenseVectors(model, torch.bfloat16).add_to(name, tokens)
    with torch.no_grad():
        next(model[0].parameters()).add_(0.5)
    DenseVectors(model, None).add_to(name, tokens)
    assert len(list(folder.iterdir())) == 3 * first
    other = data.train[name].map(lambda row: {"anchor": row["anchor"] + "!"} if row["anchor"] == anchor else {})
    tokeniser = Tokeniser(model, routes_of(config), lambda line: None)
    DenseVectors(model, None).add_to(name, tokeniser.rows(name, other, text_ids(other), "other"))
    assert len(list(folder.iterdir())) == 3 * first + 1  # both columns share a file
    model[0].model.config.layer_norm_eps = 0.5
    DenseVectors(model, None).add_to(name, tokens)
    assert len(list(folder.iterdir())) == 4 * first + 1


def test_vectors_are_made_only_where_that_is_less_work_and_the_dense_model_is_frozen(tmp_path, monkeypatch):
    for steps, expected in ((1, False), (200, True)):
        config = csr(tmp_path, f"training.max_steps={steps}")
        data = load_data(config)
        Progress(config, data).plan()
        different, drawn = texts_to_encode(config, data)
        # a set's last batch may be smaller, and its rows have two texts or three
        rows = steps * config.training.per_device_train_batch_size
        assert 0.9 * 2 * rows < drawn <= 3 * rows
        exact = sum(
            summary.rows_drawn * (2 * summary.pairs + 3 * summary.triplets) / summary.rows
            for summary in data.summaries.values()
        )
        assert drawn == pytest.approx(exact, abs=1)
        assert different == len({text for rows in data.train.values() for c in rows.column_names
                                 if c in ("anchor", "positive", "negative") for text in rows[c]})  # fmt: skip
        assert pays(different, drawn) is expected
    monkeypatch.setattr(dense_vectors, "processes", lambda: 2)
    assert not pays(*texts_to_encode(config, data))
    monkeypatch.setattr(dense_vectors, "processes", lambda: 1)
    assert pays(*texts_to_encode(config, data))
    trained_too = csr(tmp_path, "training.max_steps=200", "model.csr_train_base=true")
    assert not pays(*texts_to_encode(trained_too, data))


def test_check_says_so_and_encodes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    csr(tmp_path, "training.max_steps=200")
    monkeypatch.setattr(DenseVectors, "add_to", None)
    lines = []
    check(load_config(tmp_path / "config.yaml", ["training.max_steps=200"]), Decisions(lines.append))
    line = next(line for line in lines if line.startswith("vectors"))
    assert re.fullmatch(
        r"vectors   the frozen model encodes [\d,]+ different texts once, not [\d,]+ step by step", line
    )
    memory = next(line for line in lines if line.startswith("memory"))
    assert "activations" not in memory
    assert "vectors 0.0 GiB" in memory


def test_a_model_whose_modules_hand_vectors_on_still_encodes_texts(tmp_path):
    model = build_from(csr(tmp_path)).eval()
    texts = ["Fjellet er høyt.", "Vannet er dypt."]
    expected = model.encode_document(texts, convert_to_sparse_tensor=False)
    let_vectors_pass(model)
    assert torch.equal(model.encode_document(texts, convert_to_sparse_tensor=False), expected)
    vectors = SentenceTransformer(str(tmp_path / "base/dense"), device="cpu").encode(texts, convert_to_tensor=True)
    with torch.inference_mode():
        code = model({"sentence_embedding": vectors.clone()})["sentence_embedding"]
    torch.testing.assert_close(code, expected, atol=1e-5, rtol=1e-4)


def test_rows_of_vectors_are_counted_and_have_no_tokens():
    throughput = Throughput(clock=iter(range(10)).__next__)
    throughput.restart()
    throughput.add([{"sentence_embedding": torch.zeros(4, 8)}] * 3)
    assert throughput.read() == {"samples_per_second": 4.0, "tokens_per_second": 0.0, "padding_share": 0.0}


@pytest.mark.slow
def test_a_resumed_run_reads_the_same_vectors_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    _, _, whole = trained(tmp_path, monkeypatch, "whole")
    loaded = load_config(tmp_path / "config.yaml")
    run = Run.open(loaded, "whole")
    last = max(run.checkpoints.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in (last, run.final):
        folder.rename(tmp_path / folder.name)
    monkeypatch.setattr(DenseVectors, "_encode", None)  # the vectors are found
    train(loaded, run, resume=True, echo=lambda line: None)
    again = load_file(next(run.final.glob("*SparseAutoEncoder/model.safetensors")))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert json.loads(Path("models/whole/run.json").read_text())["status"] == "finished"
