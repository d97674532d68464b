"""Encoding to sparse rows: the vectors that stock sentence-transformers gives."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense, write_roberta
from tests.test_models import build, dense_vectors
from trainer.config import ConfigError
from trainer.encoding.encode import encode, static_queries
from trainer.encoding.fuse import fuse
from trainer.models.build import static_embedding


@pytest.fixture(scope="module")
def inference_free(tmp_path_factory):
    """A WordPiece and a byte-level model."""
    found = {}
    for name, write in (("bert", write_bert), ("roberta", write_roberta)):
        folder = tmp_path_factory.mktemp(name)
        found[name] = build(folder, write(folder / "base"), "inference-free-splade")
    return found


@pytest.mark.parametrize("family", ["bert", "roberta"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=5))
def test_static_queries_are_the_librarys_for_any_text(inference_free, family, texts):
    model = inference_free[family]
    expected = dense_vectors(model, texts, "query").detach().numpy()
    for found in (encode(model, texts, "query", 2), *(encode(model, texts[:1], "query", 1) for _ in range(2))):
        assert np.array_equal(found.toarray(), expected[: found.shape[0]])
        assert found.has_sorted_indices and 0.0 not in found.data


def test_a_static_query_is_cut_where_the_librarys_is(inference_free):
    model = inference_free["bert"]
    long = " ".join(QUERIES * 50)
    words = len(model.tokenizer(long, add_special_tokens=False, truncation=False)["input_ids"])
    assert words > static_embedding(model).tokenizer.model_max_length
    expected = dense_vectors(model, [long], "query").detach().numpy()
    assert np.array_equal(encode(model, [long], "query", 1).toarray(), expected)


def test_static_queries_follow_weights_that_were_trained_since(inference_free):
    model = inference_free["bert"]
    before = encode(model, QUERIES, "query", 8)
    with torch.no_grad():
        static_embedding(model).weight.mul_(2)
    np.testing.assert_array_equal(encode(model, QUERIES, "query", 8).toarray(), 2 * before.toarray())


def test_queries_with_a_prompt_or_a_limit_of_dims_go_through_the_library(inference_free, tmp_path):
    model = inference_free["roberta"]
    model.max_active_dims = 3
    try:
        assert static_queries(model) is None
        assert encode(model, QUERIES, "query", 2).getnnz(axis=1).max() <= 3
    finally:
        model.max_active_dims = None
    assert static_queries(model) is not None


@pytest.mark.parametrize("architecture", ["splade", "csr"])
def test_rows_come_back_in_the_order_of_the_texts_whatever_the_batches(tmp_path, architecture):
    base = write_dense(tmp_path / "base") if architecture == "csr" else write_bert(tmp_path / "base")
    model = build(tmp_path, base, architecture)
    texts = [*DOCUMENTS, "og", "", *QUERIES, "mjøsa " * 40]
    expected = dense_vectors(model, texts).numpy()
    fuse(model)
    for batch_size in (1, 3, 100):
        found = encode(model, texts, "document", batch_size)
        np.testing.assert_allclose(found.toarray(), expected, rtol=1e-4, atol=1e-5)
        assert found.dtype == np.float32


def test_a_vector_that_is_not_finite_is_refused_with_its_text(tmp_path):
    model = build(tmp_path, write_bert(tmp_path / "base"), "splade")
    fuse(model)
    with torch.no_grad():
        model[0].model.get_output_embeddings().bias[7] = torch.nan
    with pytest.raises(ConfigError, match=f"the model's vector of this document is not finite: '{DOCUMENTS[1][:20]}"):
        encode(model, DOCUMENTS[1:2], "document", 4)


def test_no_more_dense_vectors_are_held_than_those_of_one_batch(tmp_path, monkeypatch):
    model = build(tmp_path, write_bert(tmp_path / "base"), "splade")
    seen = []
    original = model.encode_document

    def watched(texts, **options):
        seen.append(len(texts))
        return original(texts, **options)

    monkeypatch.setattr(model, "encode_document", watched)
    encode(model, DOCUMENTS * 20, "document", 4)
    assert max(seen) == 4 and sum(seen) == len(DOCUMENTS) * 20
