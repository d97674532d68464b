import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from evaluate.bm25 import BM25
from evaluate.latency import latency_lines, measure_latency
from evaluate.passage_vectors import PassageVectors
from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from trainer.config import ConfigError
from trainer.encoding.inverted_index import InvertedIndex
from trainer.system.device import peak_memory_gib


class Clock:
    """Moves by what the stand-ins add, and by a nanosecond per look, so that nothing takes no time."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        self.seconds += 1e-9
        return self.seconds


class Slow(torch.nn.Module):
    """'tekst 7' takes 7 ms as a query and half a second as a document; its vector is 7 in the first of 3 dims."""

    similarity_fn_name, device = "dot", torch.device("cpu")

    def __init__(self, clock, first_call_seconds=0.0):
        super().__init__()
        self.clock, self.late = clock, first_call_seconds

    def _vectors(self, texts, seconds):
        self.clock.seconds += seconds + self.late
        self.late = 0.0
        return torch.tensor([[number_of(text), 0.0, 0.0] for text in texts])

    def __iter__(self):
        return iter(())  # no module of it is looked at

    def encode_query(self, texts, **options):
        assert len(texts) == 1
        return self._vectors(texts, number_of(texts[0]) / 1000)

    def encode_document(self, texts, **options):
        return self._vectors(texts, len(texts) / 2)


def slow(clock, batch_size=32, first_call_seconds=0.0):
    return PassageVectors(Slow(clock, first_call_seconds), batch_size, clock)


@pytest.fixture
def clock():
    return Clock()


def number_of(text):
    return float(text.split()[1])


def numbered(count):
    """'tekst 1' to 'tekst <count>', mixed."""
    return [f"tekst {number}" for number in np.random.default_rng(0).permutation(count) + 1]


def test_query_percentiles_are_numpys_of_the_single_durations(clock):
    queries = numbered(150)
    values = measure_latency(slow(clock), queries, numbered(2), None, clock=clock)
    p50, p95, p99 = np.percentile(np.arange(1, 151), [50, 95, 99])
    assert values["model"]["query_encoding_ms"] == pytest.approx({"p50": p50, "p95": p95, "p99": p99})
    assert values["queries"] == 150


def test_the_first_calls_are_not_timed(clock):
    values = measure_latency(slow(clock, first_call_seconds=9.0), numbered(20), numbered(2), None, clock=clock)
    assert values["model"]["query_encoding_ms"]["p99"] < 20


def test_at_most_two_hundred_queries_are_measured(clock):
    values = measure_latency(slow(clock), sorted(numbered(300), key=number_of), numbered(1), None, clock=clock)
    assert values["queries"] == 200
    assert values["model"]["query_encoding_ms"]["p50"] == pytest.approx(100.5)


def test_documents_per_second_are_those_of_the_encoder(clock):
    values = measure_latency(slow(clock, batch_size=2), numbered(1), numbered(10), None, clock=clock)
    assert values["passages"] == 10
    assert values["model"]["documents_per_second"] == pytest.approx(2.0)


def test_searches_are_timed_one_query_at_a_time_and_bm25_in_the_given_language(clock, monkeypatch):
    seen, search, bm25_search = {}, InvertedIndex.search, BM25.search_texts

    def slow_search(self, queries, depth):
        seen["model"] = (queries.shape[0], depth)
        clock.seconds += 0.003
        return search(self, queries, depth)

    def slow_bm25(self, texts, depth):
        seen["bm25"] = (len(texts), depth)
        clock.seconds += 0.007
        return bm25_search(self, texts, depth)

    def slow_index(self, texts, language):
        seen["language"] = language
        clock.seconds += 0.25
        return index(self, texts, language)

    index = BM25.index_texts
    monkeypatch.setattr(InvertedIndex, "search", slow_search)
    monkeypatch.setattr(BM25, "search_texts", slow_bm25)
    monkeypatch.setattr(BM25, "index_texts", slow_index)
    values = measure_latency(slow(clock), numbered(5), numbered(12), "nob", clock=clock)
    assert seen == {"model": (1, 10), "bm25": (1, 10), "language": "nob"}
    assert values["model"]["search_ms"] == pytest.approx({"p50": 3, "p95": 3, "p99": 3})
    assert values["bm25"]["search_ms"] == pytest.approx({"p50": 7, "p95": 7, "p99": 7})
    assert values["bm25"]["index_documents_per_second"] == pytest.approx(12 / 0.25)


def test_index_bytes_are_those_of_the_postings_of_both(clock):
    values = measure_latency(slow(clock), numbered(1), numbered(12), "nob", clock=clock)
    # weight and passage of each posting, and where each dimension starts: 3 dims, of which one is in use
    assert values["model"]["index_bytes"] == 12 * (4 + 4) + (3 + 1) * 4
    # 'tekst' in all 12; '10', '11' and '12' in one each; BM25 does not take a single digit for a word. 8 B per start
    assert values["bm25"]["index_bytes"] == 15 * (4 + 4) + (4 + 1) * 8


def test_measuring_without_texts_is_an_error_of_one_line(clock):
    with pytest.raises(ConfigError, match="0 queries and 1 passages"):
        measure_latency(slow(clock), [], numbered(1), None)


def test_peak_memory_is_in_gib():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("only Linux tells it in a second way")
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    # the kernel counts the larger of this process and the one it was forked from
    assert kib / 2**20 * 0.95 < peak_memory_gib("cpu") < kib / 2**20 * 20


def test_a_real_model_is_measured_beside_bm25(tmp_path):
    model = SparseEncoder(str(write_bert(tmp_path)), device="cpu")
    values = measure_latency(PassageVectors(model, 32), QUERIES, DOCUMENTS, "nob")
    assert json.loads(json.dumps(values)) == values
    assert (values["passages"], values["queries"], values["device"]) == (4, 4, "cpu")
    assert values["threads"] == torch.get_num_threads()
    for times in (values["model"]["query_encoding_ms"], values["model"]["search_ms"], values["bm25"]["search_ms"]):
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
    lines = "\n".join(latency_lines(values))
    assert f"query encoding {values['model']['query_encoding_ms']['p50']:.2f} ms" in lines
    assert f"BM25: search {values['bm25']['search_ms']['p50']:.2f} ms" in lines
    assert "4 queries one at a time, 4 passages" in lines
