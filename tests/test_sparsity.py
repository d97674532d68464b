import json
from itertools import pairwise
from math import log2

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

from evaluate import sparsity
from evaluate.passage_vectors import PassageVectors
from evaluate.sparsity import describe, measure_sparsity, prune, sparsity_lines
from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from trainer.config import ConfigError

# Texts are their own vectors, so that every figure can be worked out from what stands here.
WRITTEN_QUERIES = {"a": "1 0 0 0 0 0", "b": "0 1 1 0 0 0"}
WRITTEN_PASSAGES = {"p": "4 3.5 0 0 0 0", "q": "0 1 3 4 0 0", "r": "0 5 0 0 0 0", "s": "0 1 1 1 1 0"}
RELEVANT = {"a": {"p": 1}, "b": {"q": 1}}


class Words:
    """A tokenizer of six words."""

    def __len__(self):
        return 6

    def convert_ids_to_tokens(self, number):
        return ["i", "og", "##en", "hav", "båt", "fjord"][number]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)


class Written(torch.nn.Module):
    """A model that reads a text's vector from the text."""

    def __init__(self, similarity="dot"):
        super().__init__()
        self.similarity_fn_name, self.tokenizer = similarity, Words()

    def encode_query(self, texts, **options):
        return torch.tensor([[float(weight) for weight in text.split()] for text in texts])

    encode_document = encode_query

    def __iter__(self):
        return iter(())  # no module of it is looked at


def measure(relevant=None, similarity="dot", passages=WRITTEN_PASSAGES):
    return measure_sparsity(PassageVectors(Written(similarity), 32), WRITTEN_QUERIES, passages, relevant)


@pytest.fixture
def pruned_to_two(monkeypatch):
    monkeypatch.setattr(sparsity, "PRUNED_TO", (2, None))


@pytest.fixture(scope="module")
def splade(tmp_path_factory):
    return SparseEncoder(str(write_bert(tmp_path_factory.mktemp("bert"))), device="cpu")


# ---------------------------------------------------------------------------------------------- by hand
def test_a_routes_figures_equal_those_of_four_hand_written_passages():
    # active dims 2, 3, 1 and 4; dimension 5 in none
    found = measure()["routes"]["document"]
    assert found["texts"] == 4
    assert found["active_dims"] == {"mean": 2.5, "p50": 2.5, "p95": pytest.approx(3.85), "max": 4}
    assert found["never_active_share"] == pytest.approx(1 / 6)
    assert found["histogram"] == {"edges": [1, 2, 3, 4, 5], "counts": [1, 1, 1, 1]}
    assert [(row["dimension"], row["term"], row["share"]) for row in found["most_frequent"]] == [
        (1, "og", 1.0),
        (2, "en", 0.5),
        (3, "hav", 0.5),
        (0, "i", 0.25),
        (4, "båt", 0.25),
    ]


def test_queries_and_documents_are_described_apart():
    routes = measure()["routes"]
    assert routes["query"]["active_dims"]["mean"] == 1.5
    assert routes["query"]["never_active_share"] == 0.5
    assert "index_bytes" in routes["document"] and "index_bytes" not in routes["query"]


def test_flops_are_the_products_of_a_pair_on_average():
    # counted pair by pair: a meets p in 1 dim; b meets p in 1, q in 2, r in 1, s in 2
    assert measure()["flops"] == pytest.approx((1 + 1 + 2 + 1 + 2) / 8)


def test_pruning_to_two_dims_gives_the_figures_worked_out_by_hand(pruned_to_two):
    # p keeps 0 1; q keeps 2 3; r keeps 1; s keeps 1 2 of four equal weights. Then b finds r 5, p 3.5, q 3, s 2
    # instead of r 5, q 4, p 3.5, s 2, and a finds p alone
    two, whole = measure(RELEVANT)["pruned"]
    assert two == {
        "max_active_dims": 2,
        "query_active_dims": 1.5,
        "document_active_dims": 1.75,
        "index_bytes": 7 * (4 + 4) + 7 * 4,  # weight and passage of each posting, and 6 + 1 starts of dimensions
        "flops": pytest.approx((1 + 1 + 1 + 1 + 2) / 8),
        "ndcg_at_10": pytest.approx((1 + 1 / log2(4)) / 2),
    }
    assert whole["max_active_dims"] is None
    assert whole["document_active_dims"] == 2.5
    assert whole["index_bytes"] == 10 * (4 + 4) + 7 * 4
    assert whole["ndcg_at_10"] == pytest.approx((1 + 1 / log2(3)) / 2)


def test_a_model_that_compares_by_cosine_is_searched_by_cosine(pruned_to_two):
    # b: r 5 / 5, s 2 / 2, q 4 / 5.1, p 3.5 / 5.3. Equal scores are ordered by descending id, so s before r; q is third
    assert measure(RELEVANT, "cosine")["pruned"][-1]["ndcg_at_10"] == pytest.approx((1 + 1 / log2(4)) / 2)


def test_a_query_is_searched_in_its_own_part_alone_and_the_mean_is_over_the_parts(pruned_to_two):
    queries = {"x/a": "1 0 0 0 0 0", "x/b": "1 0 0 0 0 0", "y/c": "1 0 0 0 0 0"}
    passages = {"x/p": "1 0 0 0 0 0", "x/q": "2 0 0 0 0 0", "y/r": "0.5 0 0 0 0 0"}
    relevant = {"x/a": {"x/p": 1}, "x/b": {"x/q": 1}, "y/c": {"y/r": 1}}
    found = measure_sparsity(
        PassageVectors(Written(), 32), queries, passages, relevant, part_of=lambda text_id: text_id[0]
    )
    # in x, p is second for a and q is first for b; in y, r is first: pooled, it would be third
    assert found["pruned"][-1]["ndcg_at_10"] == pytest.approx(((1 / log2(3) + 1) / 2 + 1) / 2)
    pooled = measure_sparsity(PassageVectors(Written(), 32), queries, passages, relevant)
    assert pooled["pruned"][-1]["ndcg_at_10"] == pytest.approx((1 / log2(3) + 1 + 1 / log2(4)) / 3)


def test_without_relevance_there_is_no_ndcg():
    values = measure()
    assert values["judged_queries"] == 0
    assert all("ndcg_at_10" not in row for row in values["pruned"])


def test_only_relevance_within_the_given_passages_counts():
    elsewhere = {"a": {"p": 1, "gone": 1}, "b": {"gone": 1}, "unknown": {"p": 1}}
    values = measure(elsewhere)
    assert values["judged_queries"] == 1
    assert values["pruned"][-1]["ndcg_at_10"] == 1
    assert measure({"b": {"gone": 1}})["judged_queries"] == 0
    assert measure({"b": {"q": 0}})["judged_queries"] == 0


def test_every_step_of_pruning_is_measured_and_all_values_are_json():
    values = measure(RELEVANT)
    assert [row["max_active_dims"] for row in values["pruned"]] == [4, 8, 16, 32, 64, 128, 256, None]
    assert json.loads(json.dumps(values)) == values


def test_measuring_without_texts_is_an_error_of_one_line():
    with pytest.raises(ConfigError, match="2 queries and 0 passages"):
        measure(passages={})


def test_the_lines_name_both_routes_their_terms_and_every_step():
    lines = list(sparsity_lines(measure(RELEVANT)))
    assert lines[0].startswith(
        "sparsity    query: 2 active dims (p50 2, p95 2, max 2) of 6 in 2 texts; 50% of dims never"
    )
    assert lines[3].endswith("in most texts: og 100%, en 50%, hav 50%, i 25%, båt 25%")
    assert "2 queries, each within its task's part of these 4 passages" in lines[4]
    assert [line.split()[0] for line in lines[5:]] == ["4", "8", "16", "32", "64", "128", "256", "all"]
    assert lines[-1].endswith(f"0.88   {(1 + 1 / log2(3)) / 2:.4f}")


@pytest.mark.parametrize("dims", [5, 400])
def test_every_text_falls_into_a_bin_of_a_histogram_of_few_equal_bins(dims):
    vectors = sp.random(200, dims, density=0.5, format="csr", dtype=np.float32, random_state=1)
    active = (vectors.toarray() != 0).sum(1)
    found = describe(vectors, Written())["histogram"]
    edges, counts = found["edges"], found["counts"]
    assert len(counts) <= 40 and len(set(np.diff(edges))) == 1
    assert counts == [int(((active >= low) & (active < high)).sum()) for low, high in pairwise(edges)]
    assert sum(counts) == 200


# ------------------------------------------------------------------------------- sentence-transformers' own
def test_active_dims_are_what_the_library_counts(splade):
    values = measure_sparsity(PassageVectors(splade, 32), dict(enumerate(QUERIES)), dict(enumerate(DOCUMENTS)))
    for route, texts in (("query", QUERIES), ("document", DOCUMENTS)):
        expected = SparseEncoder.sparsity(splade.encode(texts, show_progress_bar=False))["active_dims"]
        assert values["routes"][route]["active_dims"]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 8, 64])
def test_pruned_vectors_are_those_of_max_active_dims(splade, count):
    options = {"show_progress_bar": False, "convert_to_sparse_tensor": False}
    whole = splade.encode(DOCUMENTS, **options).numpy()
    expected = splade.encode(DOCUMENTS, max_active_dims=count, **options).numpy()
    assert ((expected != 0).sum(1) < (whole != 0).sum(1)).any()
    np.testing.assert_array_equal(prune(sp.csr_matrix(whole), count).toarray(), expected)


def test_pruning_keeps_large_negative_weights_and_texts_without_any():
    vectors = sp.csr_matrix([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    np.testing.assert_array_equal(prune(vectors, 2).toarray(), [[0, -3, 2], [0, 0, 0], [0, 5, 0]])


def test_a_csr_models_busiest_dimensions_have_no_terms(tmp_path):
    transformer = Transformer(str(write_bert(tmp_path)))
    autoencoder = SparseAutoEncoder(input_dim=32, hidden_dim=64, k=8, k_aux=8)
    model = SparseEncoder(modules=[transformer, Pooling(32, "mean"), autoencoder], device="cpu")
    values = measure_sparsity(PassageVectors(model, 32), dict(enumerate(QUERIES)), dict(enumerate(DOCUMENTS)))
    assert values["dimensions"] == 64
    assert values["routes"]["document"]["active_dims"]["max"] <= 8
    busiest = values["routes"]["document"]["most_frequent"][0]
    assert busiest["term"] == f"dimension {busiest['dimension']}"
