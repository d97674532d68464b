import os
import signal
import time

import pytest
import torch
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from transformers import TrainerControl, TrainerState

from trainer.losses.statistics import BatchStatistics
from trainer.training.callbacks.progress import short
from trainer.training.callbacks.stop_on_signal import Interrupted, StopOnSignal
from trainer.training.callbacks.throughput import Throughput
from trainer.training.callbacks.watchdog import SIGNS, Watchdog


def vectors(rows, vocabulary, active):
    """[rows, vocabulary] with the given dims active in every row."""
    found = torch.zeros(rows, vocabulary)
    found[:, active] = 1.0
    return found


def healthy(rows=40, vocabulary=200):
    """Every document has five dims of its own, every query one."""
    documents, queries = torch.zeros(rows, vocabulary), torch.zeros(rows, vocabulary)
    for row in range(rows):
        documents[row, torch.arange(5) + 5 * (row % 40)] = 1.0
        queries[row, 5 * row % vocabulary] = 1.0
    return queries, documents


def warnings_of(queries, documents, step=50, steps=100, **found):
    statistics, said = BatchStatistics(), []
    statistics.add([queries, documents])
    watchdog = Watchdog(statistics, said.append)
    state = TrainerState(global_step=step, max_steps=steps)
    watchdog.on_log(None, state, TrainerControl(), logs={"loss": 1.0}, **found)
    return [warning["sign"] for warning in watchdog.warnings], said


def test_healthy_vectors_raise_no_warning():
    assert warnings_of(*healthy()) == ([], [])


@pytest.mark.parametrize(
    ("sign", "says"),
    [
        ("dense documents", "documents are dense: 100 active dims on average, 50% of the vocabulary"),
        ("empty queries", "a query has zero active dims"),
        ("empty documents", "documents have no active dims left"),
        ("a dim in every document", "dimension 7 is active in 100% of the documents"),
        ("documents alike", "documents look alike: their mean cosine is 0.9"),
    ],
)
def test_each_sign_of_collapse_is_named_with_its_step(sign, says):
    queries, documents = healthy()
    if sign == "dense documents":
        documents = (torch.rand(40, 200, generator=torch.Generator().manual_seed(0)).argsort(1) < 100).float()
    elif sign == "empty queries":
        queries[3] = 0
    elif sign == "empty documents":
        documents[1:] = 0
        documents[0] = 0
        documents[0, 5] = 1.0
    elif sign == "a dim in every document":
        documents[:, 7] = 0.01
    else:
        documents += 0.02 * vectors(40, 200, slice(0, 30))
        documents[:, :3] += 4.0
    signs, said = warnings_of(queries, documents)
    assert sign in signs
    line = next(line for line in said if says in line)
    assert line.startswith("Warning: step 50: ")


def test_the_advice_names_a_key_that_the_architecture_has():
    queries, documents = healthy()
    documents[:, 7] = 0.01
    csr = torch.nn.Sequential(SparseAutoEncoder(8, 200, k=4, k_aux=4))
    words = "Warning: step 50: dimension 7 is active in 100% of the documents, so it tells nothing apart. "
    assert warnings_of(queries, documents, model=csr)[1] == [words + "Lower model.csr_k"]
    splade = (
        "Train anew with loss.regularizer: df-flops; where it is set, raise loss.document_regularizer_weight or lower "
        "loss.target_document_dims"
    )
    assert warnings_of(queries, documents)[1] == [words + splade]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (1.23456, "1.235"),
        (0.0123, "0.012"),
        (0.00123, "0.0012"),
        (4.56e-7, "4.6e-07"),
        (0.0, "0.000"),
        (-2.5, "-2.500"),
    ],
)
def test_a_small_loss_is_not_shown_as_zero(loss, words):
    assert short(loss) == words


def test_a_sign_is_printed_once_and_its_last_step_kept():
    queries, documents = healthy()
    queries[0] = 0
    statistics, said = BatchStatistics(), []
    watchdog = Watchdog(statistics, said.append)
    for step in (40, 50, 60):
        statistics.add([queries, documents])
        watchdog.on_log(None, TrainerState(global_step=step, max_steps=100), None, logs={"loss": 1.0})
    assert len(said) == 1
    assert [(w["step"], w["last_step"]) for w in watchdog.warnings] == [(40, 60)]


def test_dense_documents_are_no_news_while_the_weight_is_warmed_up():
    queries, _ = healthy()
    assert warnings_of(queries, torch.ones(40, 200), step=30) == ([], [])
    assert warnings_of(queries, torch.ones(40, 200), step=40)[0]


def test_a_query_that_finds_nothing_is_news_at_any_step():
    queries, documents = healthy()
    queries[3] = 0
    assert warnings_of(queries, documents, step=1)[0] == ["empty queries"]


def test_all_five_signs_are_watched():
    assert {sign.name for sign in SIGNS} == {
        "dense documents",
        "empty queries",
        "empty documents",
        "a dim in every document",
        "documents alike",
    }


def test_statistics_equal_a_hand_worked_case():
    queries = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    positives = torch.tensor([[1.0, 1.0, 0, 0], [1.0, 0, 0, 0]])
    negatives = torch.tensor([[0, 0, 0, 0], [1.0, 1.0, 1.0, 0]])
    statistics = BatchStatistics()
    statistics.add([queries, positives, negatives])
    found = statistics.summary()
    assert found["query"]["active_dims_mean"] == 1
    assert found["document"]["active_dims_mean"] == (2 + 1 + 0 + 3) / 4
    assert found["document"]["never_active_share"] == 1 / 4
    assert found["document"]["busiest_dim_share"] == 3 / 4
    assert found["document"]["busiest_dim"] == 0
    # dims active in a query, times in a document: 1/2 · 3/4 + 1/2 · 2/4
    assert found["both"]["flops"] == pytest.approx(1 / 2 * 3 / 4 + 1 / 2 * 2 / 4)
    # mean document (3/4, 2/4, 1/4, 0), mean query (1/2, 1, 0, 0)
    assert found["both"]["document_flops_loss"] == pytest.approx((9 + 4 + 1) / 16)
    assert found["both"]["query_flops_loss"] == pytest.approx(1 / 4 + 1)
    assert found["both"]["document_cosine_mean"] == pytest.approx(1 / 2**0.5)
    statistics.reset()
    assert statistics.summary() == {}


# ------------------------------------------------------------------------------------------- throughput
def column(lengths, **task):
    """Features of texts with so many tokens each."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": mask, "attention_mask": mask, **task}


def test_padding_is_counted_where_it_costs_something():
    throughput = Throughput(static_routes={"query"})
    throughput.restart()
    throughput.add([column([1, 5], task="query"), column([2, 8], task="document"), column([3, 4], task="document")])
    # 16 and 8 positions for 10 and 7 tokens of documents
    assert throughput.read()["padding_share"] == pytest.approx(7 / 24)
    throughput.restart()
    assert (throughput.totals().rows, throughput.totals().tokens) == (2, 23)
    assert (throughput.totals().encoded, throughput.totals().padding) == (17, 7)
    throughput.add([column([3, 3])])
    assert throughput.read()["padding_share"] == 0  # of this interval
    everything = Throughput()
    everything.restart()
    everything.add([column([1, 5]), column([2, 8])])
    assert everything.read()["padding_share"] == pytest.approx(10 / 26)


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self):
        return self.now


def test_the_time_of_evaluating_and_saving_is_none_of_the_steps():
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.restart()
    for _ in range(2):
        throughput.add([column([3, 5])])
        clock.now += 2
        with throughput.paused():
            clock.now += 1000
    assert throughput.read()["samples_per_second"] == 4 / 4
    throughput.restart()
    throughput.add([column([3, 5])])
    clock.now += 1
    with pytest.raises(KeyboardInterrupt), throughput.paused():
        clock.now += 1000
        raise KeyboardInterrupt
    assert (throughput.totals().seconds, throughput.totals().rows) == (5, 6)


def test_before_the_first_step_no_time_is_counted():
    clock = Clock()
    throughput = Throughput(clock=clock)
    with throughput.paused():
        clock.now += 10
    clock.now += 10
    assert throughput.totals().seconds == 0


def test_a_signal_that_arrives_in_a_destructor_is_not_lost(capsys):
    class Slow:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass  # where Python handles the signal

    with pytest.raises(Interrupted), StopOnSignal():
        Slow()  # ends at once
        time.sleep(5)
    assert capsys.readouterr().err == ""  # no "Exception ignored in"
