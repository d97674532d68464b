"""Passages of a batch that answer several queries: each goes through the network once, and no answer is a negative."""

import os
import re
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn

from tests.checkpoints import write_bert
from tests.conftest import TINY
from tests.test_forward_passes import SHARED, columns_of, tokens_of
from tests.test_tokens import built
from trainer.config import load_config
from trainer.config.errors import ConfigError
from trainer.data.batches import text_ids
from trainer.data.forward_passes import ForwardPasses
from trainer.data.further_queries import ROWS, FurtherQueries, SharedPassages, answers_of
from trainer.data.tokens import TokenCollator, Tokeniser
from trainer.data.training_data import SetSummary, TrainingData
from trainer.encoding.fuse import transformers_of
from trainer.losses.build import build_loss
from trainer.losses.ranking import RankingLoss
from trainer.losses.statistics import BatchStatistics
from trainer.models.build import set_dropout
from trainer.system.distributed import ending_together
from trainer.training.arguments import routes_of
from trainer.training.callbacks.throughput import Throughput
from trainer.training.memory import estimate_memory
from trainer.training.prepare import Decisions, check

FJELL, FJORD, BY, SJØ = "et fjell i Norge", "en fjord på Vestlandet", "byen ligger ved havet", "Mjøsa er en innsjø"
# (query, positive, negative); the fjord answers "hva er vann" too
ROWS_OF_TEXTS = [
    ("hvor er fjellet", FJELL, FJORD),  # 0
    ("hva er et fjell", FJELL, BY),  # 1
    ("hvilket land", FJELL, SJØ),  # 2
    ("hva er en fjord", FJORD, FJELL),  # 3
    ("hva er vann", FJORD, BY),  # 4
    ("hva er vann", SJØ, BY),  # 5
    ("hvor ligger byen", BY, SJØ),  # 6
    ("hvor er fjellet", FJELL, SJØ),  # 7: row 0 with another negative
    (BY, "en by ved sjøen", FJORD),  # 8: a paraphrase, whose query is another row's passage
    ("noe ved sjøen", "en by ved sjøen", SJØ),  # 9
]


def rows_of_texts(columns=("anchor", "positive", "negative")):
    table = {
        name: list(texts)
        for name, texts in zip(("anchor", "positive", "negative"), zip(*ROWS_OF_TEXTS, strict=True), strict=True)
    }
    return Dataset.from_dict({name: table[name] for name in columns})


def further(most, seed=0, rows=None):
    ids = text_ids(rows_of_texts() if rows is None else rows)
    return FurtherQueries(ids, ids[:, 1:], answers_of([ids]), most, seed)


def queries_of(found, batch):
    rows, targets = found.rows_for(np.array(batch))
    passages = [ROWS_OF_TEXTS[row][1] for row in batch] + [ROWS_OF_TEXTS[row][2] for row in batch]
    return [(ROWS_OF_TEXTS[row][0], passages[place]) for row, place in zip(rows, targets, strict=True)]


# ------------------------------------------------------------------------------------------- which queries
def test_a_passage_brings_the_queries_of_its_other_rows_and_a_negative_brings_its_own():
    found = queries_of(further(9), [0])  # FJELL is the positive, FJORD the negative
    assert Counter(found) == Counter(
        [("hva er et fjell", FJELL), ("hvilket land", FJELL), ("hva er en fjord", FJORD), ("hva er vann", FJORD)]
    )


def test_a_query_is_in_a_batch_once_though_it_stands_in_several_rows():
    for seed in range(20):
        found = queries_of(further(9, seed), [4, 6])  # "hva er vann" is asked, and the lake answers it, too
        asked = [query for query, _ in found] + ["hva er vann", "hvor ligger byen"]
        assert len(asked) == len(set(asked))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_passage_has_at_most_so_many_queries_its_own_row_counted(most):
    seen = set()
    for seed in range(20):
        count = Counter(passage for _, passage in queries_of(further(most, seed), [0, 6])) + Counter([FJELL, BY])
        assert max(count.values()) <= most
        seen |= set(count.values())
    assert max(seen) == most


def test_the_same_batch_has_the_same_queries_and_another_seed_others():
    draws = [queries_of(further(2, seed), [0, 6]) for seed in range(20)]
    assert draws == [queries_of(further(2, seed), [0, 6]) for seed in range(20)]
    assert len({tuple(draw) for draw in draws}) > 1


def test_only_queries_whose_own_window_is_read_come_along():
    ids = text_ids(rows_of_texts())
    read = ids[:, 1:].copy()
    read[1, 0] = read.max() + 1  # row 1 reads another part of the mountain's passage
    rows, _ = FurtherQueries(ids, read, answers_of([ids]), 9, 0).rows_for(np.array([6, 0]))
    assert 2 in rows
    assert 1 not in rows


# ------------------------------------------------------------------------------------------- the loss
def loss_by_hand(batch, columns, scores):
    """The mean over queries of -log softmax over the passages that do not answer it, and its own."""
    answers = {(query, positive) for query, positive, _ in ROWS_OF_TEXTS} | {(BY, BY)}
    rows, targets = further(9, rows=rows_of_texts(columns)).rows_for(np.array(batch))
    passages = [ROWS_OF_TEXTS[row][column] for column in range(1, len(columns)) for row in batch]
    losses = []
    for row, own in zip([*batch, *rows], [*range(len(batch)), *targets], strict=True):
        query = ROWS_OF_TEXTS[row][0]
        others = [n for n, text in enumerate(passages) if n == own or (query, text) not in answers]
        row_scores = scores([query], passages)[0]
        losses.append(float(torch.logsumexp(row_scores[others], 0) - row_scores[own]))
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("columns", [("anchor", "positive", "negative"), ("anchor", "positive")])
@pytest.mark.parametrize("passes", [ForwardPasses(), ForwardPasses(shared=True), SHARED])
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_the_loss_is_that_of_each_query_among_the_passages_that_do_not_answer_it(
    tmp_path, architecture, passes, columns
):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), architecture, "loss.scale=0.5")
    rows = rows_of_texts(columns)
    model.eval()
    tokens = replace(tokens_of(model, config, rows), further=further(9, rows=rows))

    def scores(queries, passages):
        return 0.5 * model.encode_query(queries).to_dense() @ model.encode_document(passages).to_dense().T

    # "hva er vann" has its other answer beside it; the paraphrase of a passage comes along with that passage beside it
    for batch in ([4, 0, 6], [4, 5], [9, 6]):
        features = columns_of(TokenCollator([tokens], passes)(batch))
        found = build_loss(config, model, BatchStatistics())(features)["base_loss"]
        expected, queries = loss_by_hand(batch, columns, scores)
        assert queries == len(features[0]["targets"]) > len(batch)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_without_further_queries_it_is_the_librarys_loss(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade")
    set_dropout(model.train(), 0.0)
    rows, found = rows_of_texts().select([0, 6]), []  # no query but those of the rows
    for most in (1, 9):
        tokens = tokens_of(model, config, rows)
        if most > 1:
            tokens = replace(tokens, further=further(most, rows=rows))
        features = columns_of(TokenCollator([tokens], SHARED)([0, 1]))
        assert (ROWS in features[0]) == (most > 1)
        model.zero_grad()
        loss = build_loss(config, model, BatchStatistics())(features)["base_loss"]
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0])


def test_every_passage_goes_through_the_network_once(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade")
    tokens = replace(tokens_of(model, config, rows_of_texts()), further=further(9))
    texts = []
    (network,) = transformers_of(model)
    network.register_forward_pre_hook(lambda _, inputs: texts.append(len(inputs[0]["input_ids"])))
    features = columns_of(TokenCollator([tokens], SHARED)([0, 6]))
    statistics = BatchStatistics()
    build_loss(config, model.train(), statistics)(features)
    assert sum(texts) == 4 == statistics.documents.texts
    assert len(features[0]["input_ids"]) == len(features[0]["targets"]) > 2
    throughput = Throughput({"query"})
    throughput.add(features)
    assert throughput.totals().rows == 2


def test_a_teacher_sees_the_rows_own_queries_alone(tmp_path):
    teacher = ["loss.teacher.model=a/b", "loss.teacher.kind=dense", "loss.teacher.revision=" + "a" * 40]
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade", *teacher)
    model.eval()
    rows = rows_of_texts().add_column("label", [[1.0, 0.5]] * len(ROWS_OF_TEXTS))
    found = []
    for most in (1, 9):
        tokens = tokens_of(model, config, rows)
        if most > 1:
            tokens = replace(tokens, further=further(most))
        features, labels = columns_of_both(TokenCollator([tokens], SHARED)([0, 6]))
        found.append(build_loss(config, model, BatchStatistics())(features, labels))
    torch.testing.assert_close(found[1]["distillation_loss"], found[0]["distillation_loss"])
    assert found[1]["base_loss"] != found[0]["base_loss"]


def columns_of_both(batch):
    from sentence_transformers.sparse_encoder import SparseEncoderTrainer

    return SparseEncoderTrainer.collect_features(None, batch)


# ------------------------------------------------------------------------------------------- several processes
WIDTH = 12


def shared_batch(rank):
    """Two rows of each process. The first process has a third query, which its own second passage answers, and the first
    passage of the other process."""
    generator, count = torch.Generator().manual_seed(rank), 3 - rank
    passages = torch.randn(2, WIDTH, generator=generator)
    queries = torch.randn(count, WIDTH, generator=generator)
    texts = torch.tensor([10, 11]) + 10 * rank
    answers = torch.tensor([[10 + 10 * rank, -1], [11 + 10 * rank, -1], [11, 20]])[:count]
    return queries, passages, SharedPassages(2, torch.tensor([0, 1, 1])[:count], answers, texts)


def ranking_loss(layer):
    from sentence_transformers import util

    return RankingLoss(layer, BatchStatistics(), 1.0, (util.dot_score, util.pairwise_dot_score), None)


def layer_of_all():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH)


def loss_of_a_process(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    limit = timedelta(minutes=1)
    with ending_together():
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", limit, rank=rank, world_size=2)
        layer = layer_of_all()
        model = nn.parallel.DistributedDataParallel(layer)
        queries, passages, shared = shared_batch(rank)
        vectors = model(torch.cat([queries, passages]))
        loss = ranking_loss(layer)._over_shared_passages(*vectors.split([len(queries), 2]), shared)
        loss.backward()
        torch.save([loss.detach(), layer.weight.grad], f"{folder}/{rank}.pt")
        torch.distributed.barrier()
        raise SystemExit(0)


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one_with_all_their_rows(tmp_path):
    started = torch.multiprocessing.spawn(loss_of_a_process, (str(tmp_path),), nprocs=2, join=False, daemon=True)
    assert any(started.join(timeout=90) for _ in range(2))
    parts, layer = [shared_batch(rank) for rank in (0, 1)], layer_of_all()
    queries, passages = (layer(torch.cat([part[place] for part in parts])) for place in (0, 1))
    both = SharedPassages(
        4,
        torch.cat([parts[0][2].targets, parts[1][2].targets + 2]),
        torch.cat([part[2].answers for part in parts]),
        torch.cat([part[2].passages for part in parts]),
    )
    whole = ranking_loss(layer)._over_shared_passages(queries, passages, both)
    whole.backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, whole.detach())
    for _, gradient in found:
        torch.testing.assert_close(gradient, layer.weight.grad)


# ------------------------------------------------------------------------------------------- in a config
CSR = [
    "model.architecture=csr",
    "loss.type=csr",
    "training.query_learning_rate=null",
    "loss.document_regularizer_weight=null",
]


def decisions_of(tmp_path, *overrides):
    (tmp_path / "a.yaml").write_text(TINY)
    lines = []
    check(load_config(tmp_path / "a.yaml", list(overrides)), Decisions(lines.append))
    return lines


def test_the_plan_says_how_many_queries_a_passage_has(tmp_path):
    lines = decisions_of(tmp_path, "datasets.queries_per_passage=3")
    found = [line for line in lines if line.endswith("for each passage of a batch, negatives too; at most 3")]
    assert all(re.fullmatch(r"queries   \w+: about \d\.\d for .*", line) for line in found)
    assert found


@pytest.mark.parametrize("is_tokenised", [True, False])
def test_queries_per_passage_are_counted_as_by_hand(tmp_path, is_tokenised):
    """The first two rows make a batch: one mountain and one fjord, each a positive and a negative of the other's row."""
    config, model = built(
        tmp_path, write_bert(tmp_path / "base"), "inference-free-splade", "datasets.queries_per_passage=3"
    )
    rows = rows_of_texts().select([1, 2, 3])  # no batch holds two of them
    summary = SetSummary("mine", 3, 3, 0, 0, {}, {}, {}, {}, "content")
    data = TrainingData(DatasetDict(mine=rows), DatasetDict(), {"mine": ["mine"]}, {"mine": summary})
    if is_tokenised:
        data.tokenise(Tokeniser(model, routes_of(config), print, keep=False), None, 3, 0)
    batches = [batch.tolist() for batch in data.batches("mine", config).batches(0)]
    # a batch is one row, (1) FJELL and BY, (2) FJELL and SJØ, (3) FJORD and FJELL: FJELL has two queries, FJORD one
    queries = {0: 2, 1: 2, 2: 3}
    expected = sum(queries[row] for batch in batches for row in batch) / sum(2 * len(batch) for batch in batches)
    assert data.queries_per_passage(config, "mine") == pytest.approx(expected)


def test_an_answer_in_a_sets_pairs_is_no_negative_of_its_triplets(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade")
    triplets = Dataset.from_dict({"anchor": ["hva", "hvor"], "positive": [FJELL, FJORD], "negative": [BY, SJØ]})
    pairs = Dataset.from_dict({"anchor": ["hva"], "positive": [FJORD]})
    summary = SetSummary("x", 3, 2, 1, 0, {}, {}, {}, {}, "content")
    data = TrainingData(
        DatasetDict({"x-t": triplets, "x-p": pairs}), DatasetDict(), {"x": ["x-t", "x-p"]}, {"x": summary}
    )
    data.tokenise(Tokeniser(model, routes_of(config), print, keep=False), None, 2, 0)
    features = data.tokens["x-t"].features([0, 1], SHARED)
    answers, passages = features["anchor_answers"][0], features["anchor_passages"]
    assert (answers.unsqueeze(1) == passages).any(0).tolist() == [True, True, False, False]  # FJELL, FJORD, BY, SJØ
    assert "for each passage of a batch" not in " ".join(decisions_of(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.cached=true"], "'loss.cached' exclude each other"),
        (CSR, "is for SPLADE, not for csr"),
    ],
)
def test_losses_that_cannot_share_passages_refuse_it(tmp_path, overrides, words):
    (tmp_path / "a.yaml").write_text(TINY)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "a.yaml", ["datasets.queries_per_passage=3", *overrides])


def test_queries_that_go_through_the_network_count_in_the_plans_memory(tmp_path):
    for architecture, texts in (("inference-free-splade", (12, 12)), ("splade", (18, 48))):
        found = []
        for most in (1, 3):
            overrides = [f"datasets.queries_per_passage={most}", "training.per_device_train_batch_size=6"]
            config, model = built(tmp_path, write_bert(tmp_path / f"{architecture}{most}"), architecture, *overrides)
            found.append(estimate_memory(config, 3, model).texts)
        assert tuple(found) == texts
