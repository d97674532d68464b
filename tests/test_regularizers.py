import os
from datetime import timedelta

import pytest
import torch
from sentence_transformers.sparse_encoder.losses import FlopsLoss
from torch import nn

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from tests.test_models import build, config_of
from trainer.losses.build import build_loss
from trainer.losses.regularizers import Regularizer, document_frequency_price, flops, idf_flops, l1, over_cap
from trainer.losses.statistics import BatchStatistics
from trainer.system.distributed import ending_together

WIDTH, VOCABULARY = 8, 40


def rows(count, seed):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def encoder():
    """A layer whose outputs are sparse vectors; the same weights every time."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY)
    return layer.train()


def settled(layer, function=flops, cap=None):
    """A penalty whose running mean is that of 16 earlier rows."""
    penalty = Regularizer(layer, function, cap)
    penalty.compute_loss_from_embeddings(layer(rows(16, seed=1)).relu())
    penalty.finish_step()
    return penalty


def gradient_in_parts(batch, parts):
    """Gradient of the weight after as many backward passes, each divided by their number, as the trainer does."""
    layer = encoder()
    penalty = settled(layer)
    for part in batch.chunk(parts):
        (penalty.compute_loss_from_embeddings(layer(part).relu()) / parts).backward()
    return layer.weight.grad, penalty


def gradient_of_a_process(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    limit = timedelta(minutes=1)
    with ending_together():  # gloo's threads may outlive Python, which then aborts or waits for ever
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", limit, rank=rank, world_size=2)
        layer = encoder()
        penalty = Regularizer(layer, flops)
        model = nn.parallel.DistributedDataParallel(layer)
        penalty.compute_loss_from_embeddings(layer(rows(16, seed=1).chunk(2)[rank]).relu())
        penalty.finish_step()
        penalty.compute_loss_from_embeddings(model(rows(16, seed=2).chunk(2)[rank]).relu()).backward()
        step = penalty.finish_step()
        torch.save([layer.weight.grad, penalty.running, step.active_dims], f"{folder}/{rank}.pt")
        torch.distributed.barrier()
        raise SystemExit(0)


# ------------------------------------------------------------------------------------------- one gradient however it is cut
def test_four_accumulated_batches_of_4_have_the_gradient_of_one_of_16():
    whole, penalty = gradient_in_parts(rows(16, seed=2), parts=1)
    parts, in_parts = gradient_in_parts(rows(16, seed=2), parts=4)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert whole.abs().max() > 0.01
    one, four = penalty.finish_step(), in_parts.finish_step()
    assert (one.rows, four.rows) == (16, 16)
    assert one.active_dims == pytest.approx(four.active_dims)
    torch.testing.assert_close(in_parts.running, penalty.running)


@pytest.mark.slow
def test_two_processes_with_8_rows_have_the_gradient_of_one_with_16(tmp_path):
    started = torch.multiprocessing.spawn(gradient_of_a_process, (str(tmp_path),), nprocs=2, join=False, daemon=True)
    assert any(started.join(timeout=90) for _ in range(2))  # each returns when one more has ended
    whole, penalty = gradient_in_parts(rows(16, seed=2), parts=1)
    step = penalty.finish_step()
    for rank in (0, 1):
        gradient, running, active_dims = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(gradient, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(running, penalty.running)
        assert active_dims == pytest.approx(step.active_dims)


def test_cached_mini_batches_have_the_gradient_of_the_whole_batch(tmp_path):
    bert = write_bert(tmp_path / "bert")
    found = []
    for overrides in ([], ["loss.cached=true", "loss.mini_batch_size=1"]):
        model = build(tmp_path, bert, "splade")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss = build_loss(config_of(tmp_path, bert, "splade", *overrides), model, BatchStatistics())
        loss.document_regularizer_weight = loss.query_regularizer_weight = 1.0
        loss.loss.scale = 0.0  # what is left are the penalties
        model.train()
        for _ in range(2):
            model.zero_grad()
            features = [model.preprocess(texts) for texts in (QUERIES, DOCUMENTS)]
            sum(loss(features).values()).backward()
            for penalty in (loss.document_regularizer, loss.query_regularizer):
                penalty.finish_step()
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert max(gradient.abs().max() for gradient in found[0].values()) > 0.01
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_the_expected_gradient_is_that_of_the_whole_set_for_every_batch_size():
    data, layer = rows(64, seed=3), encoder()
    penalty = Regularizer(layer, flops)
    penalty.compute_loss_from_embeddings(layer(data).relu())
    penalty.finish_step()
    stock = FlopsLoss(layer)
    exact = torch.autograd.grad(layer(data).relu().mean(0).square().sum(), layer.weight)[0]
    for size in (4, 16, 64):
        ours, theirs = (
            torch.stack(
                [
                    torch.autograd.grad(loss.compute_loss_from_embeddings(layer(part).relu()), layer.weight)[0]
                    for part in data.split(size)
                ]
            ).mean(0)
            for loss in (penalty, stock)
        )
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
        # the opposite: the square of a batch's own mean is larger the smaller the batch
        assert torch.allclose(theirs, exact, rtol=0.05) == (size == 64)


# ------------------------------------------------------------------------------------------- the penalties
def test_the_value_is_flops_where_the_batch_is_like_those_before():
    layer = encoder()
    penalty = settled(layer)
    same = layer(rows(16, seed=1)).relu()
    value = penalty.compute_loss_from_embeddings(same)
    assert value.item() == pytest.approx(FlopsLoss(layer).compute_loss_from_embeddings(same).item(), rel=1e-5)


def test_each_penalty_equals_a_hand_worked_case():
    mean = torch.tensor([2.0, 0.5, 0.0])
    assert flops(mean) == 4.25
    assert l1(mean) == 2.5
    # a word with half the IDF of the rarest costs twice
    assert idf_flops(torch.tensor([4.0, 8.0, 8.0]))(mean) == 2 * 4 + 0.25
    vectors = torch.tensor([[1.0, 1.0, 1.0, 0], [1.0, 0, 0, 0], [0, 3.0, 3.0, 0]])
    assert over_cap(vectors, 2).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_df_flops_charges_words_by_the_share_of_vectors_with_them():
    shares = torch.tensor([1.0, 0.1, 0.05, 0.0])
    # 1 / (1 + (x^log_0.1(2) - 1)^10): 1 at x = 1, 1/2 at 0.1, 1 / (1 + 1.46^10) at 0.05, 0 at 0; above a twentieth
    expected = [1.0, 0.525, 0.05 + 0.95 / (1 + (20**0.30103 - 1) ** 10), 0.05]
    torch.testing.assert_close(document_frequency_price(shares), torch.tensor(expected), rtol=1e-4, atol=0)
    penalty = Regularizer(nn.Identity().train(), flops, price=document_frequency_price)
    vectors = torch.zeros(20, 3)
    vectors[:, 0], vectors[:2, 1], vectors[0, 2] = 0.5, 5.0, 10.0  # each 0.5 on average, in 20, 2 and 1 of the texts
    for _ in range(2):
        given = vectors.clone().requires_grad_()
        value = penalty.compute_loss_from_embeddings(given)
        step = penalty.finish_step()
    value.backward()
    assert penalty.share.tolist() == pytest.approx([1.0, 0.1, 0.05])
    assert (step.rows, step.active_dims) == (20, pytest.approx(23 / 20))
    assert step.penalty == pytest.approx(0.25 * sum(expected[:3]))
    torch.testing.assert_close(given.grad[0], torch.tensor(expected[:3]) * 2 * 0.5 / 20, rtol=1e-4, atol=0)
    again = Regularizer(nn.Linear(1, 1), flops, price=document_frequency_price)
    again.model.device = torch.device("cpu")
    again.load(penalty.state())
    assert torch.equal(again.share, penalty.share)


def test_df_flops_keeps_its_shares_over_accumulated_batches():
    whole, parts = (Regularizer(encoder(), flops, price=document_frequency_price) for _ in range(2))
    batch = rows(16, seed=1)
    whole.compute_loss_from_embeddings(whole.model(batch).relu())
    for part in batch.chunk(4):
        parts.compute_loss_from_embeddings(parts.model(part).relu())
    one, four = whole.finish_step(), parts.finish_step()
    torch.testing.assert_close(parts.share, whole.share)
    assert one.penalty == pytest.approx(four.penalty)


def test_l1_has_the_same_gradient_from_the_first_step_on():
    layer = encoder()
    batch = rows(16, seed=2)
    penalty = Regularizer(layer, l1)
    for _ in range(2):
        found = torch.autograd.grad(penalty.compute_loss_from_embeddings(layer(batch).relu()), layer.weight)[0]
        exact = torch.autograd.grad(layer(batch).relu().sum() / 16, layer.weight)[0]
        torch.testing.assert_close(found, exact)
        penalty.compute_loss_from_embeddings(layer(rows(16, seed=1)).relu())
        penalty.finish_step()


def test_documents_within_the_cap_are_left_alone():
    layer = encoder()
    vectors = layer(rows(16, seed=1)).relu()
    dims = (vectors > 0).sum(1)
    cap = int(dims.float().median())
    penalty = settled(layer, cap=cap)
    given = vectors.detach().requires_grad_()
    penalty.compute_loss_from_embeddings(given).backward()
    pressed = given.grad.abs().sum(1) > 0
    assert pressed.tolist() == (dims > cap).tolist()
    assert 0 < pressed.sum() < 16
    # all documents count in what the controller measures
    assert penalty.finish_step().active_dims == pytest.approx(dims.float().mean().item())


def test_evaluation_leaves_no_trace():
    layer = encoder()
    penalty = settled(layer)
    layer.eval()
    with torch.no_grad():
        first = penalty.compute_loss_from_embeddings(layer(rows(16, seed=2)).relu())
        again = penalty.compute_loss_from_embeddings(layer(rows(16, seed=2)).relu())
    assert first == again
    assert penalty._sums is None


def test_idf_flops_presses_common_words_of_the_training_documents_harder(tmp_path):
    from trainer.models.build import document_idf

    bert = write_bert(tmp_path / "bert")
    config = config_of(tmp_path, bert, "inference-free-splade", "loss.regularizer=idf-flops")
    model = build(tmp_path, bert, "inference-free-splade")
    idf = document_idf(config, model, lambda: DOCUMENTS)
    loss = build_loss(config, model, BatchStatistics(), idf)
    penalty = loss.document_regularizer
    common, rare = model.tokenizer.convert_tokens_to_ids([".", "fjord"])
    penalty.running = torch.ones(len(idf))
    vectors = torch.ones(2, len(idf), requires_grad=True)
    penalty.compute_loss_from_embeddings(vectors).backward()
    # "." is in all four documents, "fjord" in one: ln(1 + .5 / 4.5) and ln(1 + 3.5 / 1.5)
    assert (vectors.grad[0, common] / vectors.grad[0, rare]).item() == pytest.approx(1.20397 / 0.105361, rel=1e-4)
