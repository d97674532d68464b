"""The estimate of a step's memory, against what a network is seen to keep and against numbers worked out by hand."""

import gc
import os
import re

import pytest
import torch

from tests.checkpoints import write_bert, write_roberta
from tests.standins import SHAPES, write_norbert
from tests.test_models import build_from, config_of
from tests.test_plan import line_with, lines_of
from tests.test_remote_code import PINNED
from trainer.encoding.fuse import fuse, transformers_of
from trainer.training.memory import activations_per_text

PLAIN = {"bert": write_bert, "roberta": write_roberta}


def kept_bytes(model, texts, precision):
    """What this many of the longest texts leave behind, counted with torch's own hooks."""
    transformer = transformers_of(model)[0]
    features = transformer.preprocess([" ".join(["og"] * 100)] * texts)
    assert features["input_ids"].shape == (texts, transformer.max_seq_length)
    weights, found = {p.data_ptr() for p in model.parameters()}, {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda each: found.setdefault(each.untyped_storage().data_ptr(), each), lambda each: each
    )
    with hooks, torch.autocast("cpu", precision, enabled=precision is not None):
        transformer.train()(features)
    return sum(each.untyped_storage().nbytes() for place, each in found.items() if place not in weights)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("family", [*PLAIN, *SHAPES])
def test_what_short_texts_keep_tells_what_long_ones_keep(tmp_path, family, precision):
    """NorBERT3 keeps numbers for each head and pair of tokens."""
    base = PLAIN[family](tmp_path / "base") if family in PLAIN else write_norbert(tmp_path / "base", family)
    model = build_from(config_of(tmp_path, base, "splade", *(() if family in PLAIN else PINNED)))
    fuse(model)
    seen = kept_bytes(model, 5, precision) - kept_bytes(model, 2, precision)
    assert 3 * activations_per_text(transformers_of(model)[0], 32, precision)[0] == pytest.approx(seen, rel=0.01)


def test_the_estimate_changes_neither_the_model_nor_the_random_numbers(tmp_path):
    model = build_from(config_of(tmp_path, write_bert(tmp_path / "base"), "splade"))
    transformer = transformers_of(model)[0].eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    activations_per_text(transformer, 32, None)
    assert not transformer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def graphs():
    """How many tensors hold on to what made them."""
    gc.collect()
    return sum(torch.is_tensor(each) and each.grad_fn is not None for each in gc.get_objects())


def test_the_estimate_leaves_no_graph_behind(tmp_path):
    model = build_from(config_of(tmp_path, write_bert(tmp_path / "base"), "splade"))
    before = graphs()
    activations_per_text(transformers_of(model)[0], 32, None)
    assert graphs() == before


@pytest.mark.filterwarnings("error")
def test_the_shortest_texts_can_be_tried(tmp_path):
    model = build_from(config_of(tmp_path, write_bert(tmp_path / "base"), "splade"))
    assert activations_per_text(transformers_of(model)[0], 8, None)[0] > 0


def parts_of(folder, *overrides):
    """Name of each part of the estimate and its GiB, as `make check` says it; the rest of the line."""
    line = line_with(lines_of(folder / "config.yaml", *overrides), "memory    ")
    return {name: float(size) for name, size in re.findall(r"(?:about |, )([a-z ]+) ([\d.]+) GiB", line)}, line


def test_the_memory_of_the_starter_shape_is_worked_out_by_hand(tmp_path):
    config = config_of(tmp_path, write_bert(tmp_path / "base"), "splade")
    parameters = sum(p.numel() for p in build_from(config).parameters())
    overrides = ["training.per_device_train_batch_size=10000", "training.max_seq_length=32"]
    parts, line = parts_of(tmp_path, *overrides)
    assert line.endswith(", for 30000 texts of 32 tokens per step")
    assert parts["weights and optimizer"] == pytest.approx(parameters * 16 / 2**30, abs=0.05)
    assert parts["head"] == 0.4  # 30,000 texts × 162 words × 4 bytes × 24 copies
    # 17 times the width of 32 in 4 bytes, 2 layers, 960,000 tokens: 3.9 GiB; dropout's bytes and the embeddings come to it
    assert 3.9 < parts["activations"] < 6.0
    stock, _ = parts_of(tmp_path, *overrides, "hardware.fused_head=false")
    assert stock["head"] == 2.3  # 30,000 texts × 32 tokens × 162 words × 4 bytes × 4 copies
    cached, line = parts_of(tmp_path, *overrides, "loss.cached=true", "loss.mini_batch_size=5000")
    assert "15000 texts" in line
    assert cached["activations"] == pytest.approx(parts["activations"] / 2, abs=0.1)


def test_checkpointing_keeps_one_layer_and_what_goes_into_each(tmp_path):
    config_of(tmp_path, write_bert(tmp_path / "base"), "splade")
    overrides = ["training.per_device_train_batch_size=10000", "training.max_seq_length=32"]
    whole, _ = parts_of(tmp_path, *overrides)
    found, _ = parts_of(tmp_path, *overrides, "hardware.gradient_checkpointing=true")
    into_layers = 30_000 * 32 * 2 * 32 * 4 / 2**30  # texts × tokens × layers × width × bytes
    assert found["activations"] == pytest.approx(whole["activations"] / 2 + into_layers, abs=0.1)


def test_what_may_not_fit_is_said_with_what_to_do(tmp_path):
    config_of(tmp_path, write_bert(tmp_path / "base"), "splade")
    rows = "training.per_device_train_batch_size=1000000"
    lines = lines_of(tmp_path / "config.yaml", rows)
    advice = lines[lines.index(line_with(lines, "memory    ")) + 1]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert advice.startswith(
        f"          there are {whole:.1f} GiB. If a batch of long texts does not fit, lower training.per_d"
    )
    said = float(re.search(r"or set hardware.gradient_checkpointing=true \(activations ([\d.]+) GiB\)$", advice)[1])
    found, _ = parts_of(tmp_path, rows, "hardware.gradient_checkpointing=true")
    assert said == found["activations"]
    assert "there are" not in "".join(lines_of(tmp_path / "config.yaml"))


def test_a_plan_for_another_machine_is_not_compared_with_this_one(tmp_path):
    config_of(tmp_path, write_bert(tmp_path / "base"), "splade")
    lines = lines_of(tmp_path / "config.yaml", "training.per_device_train_batch_size=1000000", "hardware.device=mps")
    assert "finds no such device" in line_with(lines, "device ")
    assert "there are" not in "".join(lines)
