"""A batch's passages in passes of about one length: the same loss, less padding."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.sparse_encoder import SparseEncoderTrainer
from sentence_transformers.sparse_encoder.losses import SpladeLoss as StockSpladeLoss

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from tests.conftest import TINY
from tests.test_attention import GPU, flash  # noqa: F401
from tests.test_tokens import TEXTS, built, triplets
from trainer.config import load_config
from trainer.data.batches import text_ids
from trainer.data.buckets import bucket_lengths
from trainer.data.forward_passes import CPU_POSITIONS, ForwardPasses, forward_passes_of, padding
from trainer.data.loading import load_data
from trainer.data.tokens import PLACE, TokenCollator, Tokeniser
from trainer.encoding.fuse import transformers_of
from trainer.losses.build import build_loss
from trainer.losses.splade import SpladeLoss, embed
from trainer.losses.statistics import BatchStatistics
from trainer.models.attention import choose_attention
from trainer.models.build import build_model, fetch_base_model
from trainer.training.arguments import routes_of
from trainer.training.callbacks.throughput import Throughput

SHARED = ForwardPasses(shared=True, positions=24)


def columns_of(batch):
    """The features of each pass or column, as the library's trainer finds them in a batch."""
    return SparseEncoderTrainer.collect_features(None, batch)[0]


def tokens_of(model, config, rows):
    return Tokeniser(model, routes_of(config), print).rows("a", rows, text_ids(rows), "content")


# ------------------------------------------------------------------------------------------- the pieces
def test_each_text_is_in_one_pass_and_only_the_last_pass_is_not_full():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 60, rng.integers(1, 40))
        passes = ForwardPasses(shared=True, positions=100).split(lengths)
        assert sorted(np.concatenate(passes).tolist()) == list(range(len(lengths)))
        filled = [len(texts) * lengths[texts].max() for texts in passes]
        for texts, positions in zip(passes, filled, strict=True):
            assert positions - lengths[texts].max() < 100  # one text fewer would not fill it
        assert all(positions >= 100 for positions in filled[:-1])
        for long, short in pairwise(passes):
            assert lengths[long].min() >= lengths[short].max()


def test_without_a_limit_all_passages_are_one_pass_in_their_order():
    assert [texts.tolist() for texts in ForwardPasses(shared=True).split(np.array([3, 9, 1]))] == [[0, 1, 2]]


def test_padding_is_counted_as_a_loop_would():
    rng = np.random.default_rng(0)
    for processes, rounded in ((1, None), (2, None), (3, [16, 64, 256])):
        lengths = rng.integers(1, 200, (60, 3))
        batches = np.split(rng.permutation(60), [12, 30, 36])
        tokens = by_column = together = 0

        def positions(found, rounded=rounded):
            longest = max(found)
            return len(found) * min(n for n in rounded or [longest] if n >= longest)

        for part in (part for batch in batches for part in np.split(batch, processes)):
            query, *passages = ([lengths[row, column] for row in part] for column in range(3))
            tokens += sum(query) + sum(map(sum, passages))
            by_column += positions(query) + sum(map(positions, passages))
            together += positions(query) + positions([*passages[0], *passages[1]])
        each = ForwardPasses(lengths=rounded)
        one = ForwardPasses(lengths=rounded, shared=True)
        assert padding(batches, lengths, 2, each, processes) == (tokens, by_column)
        assert padding(batches, lengths, 2, one, processes) == (tokens, together)


def test_padding_of_shared_passes_counted_by_hand():
    lengths = np.array([[5, 9], [2, 3]])  # passes of 9, 5; then 3, 2
    assert padding([np.array([0, 1])], lengths, 2, ForwardPasses(shared=True, positions=10)) == (19, 18 + 6)
    assert padding([np.array([0, 1])], lengths, 2, ForwardPasses(shared=True, positions=9)) == (19, 9 + 10 + 2)


@pytest.mark.parametrize(
    ("device", "overrides", "expected"),
    [
        ("cpu", [], ForwardPasses(None, True, CPU_POSITIONS)),
        ("mps", [], ForwardPasses(None, True, None)),
        ("cuda", [], ForwardPasses([16, 32, 48, 64, 70], True, None)),
        ("cuda", ["training.max_seq_length=64"], ForwardPasses([16, 32, 48, 64], True, None)),
        ("cuda", ["training.max_seq_length=10"], ForwardPasses([10], True, None)),
        # few shapes: each is compiled
        ("cpu", ["training.torch_compile=true"], ForwardPasses(bucket_lengths(70), True, None)),
        ("cuda", ["training.torch_compile=true"], ForwardPasses(bucket_lengths(70), True, None)),
        # GradCache cuts columns into parts by itself
        ("cpu", ["loss.cached=true"], ForwardPasses(None, False, CPU_POSITIONS)),
    ],
)
def test_how_a_config_cuts_its_batches_on_each_device(tmp_path, device, overrides, expected):
    (tmp_path / "a.yaml").write_text(TINY)
    config = load_config(tmp_path / "a.yaml", ["training.max_seq_length=70", *overrides]).config
    assert forward_passes_of(config, device) == expected


def test_csr_keeps_its_columns_apart():
    assert not forward_passes_of(load_config(Path("configs/training_config_csr.yaml")).config, "cpu").shared


def test_rows_are_batched_by_their_longest_passage(tmp_path):
    (tmp_path / "a.yaml").write_text(TINY)
    config = load_config(tmp_path / "a.yaml").config
    data = load_data(config)
    half = next(half for half, rows in data.train.items() if "negative" in rows.column_names)
    model = build_model(config, fetch_base_model(config), data.queries(), data.passages(), "cpu")
    data.tokenise(Tokeniser(model, routes_of(config), print, keep=False))
    positives, negatives = data.tokens[half].lengths().T
    assert (negatives > positives).any()
    assert data.batches(half, config).lengths.tolist() == [max(pair) for pair in zip(positives, negatives, strict=True)]


# ------------------------------------------------------------------------------------------- through a model
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
@pytest.mark.parametrize("pairs", [False, True])
def test_loss_and_gradients_are_those_of_the_library_with_a_pass_for_each_column(tmp_path, architecture, pairs):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), architecture, "loss.document_regularizer_weight=0.1")
    rows = triplets().remove_columns("negative") if pairs else triplets()
    for module in model.train().modules():
        module.p = 0.0  # no dropout
    tokens, numbers, found = tokens_of(model, config, rows), [4, 0, 9, 2, 13], []
    for passes, forward in ((ForwardPasses(), StockSpladeLoss.forward), (SHARED, SpladeLoss.forward)):
        columns = columns_of(TokenCollator([tokens], passes)(numbers))
        loss = build_loss(config, model, BatchStatistics())
        model.zero_grad()
        for _ in range(2):  # the penalty's second step has a slope
            parts = forward(loss, [dict(each) for each in columns])  # the library writes its vectors into them
            loss.document_regularizer.finish_step()
        sum(parts.values()).backward()
        found.append(
            (len(columns), parts, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (count, theirs, expected), (count_shared, ours, gradients) = found
    assert count_shared > count  # the texts here fill several passes
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("passes", [ForwardPasses(), ForwardPasses(shared=True), SHARED])
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_the_padding_that_is_counted_is_what_the_network_computes(tmp_path, architecture, passes):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), architecture)
    tokens, numbers, computed = tokens_of(model, config, triplets()), np.array([4, 0, 9, 2, 13]), []
    columns = columns_of(TokenCollator([tokens], passes)(numbers.tolist()))
    (network,) = transformers_of(model)
    network.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0]["input_ids"].numel()))
    build_loss(config, model, BatchStatistics())(columns)
    throughput = Throughput({"query"} if architecture == "inference-free-splade" else ())
    throughput.add(columns)
    assert throughput.totals().encoded + throughput.totals().padding == sum(computed)
    assert padding([numbers], tokens.lengths(), tokens.passages, passes) == (throughput.totals().encoded, sum(computed))


def test_packed_passages_are_one_pass_with_the_vectors_of_padded_ones(tmp_path, flash):  # noqa: F811
    overrides = (*GPU, "model.attention=varlen")
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade", *overrides)
    rows = Dataset.from_dict({"anchor": QUERIES, "positive": DOCUMENTS, "negative": [*DOCUMENTS[1:], "Å"]})
    padded = columns_of(TokenCollator([tokens_of(model, config, rows)])([2, 0, 3]))
    expected = embed(model.eval(), padded)
    choose_attention(model, config, "cuda")
    packed = columns_of(TokenCollator([tokens_of(model, config, rows)], forward_passes_of(config, "cuda"))([2, 0, 3]))
    assert [("cu_seq_lens_q" in each, PLACE in each) for each in packed] == [(False, False), (True, True)]
    assert len(packed[1]["cu_seq_lens_q"]) == 6 + 1
    for ours, theirs in zip(embed(model, packed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_passes_of_one_batch_hold_less_padding_than_its_columns(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "splade")
    tokens = tokens_of(model, config, triplets())
    numbers = list(range(len(TEXTS)))

    def share(passes):
        masks = [each["attention_mask"] for each in columns_of(TokenCollator([tokens], passes)(numbers))[1:]]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert share(SHARED) > share(ForwardPasses()) >= share(ForwardPasses(shared=True))
