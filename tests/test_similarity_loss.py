"""The part of CSR's loss that gives codes the similarities of their dense vectors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sentence_transformers.sparse_encoder.losses import CSRReconstructionLoss
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

from trainer.losses.reconstruction import SharedReconstructionLoss

ROWS, WIDTH, DIMS = 6, 8, 32


def loss_with(weight, temperature=0.05, scale=20.0):
    settings = SimpleNamespace(beta=0.1, similarity_weight=weight, similarity_temperature=temperature)
    return SharedReconstructionLoss(None, settings, scale)


@pytest.fixture
def outputs():
    """What an autoencoder makes of queries, positives and negatives."""
    torch.manual_seed(1)
    autoencoder = SparseAutoEncoder(WIDTH, DIMS, k=4, k_aux=8)
    return [autoencoder({"sentence_embedding": torch.randn(ROWS, WIDTH)}) for _ in range(3)]


def cosines(outputs, name):
    queries, *passages = (output[name].detach().numpy().astype(np.float64) for output in outputs)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (queries, np.concatenate(passages))]
    return unit[0] @ unit[1].T


def test_it_is_the_divergence_of_the_codes_softmax_from_the_dense_vectors(outputs):
    teacher = log_softmax(cosines(outputs, "sentence_embedding_backbone") / 0.05, axis=1)
    student = log_softmax(cosines(outputs, "sentence_embedding") * 20.0, axis=1)
    expected = (np.exp(teacher) * (teacher - student)).sum(1).mean()
    found = loss_with(0.7).compute_loss_from_embeddings(outputs)
    assert found["similarity_loss"].item() == pytest.approx(0.7 * expected, rel=1e-4)
    assert expected > 0.1


def test_without_a_weight_the_loss_is_the_librarys(outputs):
    ours = loss_with(0.0).compute_loss_from_embeddings(outputs)
    stock = CSRReconstructionLoss(None, beta=0.1).compute_loss_from_embeddings(outputs)
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_codes_with_the_similarities_of_their_vectors_lose_nothing(outputs):
    alike = [output | {"sentence_embedding": output["sentence_embedding_backbone"]} for output in outputs]
    found = loss_with(1.0, temperature=0.05, scale=20.0).compute_loss_from_embeddings(alike)
    assert found["similarity_loss"].item() == pytest.approx(0, abs=1e-6)


def test_a_step_down_its_gradient_makes_the_codes_more_alike(outputs):
    autoencoder, loss = SparseAutoEncoder(WIDTH, DIMS, k=8, k_aux=8), loss_with(1.0)
    texts = [output["sentence_embedding_backbone"].detach() for output in outputs]
    optimizer, losses = torch.optim.Adam(autoencoder.parameters(), lr=0.01), []
    for _ in range(60):
        found = loss.compute_loss_from_embeddings([autoencoder({"sentence_embedding": text}) for text in texts])
        losses.append(found["similarity_loss"].item())
        optimizer.zero_grad()
        found["similarity_loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_the_dense_vectors_are_the_teacher_and_learn_nothing_from_it(outputs):
    for output in outputs:
        for name in ("sentence_embedding_backbone", "sentence_embedding"):
            output[name] = output[name].detach().requires_grad_()
    loss_with(1.0).compute_loss_from_embeddings(outputs)["similarity_loss"].backward()
    assert all(output["sentence_embedding_backbone"].grad is None for output in outputs)
    assert all(output["sentence_embedding"].grad.abs().sum() > 0 for output in outputs)
