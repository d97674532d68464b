from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState

from tests.checkpoints import DOCUMENTS, write_dense
from tests.conftest import run_trainer
from tests.test_models import build, config_of, dense_vectors
from tests.test_training import RUN, assert_same_weights
from trainer.models.build import autoencoder_of
from trainer.training.callbacks.active_dims_annealing import ActiveDimsAnnealing, k_at
from trainer.training.callbacks.dead_dim_reviver import DeadDimReviver


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"))


def test_k_falls_by_equal_factors_and_then_stays(tmp_path, dense):
    config = config_of(tmp_path, dense, "csr", "model.csr_k=4", "model.csr_k_start=16")
    assert [k_at(step, 80, config) for step in (0, 20, 40, 60, 80)] == [16, 8, 4, 4, 4]
    config = config_of(tmp_path, dense, "csr", "model.csr_k=4")
    assert {k_at(step, 80, config) for step in range(80)} == {4}


@pytest.fixture
def config(tmp_path, dense):
    return config_of(tmp_path, dense, "csr", "model.csr_k=4", "model.csr_k_start=16", "model.csr_revive_steps=2")


@pytest.fixture
def autoencoder(tmp_path, dense):
    return autoencoder_of(build(tmp_path, dense, "csr", "model.csr_k=4"))


@pytest.fixture
def reviver(autoencoder, config):
    return DeadDimReviver(autoencoder, SimpleNamespace(residuals=None), config)


def test_every_evaluation_and_checkpoint_has_the_final_k(autoencoder, config):
    annealing = ActiveDimsAnnealing(autoencoder, config)
    state = TrainerState(global_step=0, max_steps=80)
    annealing.on_step_begin(None, state, None)
    assert autoencoder.k == 16
    state.global_step = 1
    annealing.on_step_end(None, state, None)
    assert autoencoder.k == 4
    assert autoencoder.get_config_dict()["k"] == 4


def test_dead_dims_point_at_what_is_explained_worst_and_the_optimizer_forgets_them(reviver):
    code = reviver.autoencoder
    optimizer = torch.optim.AdamW([code.encoder.weight, code.latent_bias])
    for parameter in (code.encoder.weight, code.latent_bias):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = code.encoder.weight.detach().clone()
    code.stats_last_nonzero[[3, 7, 9]] = code.dead_threshold + 1
    small, large = torch.zeros(32), torch.zeros(32)
    small[0], large[1] = 0.1, -2.0
    reviver.loss.residuals = torch.stack([small, large])
    reviver.revive(optimizer)
    # two texts: the first two dead dims; the worst text first
    direction = torch.nn.functional.normalize(code.encoder.weight.detach(), dim=1)
    assert direction[3, 1] == -1
    assert direction[7, 0] == 1
    assert reviver.dead().nonzero().tolist() == [[9]]
    assert reviver.revived == 2
    others = [row for row in range(64) if row not in (3, 7)]
    assert torch.equal(code.encoder.weight[others], before[others])
    for parameter in (code.encoder.weight, code.latent_bias):
        memory = optimizer.state[parameter]["exp_avg"]
        assert memory[[3, 7]].abs().max() == 0
        assert memory[others].abs().min() > 0


def test_a_dim_that_never_fired_fires_after_it_was_revived(reviver):
    code = reviver.autoencoder
    texts = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        code.latent_bias[:32] = -1e3
        code.latent_bias[32:] = 0
    code.train()

    def codes():
        return code({"sentence_embedding": texts})

    for _ in range(20):
        found = codes()
    assert reviver.dead()[:32].all()
    dead = int(reviver.dead().sum())
    reviver.loss.residuals = (found["sentence_embedding_backbone"] - found["decoded_embedding_k"]).detach()
    reviver.revive(torch.optim.AdamW(code.parameters()))
    active = (codes()["sentence_embedding"] > 0).any(0)
    assert active[:16].sum() > 8
    assert int(reviver.dead().sum()) == dead - 16


def test_a_code_cut_to_fewer_dims_is_the_code_of_that_k(tmp_path, dense):
    import scipy.sparse as sp

    from evaluate.sparsity import PRUNED_TO, prune

    assert PRUNED_TO[:7] == (4, 8, 16, 32, 64, 128, 256)
    model = build(tmp_path, dense, "csr", "model.csr_k=16")
    whole = sp.csr_matrix(dense_vectors(model, DOCUMENTS).numpy())
    for k in (4, 8):
        cut = model.encode_document(
            DOCUMENTS, max_active_dims=k, convert_to_sparse_tensor=False, show_progress_bar=False
        )
        torch.testing.assert_close(torch.tensor(prune(whole, k).toarray()), cut, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_a_run_anneals_revives_logs_and_resumes_to_the_last_bit(tmp_path, dense, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    options = ("model.csr_k=4", "model.csr_k_start=16", "model.csr_revive_steps=2")
    config_of(tmp_path, dense, "csr", *options)
    (tmp_path / "config.yaml").rename(tmp_path / "tiny.yaml")
    result = run_trainer(tmp_path, "train", "tiny.yaml")
    assert result.returncode == 0, result.stderr
    events = EventAccumulator(str(tmp_path / RUN / "logs"))
    events.Reload()
    assert [event.value for event in events.Scalars("csr/k")] == [16, 10, 6, 4, 4, 4]
    assert len(events.Scalars("csr/dead_share")) == 6
    shutil.copytree(tmp_path / RUN, tmp_path / "whole")
    for part in ("checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "final"):
        shutil.rmtree(tmp_path / RUN / part)
    result = run_trainer(tmp_path, "train", "tiny.yaml", "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / RUN / "checkpoints/checkpoint-6", tmp_path / "whole/checkpoints/checkpoint-6")


def test_a_start_that_is_smaller_than_the_end_is_one_line(tmp_path, dense):
    from trainer.config import ConfigError

    with pytest.raises(ConfigError, match=r"must lie between csr_k \(8\) and a quarter of csr_hidden_dim \(64\)"):
        config_of(tmp_path, dense, "csr", "model.csr_k_start=4")
