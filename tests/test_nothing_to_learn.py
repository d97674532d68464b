"""Pairs that are compared with nothing: said before the first step, and refused where there is nothing else to train on."""

import json

import pytest
import torch
from sentence_transformers import util

from tests.conftest import TINY, run_trainer
from tests.test_plan import decisions_of
from trainer.config import ConfigError, load_config
from trainer.data.loading import load_data
from trainer.losses.ranking import RankingLoss
from trainer.losses.statistics import BatchStatistics
from trainer.training.describe import lonely_pairs_lines


def config_of(folder, rows, *overrides, file="rows.jsonl", source="eval_rows: 0"):
    (folder / file).write_text("\n".join(map(json.dumps, rows)))
    text = TINY.replace("  quickstart: {}", f"  mine: {{source: {folder / file}, {source}}}")
    (folder / "mine.yaml").write_text(text)
    return load_config(folder / "mine.yaml", overrides)


def pairs(count, **shared):
    return [{"anchor": f"spørsmål {i}", "positive": f"svar {i}"} | shared for i in range(count)]


def triplets(count):
    return [row | {"negative": f"noe annet {i}"} for i, row in enumerate(pairs(count))]


def losses(config):
    """The library's contrastive loss of every batch of a first pass, each text having a random vector."""
    data, found = load_data(config), []
    vectors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    loss = RankingLoss(
        torch.nn.Identity().eval(), BatchStatistics(), 1.0, (util.dot_score, util.pairwise_dot_score), None
    )
    for half, rows in data.train.items():
        for batch in data.batches(half, config).batches(0):
            columns = [rows[batch.tolist()][role] for role in rows.column_names]
            embedded = [
                torch.stack([vectors.setdefault(text, torch.rand(8, generator=generator)) for text in column])
                for column in columns
            ]
            found.append(loss.compute_loss_from_embeddings(embedded).item())
    return found


@pytest.mark.parametrize(
    ("rows", "batch_size"),
    [
        (pairs(7), 2),  # an odd row is left over
        (pairs(8), 2),
        (pairs(6, positive="ett og samme svar") + pairs(3), 4),
        (triplets(3) + pairs(7), 2),
        (triplets(4), 1),
    ],
)
def test_batches_are_said_to_teach_nothing_exactly_where_the_loss_is_0(tmp_path, rows, batch_size):
    config = config_of(tmp_path, rows, f"training.per_device_train_batch_size={batch_size}").config
    data = load_data(config)
    said = sum(data.batches_of_one(half, config)[0] for half in data.train)
    assert said == losses(config).count(0.0)
    warnings = [line for line in lonely_pairs_lines(config, data) if line.startswith("Warning: mine")]
    assert (said > 0) == bool(warnings)


@pytest.mark.parametrize(
    ("rows", "overrides", "advice"),
    [
        (pairs(24), ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"], "2 or more"),
        (pairs(24, positive="ett og samme svar"), [], "rows that share neither query nor passage"),
        (pairs(24, anchor="ett og samme spørsmål"), ["loss.cached=true"], "rows that share neither query nor passage"),
        (pairs(1), [], "Add negatives"),
    ],
)
def test_a_set_with_nothing_to_learn_from_is_refused_by_check_and_train(tmp_path, monkeypatch, rows, overrides, advice):
    monkeypatch.chdir(tmp_path)
    loaded = config_of(tmp_path, rows, *overrides)
    assert set(losses(loaded.config)) == {0.0}
    with pytest.raises(ConfigError, match=f"nothing to learn from.*{advice}"):
        decisions_of(loaded)
    if overrides:
        options = [part for override in overrides for part in ("--set", override)]
        result = run_trainer(tmp_path, "train", "mine.yaml", *options)
        assert result.returncode == 2
        assert result.stderr.strip().startswith("Error: there is nothing to learn from")
        assert not list((tmp_path / "models/mine/checkpoints").glob("*"))


def test_pairs_of_several_processes_are_compared_together(tmp_path, monkeypatch):
    config = config_of(tmp_path, pairs(24), "training.per_device_train_batch_size=1").config
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(lonely_pairs_lines(config, load_data(config))) == []


def test_what_a_csr_model_learns_from_single_pairs_is_reconstruction_alone_so_it_is_a_warning(tmp_path):
    overrides = ["model.architecture=csr", "loss.type=csr", "loss.document_regularizer_weight=null"]
    overrides += ["training.per_device_train_batch_size=1", "training.query_learning_rate=null"]
    config = config_of(tmp_path, pairs(8), *overrides).config
    assert ["8 of 8 batches (100.0%)" in line for line in lonely_pairs_lines(config, load_data(config))] == [True]
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"gamma": 0.0})})
    assert list(lonely_pairs_lines(config, load_data(config))) == []


def test_held_out_pairs_that_are_alone_are_said_to_have_no_evaluation_loss(tmp_path):
    config = config_of(tmp_path, pairs(40), "training.per_device_eval_batch_size=1", source="eval_rows: 4").config
    lines = list(lonely_pairs_lines(config, load_data(config)))
    assert len(lines) == 1
    assert "the evaluation loss is 0 in 4 of 4 batches" in lines[0]
