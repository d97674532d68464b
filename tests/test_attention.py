import re
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense, write_modernbert, write_roberta
from tests.conftest import TINY
from tests.standins import write_dense_norbert, write_norbert
from tests.test_models import config_of
from tests.test_remote_code import PINNED
from trainer.config import ConfigError, load_config
from trainer.data.batches import text_ids
from trainer.data.roles import side_of
from trainer.data.tokens import TokenCollator, Tokeniser
from trainer.encoding.fuse import fuse, is_fused
from trainer.models import attention as module
from trainer.models.attention import choose_attention, plan_attention, with_padded_attention
from trainer.models.build import build_model, fetch_base_model, load_model, save_model
from trainer.training.arguments import routes_of
from trainer.training.callbacks.throughput import Throughput

PACKED = ("varlen", "flash_attention_2")
GPU = ("hardware.device=cuda", "training.bf16=true")
FLASH = (*GPU, "model.attention=flash_attention_2")


def built(tmp_path, base, architecture, *overrides):
    config = config_of(tmp_path, base, architecture, *overrides)
    return config, build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")


def network_of(model):
    return module.transformers_of(model)[0]


def vectors(model):
    texts = [*DOCUMENTS, "Å", " ".join(DOCUMENTS)]
    return model.encode_document(texts, convert_to_sparse_tensor=False, show_progress_bar=False)


def rows():
    return Dataset.from_dict({"anchor": QUERIES, "positive": DOCUMENTS, "negative": [*DOCUMENTS[1:], "Å"]})


def text_by_text(query, key, value, starts, scale, within):
    """Attention of each packed text by itself, [heads, tokens, size of a head], to tokens `within` so many places."""
    parts = []
    for start, end in pairwise(starts.tolist()):
        places = torch.arange(end - start, device=query.device)
        near = None if within is None else (places[:, None] - places).abs() <= within
        text = (each[:, start:end] for each in (query, key, value))
        parts.append(scaled_dot_product_attention(*text, attn_mask=near, scale=scale))
    return torch.cat(parts, 1)


@pytest.fixture
def flash(monkeypatch):
    """The interfaces of torch's flash attention and of the package's, on a CPU."""

    def attention(layer, query, key, value, mask, *, scaling=None, sliding_window=None, cu_seq_lens_q=None, **kwargs):
        assert mask is None
        within = None if sliding_window is None else sliding_window - 1
        found = text_by_text(query[0], key[0], value[0], cu_seq_lens_q, scaling, within)
        return found.transpose(0, 1)[None], None

    def of_torch(query, key, value, starts, starts_k, longest, longest_k, dropout, causal, debug, **kwargs):
        assert torch.equal(starts, starts_k)
        assert longest == longest_k == starts.diff().max()
        assert (dropout, causal, debug) == (0, False, False)
        assert kwargs["window_size_left"] == kwargs["window_size_right"]
        rows = (each.transpose(0, 1) for each in (query, key, value))
        return [text_by_text(*rows, starts, kwargs["scale"], kwargs["window_size_left"]).transpose(0, 1)]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", of_torch)
    functions = ((None, attention, None, None, None), (None, None))
    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention", lambda *args, **kwargs: functions
    )
    adjust = PreTrainedModel._check_and_adjust_attn_implementation
    monkeypatch.setattr(
        PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, name, *args, **kwargs: name if "flash" in (name or "") else adjust(self, name, *args, **kwargs),
    )
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attention)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)


# ------------------------------------------------------------------------------------------- the key
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade", "csr"])
def test_the_key_reaches_the_library_and_is_not_saved(tmp_path, architecture):
    base = write_dense(tmp_path / "base") if architecture == "csr" else write_bert(tmp_path / "base")
    config, model = built(tmp_path, base, architecture, "model.attention=eager")
    before = vectors(model)
    assert network_of(model).model.config._attn_implementation == "sdpa"
    found, line = choose_attention(model, config, "cpu")
    assert network_of(model).model.config._attn_implementation == "eager"
    assert (found, line) == (config, "attention eager (model.attention says so)")
    assert torch.allclose(vectors(model), before, atol=1e-5)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", config, "cpu")
    assert network_of(again).model.config._attn_implementation == "sdpa"  # what a user opens is stock
    choose_attention(again, config, "cpu")
    assert network_of(again).model.config._attn_implementation == "eager"


def test_left_alone_the_plan_says_what_the_base_model_has(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "splade")
    assert choose_attention(model, config, "cpu") == (config, "attention sdpa (the base model has it)")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("hardware.device=cpu", "training.bf16=true"), "'model.attention' {} is for CUDA; device is cpu"),
        (("hardware.device=auto",), "'model.attention' {} computes in 16 bits: set training.bf16 to true"),
    ],
)
@pytest.mark.parametrize("attention", PACKED)
def test_contradictions_are_one_line(tmp_path, attention, overrides, says):
    (tmp_path / "a.yaml").write_text(TINY)
    with pytest.raises(ConfigError) as found:
        load_config(tmp_path / "a.yaml", [f"model.attention={attention}", *overrides])
    assert says.format(attention) in found.value.format_message()
    assert "\n" not in found.value.format_message()


def test_a_machine_without_cuda_or_the_package_is_one_line(tmp_path):
    config, model = built(tmp_path, write_bert(tmp_path / "base"), "splade", *FLASH)
    with pytest.raises(ConfigError, match=r"flash_attention_2 is for CUDA, and training is on cpu. Leave it at auto"):
        choose_attention(model, config, "cpu")
    with pytest.raises(
        ConfigError, match="flash_attention_2 needs the package flash-attn, which is not installed here"
    ):
        choose_attention(model, config, "cuda")


@pytest.mark.parametrize(("attention", "device"), [("eager", "cpu"), ("varlen", "cuda")])
def test_a_model_with_attention_code_of_its_own_is_one_line(tmp_path, attention, device):
    base = write_norbert(tmp_path / "base", "norbert3")
    config, model = built(tmp_path, base, "splade", *PINNED, *GPU, f"model.attention={attention}")
    says = rf"ForMaskedLM has code of its own for attention \(.*\), so {attention} cannot be set"
    with pytest.raises(ConfigError, match=says):
        choose_attention(model, config, device)


# ------------------------------------------------------------------------------------------- packed texts
def write_norbert4(folder):
    return write_norbert(folder, "norbert4", bias=0.0)


def write_newer_norbert4(folder):
    return write_norbert(folder, "norbert4-newer", bias=0.0)


def write_dense_norbert4(folder):
    return write_dense_norbert(folder, "norbert4")


NORBERT = (write_norbert4, write_newer_norbert4, write_dense_norbert4)


def for_gpu(tmp_path, write, *overrides):
    """A base model's encoder and its config, on a GPU in bf16."""
    architecture = "csr" if write in (write_dense, write_dense_norbert4) else "splade"
    pinned = PINNED if write in NORBERT else ()
    return built(tmp_path, write(tmp_path / "base"), architecture, *GPU, *pinned, *overrides)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("write", [write_bert, write_roberta, write_modernbert, write_dense, *NORBERT])
@pytest.mark.parametrize("attention", PACKED)
def test_packed_texts_have_the_vectors_of_padded_ones(tmp_path, flash, write, fused, attention):
    config, model = for_gpu(tmp_path, write, f"model.attention={attention}")
    if fused:
        fuse(model)
    assert is_fused(model) == (fused and config.model.architecture == "splade")
    padded = vectors(model)
    choose_attention(model, config, "cuda")
    assert "cu_seq_lens_q" in model.preprocess(DOCUMENTS)
    assert torch.allclose(vectors(model), padded, atol=1e-5)
    with with_padded_attention(model):
        assert "attention_mask" in model.preprocess(DOCUMENTS)
        assert torch.equal(vectors(model), padded)
    assert "cu_seq_lens_q" in model.preprocess(DOCUMENTS)


@pytest.mark.parametrize("write", [write_bert, write_roberta, write_modernbert, write_dense, *NORBERT])
def test_on_a_gpu_texts_are_packed_unless_the_config_says_otherwise(tmp_path, flash, write):
    config, model = for_gpu(tmp_path, write)
    padded = vectors(model)
    chosen, line = choose_attention(model, config, "cuda")
    assert line == "attention varlen, texts packed without padding"
    assert chosen.model.packs_texts
    assert chosen.model_copy(update={"model": config.model}) == config
    assert "cu_seq_lens_q" in model.preprocess(DOCUMENTS)
    assert torch.allclose(vectors(model), padded, atol=1e-5)


def seen_by_all(query, key, value, *others, **kwargs):
    """Attention of packed texts that does not know where each begins."""
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    return [scaled_dot_product_attention(query, key, value, scale=kwargs["scale"]).transpose(0, 1)]


def not_compiled_for_this_gpu(*args, **kwargs):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nMore words.")


def code_for_padded_texts(*args, **kwargs):
    raise KeyError("attention_mask")


def without_a_word(*args, **kwargs):
    raise AssertionError


@pytest.mark.parametrize("write", [write_bert, write_roberta, write_modernbert, write_dense, write_norbert4])
@pytest.mark.parametrize(
    ("function", "says"),
    [
        (seen_by_all, "packed, the vectors of a few texts are [1-9][0-9]*% off"),
        (not_compiled_for_this_gpu, "FlashAttention only supports Ampere GPUs or newer"),
        (code_for_padded_texts, "'attention_mask'"),
        (without_a_word, "AssertionError"),
    ],
)
def test_texts_stay_padded_where_packing_them_fails_or_changes_their_vectors(
    tmp_path, flash, monkeypatch, write, function, says
):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", function)
    config, model = for_gpu(tmp_path, write)
    before, own = vectors(model), network_of(model).model.config._attn_implementation
    chosen, line = choose_attention(model, config, "cuda")
    assert re.match(rf"attention {own} \(the base model has it\); texts are padded: {says}", line)
    assert chosen == config
    assert "attention_mask" in model.preprocess(DOCUMENTS)
    assert torch.equal(vectors(model), before)


def test_texts_are_padded_on_a_gpu_in_32_bits_and_where_the_base_model_wants_it(tmp_path, flash):
    config, model = for_gpu(tmp_path, write_bert, "training.bf16=false")
    says = "attention sdpa (the base model has it); texts are padded: training.bf16 is off"
    assert choose_attention(model, config, "cuda") == plan_attention(model, config, "cuda") == (config, says)
    config, model = for_gpu(tmp_path, write_roberta)
    network_of(model).unpad_inputs = False
    assert choose_attention(model, config, "cuda")[1].endswith(
        "; texts are padded: the base model says so (unpad_inputs)"
    )
    base = write_norbert(tmp_path / "norbert", "norbert3")
    config, model = built(tmp_path, base, "splade", *PINNED, *GPU)
    _, line = choose_attention(model, config, "cuda")
    assert line.endswith("; texts are padded: NorbertForMaskedLM has code of its own for attention")


def test_a_run_goes_on_with_packed_or_padded_texts_as_it_began(tmp_path, flash, monkeypatch):
    config, model = for_gpu(tmp_path, write_bert)
    chosen, line = choose_attention(model, config, "cuda", packed=False)
    assert chosen == config
    assert line == "attention sdpa (the base model has it); texts are padded: this run did so from the start"
    assert "attention_mask" in model.preprocess(DOCUMENTS)
    assert choose_attention(model, config, "cpu", packed=False)[1] == "attention sdpa (the base model has it)"
    says = "this run packed its texts, and cannot here: training is on cpu. Go on where it began: on CUDA"
    with pytest.raises(ConfigError, match=says):
        choose_attention(model, config, "cpu", packed=True)
    in_32_bits = config.model_copy(update={"training": config.training.model_copy(update={"bf16": False})})
    with pytest.raises(
        ConfigError, match=r"and cannot here: training.bf16 is off. Go on where it began: on CUDA, in 16 bits"
    ):
        choose_attention(model, in_32_bits, "cuda", packed=True)
    # nothing is compared: weights change in training, and with them how much rounding matters
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", seen_by_all)
    assert choose_attention(model, config, "cuda", packed=True)[0].model.packs_texts
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", not_compiled_for_this_gpu)
    with pytest.raises(ConfigError, match="and cannot here: FlashAttention only supports Ampere GPUs or newer"):
        choose_attention(model, config, "cuda", packed=True)


def test_an_attention_that_is_asked_for_and_gives_other_vectors_is_one_line(tmp_path, flash, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", seen_by_all)
    config, model = for_gpu(tmp_path, write_bert, "model.attention=varlen")
    with pytest.raises(ConfigError, match=r"varlen cannot be used: packed, .* off. Leave it at auto") as found:
        choose_attention(model, config, "cuda")
    assert "\n" not in found.value.format_message()


def test_empty_vectors_say_nothing_of_whether_texts_can_be_packed(tmp_path, flash):
    config, model = built(tmp_path, write_bert(tmp_path / "base", bias=-500.0), "splade", *GPU)
    _, line = choose_attention(model, config, "cuda")
    assert line.endswith("; texts are padded: the vectors of a few texts are empty, so nothing can be compared")


def test_codes_of_csr_are_compared_before_their_least_dims_are_chosen(tmp_path, flash, monkeypatch):
    config, model = for_gpu(tmp_path, write_dense)

    def by_chance(self, latents, *args, **kwargs):
        return torch.rand_like(latents), torch.rand_like(latents)

    monkeypatch.setattr(SparseAutoEncoder, "top_k", by_chance)
    assert not torch.allclose(vectors(model), vectors(model), rtol=0.1)
    assert choose_attention(model, config, "cuda")[0].model.packs_texts


@pytest.mark.parametrize("write", [write_bert, write_norbert4])
def test_packed_texts_have_the_gradients_of_padded_ones(tmp_path, flash, write):
    config, model = for_gpu(tmp_path, write, "model.attention=varlen")
    fuse(model)

    def gradients():
        model.zero_grad()
        found = model.eval()(model.preprocess([*DOCUMENTS, "Å"]))["sentence_embedding"]
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    padded = gradients()
    choose_attention(model, config, "cuda")
    packed = gradients()
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(
            packed[name], gradient, rtol=1e-3, atol=max(1e-5, 2e-5 * gradient.abs().max().item())
        )


@pytest.mark.parametrize("write", [write_bert, write_roberta])
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
@pytest.mark.parametrize("attention", PACKED)
def test_packed_features_are_those_of_the_library(tmp_path, flash, write, architecture, attention):
    config, model = built(tmp_path, write(tmp_path / "base"), architecture, *GPU, f"model.attention={attention}")
    routes, texts = routes_of(config), rows()
    padded = Tokeniser(model, routes, print).rows("a", texts, text_ids(texts), "content")
    choose_attention(model, config, "cuda")
    tokens = Tokeniser(model, routes, print).rows("a", texts, text_ids(texts), "content")
    assert tokens.lengths().tolist() == padded.lengths().tolist()
    batch = TokenCollator([tokens])([2, 0, 3])
    throughput = Throughput({"query"} if routes else ())
    columns = []
    for role in texts.column_names:
        theirs = model.preprocess([texts[n][role] for n in (2, 0, 3)], task=routes.get(side_of(role)))
        ours = {key.removeprefix(f"{role}_"): value for key, value in batch.items() if key.startswith(f"{role}_")}
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value, key
        assert ("attention_mask" in ours) == (routes.get(side_of(role)) == "query")
        columns.append(ours)
    throughput.add(columns)
    assert throughput.totals().rows == 3
    assert throughput.totals().encoded == tokens.lengths()[[2, 0, 3]].sum()
    assert throughput.totals().padding == 0


@pytest.mark.gpu
@pytest.mark.parametrize("sliding_window", [None, 65])
def test_torchs_flash_attention_is_that_of_each_text_by_itself(sliding_window):
    starts = torch.tensor([0, 300, 301, 813, 900], dtype=torch.int32, device="cuda")
    inputs = [torch.randn(1, 15, 900, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    outer = torch.randn(1, 900, 15, 64, device="cuda", dtype=torch.bfloat16)
    found, _ = module.attend(
        None, *inputs, None, cu_seq_lens_q=starts, max_length_q=512, scaling=0.125, sliding_window=sliding_window
    )
    ours = torch.autograd.grad(found, inputs, outer)
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    within = None if sliding_window is None else sliding_window - 1
    wanted = text_by_text(*(each[0] for each in doubles), starts, 0.125, within).transpose(0, 1)[None]
    theirs = torch.autograd.grad(wanted, doubles, outer.double())
    for bf16, exact in zip([found, *ours], [wanted, *theirs], strict=True):
        assert (bf16 - exact).abs().max() <= 2.0**-6 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("write", [write_bert, write_roberta, write_modernbert, write_dense, *NORBERT])
def test_a_real_gpu_packs_texts_too(tmp_path, write):
    config, model = for_gpu(tmp_path, write)
    model.to("cuda")
    if config.model.architecture == "splade":
        fuse(model)
    with torch.autocast("cuda", torch.bfloat16):
        padded = vectors(model).float()
        assert choose_attention(model, config, "cuda")[1] == "attention varlen, texts packed without padding"
        assert (vectors(model).float() - padded).norm() <= 0.05 * padded.norm()
