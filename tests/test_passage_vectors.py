"""Passages go through the network once in an evaluation, however many parts of it need their vectors."""

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from evaluate import passage_vectors as module
from evaluate.passage_vectors import PassageVectors
from evaluate.session import Session
from evaluate.subject import open_subject
from evaluate.terms import SAMPLES
from tests.checkpoints import DOCUMENTS, write_bert


@pytest.fixture
def model(tmp_path):
    return SparseEncoder(str(write_bert(tmp_path / "bert")), device="cpu")


@pytest.fixture
def read(monkeypatch):
    """The texts that went through the document route, in order."""
    texts, library = [], SparseEncoder.encode_document

    def counted(self, inputs, **options):
        texts.extend(inputs)
        return library(self, inputs, **options)

    monkeypatch.setattr(SparseEncoder, "encode_document", counted)
    return texts


def stock(model, texts):
    return model.encode_document(texts, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()


def test_vectors_are_the_librarys_in_the_order_asked_for(model):
    vectors, asked = PassageVectors(model, 2), [DOCUMENTS[3], DOCUMENTS[0], DOCUMENTS[3]]
    expected = stock(model, asked)
    vectors.encode(DOCUMENTS[:2], "first")
    for _ in range(2):
        np.testing.assert_allclose(vectors.encode(asked, "again").toarray(), expected, atol=1e-5)
    assert (expected > 0).sum() > 3


def test_a_text_is_encoded_once_and_the_first_batch_of_all_once_more(model, read):
    vectors = PassageVectors(model, 2)
    vectors.encode(DOCUMENTS[:3], "first")
    assert sorted(read) == sorted([*DOCUMENTS[:2], *DOCUMENTS[:3]])
    read.clear()
    vectors.encode([*DOCUMENTS, *DOCUMENTS], "again")
    assert read == DOCUMENTS[3:]
    assert vectors.encoded == len(DOCUMENTS)


def test_texts_beyond_the_limit_are_encoded_again(model, read, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    vectors = PassageVectors(model, 2)
    vectors.encode(DOCUMENTS, "first")
    read.clear()
    found = vectors.encode(DOCUMENTS, "again")
    assert sorted(read) == sorted(DOCUMENTS[2:])
    torch.testing.assert_close(torch.tensor(found.toarray()), torch.tensor(stock(model, DOCUMENTS)))


def test_scores_sparsity_and_latency_of_one_evaluation_read_each_passage_once(trained, folder, read):
    session = Session(open_subject("tiny.yaml", None), f"{folder}:no", None, 32, lambda line: None)
    session.score()
    session.measure_sparsity()
    session.measure_latency()
    first_batch = DOCUMENTS  # which is all of them here
    assert sorted(read) == sorted([*first_batch, *DOCUMENTS, *SAMPLES["document"]])
