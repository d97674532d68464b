"""Every fault of NorBERT's code is shown with the published code, and shown to be gone with the converted code."""

import json
import logging
import math
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.checkpoints import DOCUMENTS
from tests.standins import SHAPES, changes_of, code_of, write_norbert
from tests.test_attention import text_by_text
from trainer.config import ConfigError
from trainer.encoding.fuse import fuse
from trainer.models.norbert import FAMILIES, SETTINGS, convert, convert_files

TRUST = {"trust_remote_code": True}
FAULTS = [(shape, change.name) for shape in SHAPES for change in changes_of(shape)]
# What a revision does not have: the newer NorBERT4 asks the model, not the config, whether it is a decoder, and the
# stand-in for NorBERT3 has neither table nor decoder.
ABSENT = {("norbert4-newer", "is_decoder"), ("norbert3", "is_decoder"), ("norbert3", "unsaved tables")}
# Nor what goes with another change: where attention is torch's, there is no softmax left.
ABSENT |= {("norbert4", "masked softmax"), ("norbert4-newer", "masked softmax")}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder of each shape of checkpoint, as its authors would publish it."""
    return {shape: write_norbert(tmp_path_factory.mktemp(shape), shape) for shape in SHAPES}


def copy_of(published, shape, folder, without=None, edit=str):
    """A copy of the checkpoint whose code has every fault mended but `without`; `edit` is applied to the code first."""
    shutil.copytree(published[shape], folder)
    families = {
        name: tuple(change for change in changes if change.name != without) for name, changes in FAMILIES.items()
    }
    texts = {name: edit(code) if name in FAMILIES else code for name, code in code_of(shape).items()}
    for name, code in convert_files(texts, folder, families).items():
        (folder / name).write_text(code)
    settings = json.loads((folder / "config.json").read_text())
    if without != "tied weights":
        for name in code_of(shape):
            settings |= SETTINGS.get(name, {})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def language_model(folder):
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, **TRUST).eval()


def encoder(folder):
    """Stock SPLADE on top of a checkpoint."""
    transformer = Transformer(
        str(folder), transformer_task="fill-mask", model_kwargs=TRUST, processor_kwargs=TRUST, config_kwargs=TRUST
    )
    return SparseEncoder(modules=[transformer, SpladePooling("max")], trust_remote_code=True, device="cpu")


def vectors(folder, texts=DOCUMENTS):
    return encoder(folder).encode(texts, convert_to_sparse_tensor=False, batch_size=8)


def logits_of(folder):
    model = encoder(folder)
    features = model.tokenizer(DOCUMENTS[0], return_tensors="pt")
    with torch.no_grad():
        return language_model(folder)(**features).logits


# ---------------------------------------------------------------------------------- one check per fault
def every_word_is_active(folder):
    return bool((vectors(folder) > 0).all())


def beginning_of_sequence_is_active(folder):
    weights = vectors(folder)[:, 1]
    assert ((weights == 0) | torch.isclose(weights, torch.tensor(math.log1p(1.0)))).all()
    return bool((weights > 0).all())


def vectors_are_not_numbers(folder):
    return not vectors(folder).isfinite().all()


def vectors_are_not_numbers_when_unwritten_memory_is_none(folder):
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written to with NaN
    try:
        return vectors_are_not_numbers(folder)
    except IndexError:  # a table of positions has no NaN
        return True
    finally:
        torch.use_deterministic_algorithms(False)


def cannot_be_saved(folder):
    model = language_model(folder)
    try:
        model.save_pretrained(folder / "saved")
    except (AttributeError, RuntimeError) as error:
        assert re.search("has no attribute 'keys'|share memory|shared tensors|tied", str(error))
        return True
    return False


def cannot_be_loaded(folder):
    try:
        language_model(folder)
    except AttributeError as error:
        assert re.search("is_decoder|all_tied_weights_keys", str(error))
        return True
    return False


def output_embeddings_are_no_layer(folder):
    return not isinstance(language_model(folder).get_output_embeddings(), nn.Linear)


def cannot_be_trained(folder):
    try:
        language_model(folder)(input_ids=torch.arange(110, 130).view(2, 10)).logits.clamp(min=0).sum().backward()
    except TypeError as error:
        assert "softmax_backward_data() takes 3 positional arguments" in str(error)
        return True
    return False


def checkpointing_is_reentrant(folder):
    """Which breaks with several processes, and with torch.autograd.grad."""
    model = language_model(folder).train()
    model.gradient_checkpointing_enable()
    total = model(input_ids=torch.arange(110, 130).view(2, 10)).logits.clamp(min=0).sum()
    try:
        (gradient,) = torch.autograd.grad(total, model.get_input_embeddings().weight)
    except RuntimeError as error:
        assert "use_reentrant=True" in str(error)
        return True
    assert gradient.isfinite().all()
    return False


def gpu_changes_the_precision(folder):
    model, ids = language_model(folder), torch.arange(110, 130).view(2, 10)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.MonkeyPatch.context() as gpu:
            gpu.setattr(torch.cuda, "is_available", lambda: True)
            gpu.setattr(torch.cuda, "is_bf16_supported", lambda: True)
            after = model(input_ids=ids).logits
    return not torch.equal(before, after)


def an_installed_package_changes_the_precision(folder):
    ids, before = torch.arange(110, 130).view(2, 10), language_model(folder)
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_varlen_qkvpacked_func = print
    copy = shutil.copytree(folder, folder.with_name("with-flash"))
    with pytest.MonkeyPatch.context() as installed:
        installed.setitem(sys.modules, package.__name__, package)
        installed.setitem(sys.modules, interface.__name__, interface)
        installed.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
        after = language_model(copy)
    shutil.rmtree(copy)
    with torch.no_grad():
        return not torch.equal(before(input_ids=ids).logits, after(input_ids=ids).logits)


def advice_is_given(folder):
    with pytest.MonkeyPatch.context() as patched:
        said = []
        patched.setattr(logging.Logger, "warning", lambda self, message, *_: said.append(message))
        patched.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
        language_model(shutil.copytree(folder, folder.with_name(f"{folder.name}-asked")))
    return any("FlashAttention" in message for message in said)


def kept_for_the_backward_pass(folder):
    """Shapes of what 2 texts of 20 tokens leave behind, each tensor once."""
    model, ids, kept = language_model(folder).train(), torch.arange(110, 150).view(2, 20), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        model(input_ids=ids)
    return [tuple(tensor.shape) for tensor in kept.values()]


def attention_matrices_are_kept(folder):
    """One number for each pair of tokens in each head."""
    shapes = kept_for_the_backward_pass(folder)
    return any(
        math.prod(shape) >= 2 * 2 * 20 * 20 and shape[-1] == shape[-2] == 20 for shape in shapes if len(shape) > 1
    )


def parts_of_a_formula_are_kept(folder):
    """In each of the two layers, besides what goes in, what comes out, and what that is multiplied by."""
    config = language_model(folder).config
    shapes = kept_for_the_backward_pass(folder)
    return shapes.count((2, 20, config.intermediate_size)) > 2 * 3


def cannot_be_exported(folder):
    model, ids = language_model(folder), torch.arange(110, 130).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    traced = torch.jit.trace(lambda ids, mask: model(ids, mask).logits, (ids, mask), check_trace=False)
    try:
        torch.jit.save(traced, str(folder / "model.pt"))
    except RuntimeError as error:
        assert "Could not export Python function call 'MaskedSoftmax'" in str(error)
        return True
    torch.testing.assert_close(torch.jit.load(folder / "model.pt")(ids, mask), model(ids, mask).logits)
    return False


def texts_can_only_be_padded(folder):
    """Whether a packed text's neighbours, or where it lies, change what the model makes of it."""
    model, texts = language_model(folder), [torch.arange(110, 130), torch.arange(140, 147)]
    starts = torch.tensor([0, 20, 27], dtype=torch.int32)
    options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 20, "max_length_k": 20}

    def attend(layer, query, key, value, mask, *, scaling, cu_seq_lens_q, sliding_window, **_):
        found = text_by_text(query[0], key[0], value[0], cu_seq_lens_q, scaling, sliding_window - 1)
        return found.transpose(0, 1)[None], None

    with pytest.MonkeyPatch.context() as interface, torch.no_grad():
        interface.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "text_by_text", attend)
        apart = [model(input_ids=text[None]).logits[0] for text in texts]
        model.config._attn_implementation = "text_by_text"
        places = torch.cat([torch.arange(20), torch.arange(7)])[None]
        packed = model(input_ids=torch.cat(texts)[None], position_ids=places, **options).logits[0]
    return not torch.allclose(packed, torch.cat(apart), atol=1e-4)


def head_needs_all_logits(folder):
    done = fuse(encoder(folder))
    assert done == "fused, without logits" or "the model needs the logits of every word" in done
    return done != "fused, without logits"


SHOWN_BY = {
    "soft cap": every_word_is_active,
    "BOS logit": beginning_of_sequence_is_active,
    "unsaved tables": vectors_are_not_numbers_when_unwritten_memory_is_none,
    "tied weights": cannot_be_saved,
    "is_decoder": cannot_be_loaded,
    "output embeddings": output_embeddings_are_no_layer,
    "gradient checkpointing": checkpointing_is_reentrant,
    "bf16 by GPU": gpu_changes_the_precision,
    "flash attention": an_installed_package_changes_the_precision,
    "advice": advice_is_given,
    "logits of every word": head_needs_all_logits,
    "padded texts only": texts_can_only_be_padded,
    "masked softmax": cannot_be_exported,
    "GELU": parts_of_a_formula_are_kept,
    "attention matrix": attention_matrices_are_kept,
    "infinite logits": vectors_are_not_numbers,
    "softmax backward": cannot_be_trained,
    "post_init": cannot_be_loaded,
}


@pytest.mark.parametrize("shape,name", [fault for fault in FAULTS if fault not in ABSENT])
def test_each_fault_shows_when_it_alone_is_left_in_and_is_gone_when_converted(tmp_path, published, shape, name):
    is_shown = SHOWN_BY[name]
    assert is_shown(copy_of(published, shape, tmp_path / "faulty", without=name))
    assert not is_shown(copy_of(published, shape, tmp_path / "converted"))


@pytest.mark.parametrize(
    "name,old,new",
    [
        ("unsaved tables", "persistent=True", "persistent=False"),
        (
            "is_decoder",
            "self.config = config\n",
            "self.config = config\n        self.causal = self.config.is_decoder\n",
        ),
    ],
)
def test_what_the_stand_in_for_norbert3_does_not_have_is_mended_where_it_is(tmp_path, published, name, old, new):
    def edit(code):
        assert old in code
        return code.replace(old, new)

    is_shown = SHOWN_BY[name]
    assert is_shown(copy_of(published, "norbert3", tmp_path / "faulty", without=name, edit=edit))
    assert not is_shown(copy_of(published, "norbert3", tmp_path / "converted", edit=edit))


@pytest.mark.parametrize("shape", SHAPES)
def test_published_code_as_a_whole_cannot_make_a_sparse_encoder(tmp_path, published, shape):
    with pytest.raises(Exception, match=r"is_decoder|all_tied_weights_keys|has no attribute 'keys'|must be finite"):
        encoder(published[shape]).save_pretrained(str(tmp_path / "saved"))


# ---------------------------------------------------------------------------------- and nothing else changes
def test_without_its_soft_cap_norbert4_gives_the_logits_that_went_into_it(tmp_path, published):
    for shape in ("norbert4", "norbert4-newer"):
        capped = logits_of(copy_of(published, shape, tmp_path / shape, without="soft cap"))[:, 1:]
        free = logits_of(copy_of(published, shape, tmp_path / f"{shape}-converted"))
        assert (free[:, 0] == 0).all()  # the neutral first position
        torch.testing.assert_close(free[:, 1:], 7.5 * torch.logit(capped / 30), atol=1e-3, rtol=1e-4)
        assert (free < 0).any()


def test_rope_tables_are_the_cosines_and_sines_of_position_times_frequency(tmp_path, published):
    model = language_model(copy_of(published, "norbert4", tmp_path / "converted"))
    for layer, theta in zip(model.encoder.layers, (10_000, 160_000), strict=True):
        rope = layer.attention.rope_embedding
        for position in (0, 1, 63):
            for pair in (0, 3, 7):
                angle = position * theta ** (-2 * pair / 16)
                for column in (pair, pair + 8):
                    assert rope.cos_matrix[0, position, column].item() == pytest.approx(math.cos(angle), abs=1e-5)
                    assert rope.sin_matrix[0, position, column].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_norbert3_keeps_every_logit_but_those_of_the_first_107_ids(tmp_path, published):
    before = logits_of(copy_of(published, "norbert3", tmp_path / "faulty", without="infinite logits"))
    after = logits_of(copy_of(published, "norbert3", tmp_path / "converted"))
    assert (before[..., :107] == -torch.inf).all()
    assert (after[..., :107] == -1e4).all()
    assert torch.equal(after[..., 107:], before[..., 107:])


def test_norbert3_is_still_tied_to_its_embeddings_after_a_save(tmp_path, published):
    model = language_model(copy_of(published, "norbert3", tmp_path / "converted"))
    model.save_pretrained(tmp_path / "saved")
    again = language_model(tmp_path / "saved")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_norbert4_is_not_tied(tmp_path, published):
    model = language_model(copy_of(published, "norbert4", tmp_path / "converted"))
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("shape", ["norbert4", "norbert4-newer"])
def test_the_causal_model_keeps_its_soft_cap_and_its_mask(tmp_path, published, shape):
    folder = copy_of(published, shape, tmp_path / "converted")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"]["AutoModelForCausalLM"] = "modeling_gptbert.GptBertForCausalLM"
    (folder / "config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder, **TRUST).eval()
    ids = torch.arange(10, 30).view(1, 20)
    with torch.no_grad():
        long, short = model(input_ids=ids).logits, model(input_ids=ids[:, :5]).logits
        other = language_model(folder)(input_ids=ids).logits, language_model(folder)(input_ids=ids[:, :5]).logits
    assert long.min() > 0
    assert long.max() < 30
    torch.testing.assert_close(long[:, :5], short)  # what comes later is not seen
    assert not torch.allclose(other[0][:, :5], other[1])  # the opposite: the masked model sees it


# ---------------------------------------------------------------------------------- the conversion itself
def test_a_revision_of_norbert4_with_attention_of_another_kind_can_be_exported(tmp_path, published):
    folder = copy_of(published, "norbert4", tmp_path / "other", without="attention matrix")
    assert "masked softmax" in (folder / "modeling_gptbert.py").read_text().splitlines()[0]
    assert not cannot_be_exported(folder)


def converted(shape):
    name, code = next((name, code) for name, code in code_of(shape).items() if name in FAMILIES)
    return name, convert(code, Path(name), FAMILIES[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_conversion_lists_what_it_changed_and_does_nothing_the_second_time(shape):
    name, text = converted(shape)
    first = text.splitlines()[0]
    expected = [change.name for change in changes_of(shape) if (shape, change.name) not in ABSENT]
    assert first.startswith(f"# Converted by nordsparse: {', '.join(expected)}. sha256 of the lines below: ")
    assert convert(text, Path(name), FAMILIES[name]) == text
    assert text.count("def rebuilt_after_load") == (shape != "norbert3")
    assert text.count("_tied_weights_keys = {") == (shape == "norbert3")


# Each fault written in a way that nobody has seen yet.
UNKNOWN = {
    "soft cap": ("30 * torch.sigmoid(subword_prediction / 7.5)", "self.cap(subword_prediction)"),
    "BOS logit": ("bos_logits[:, :, self.config.bos_token_id] = 1.0", "bos_logits[..., 1] = 1.0"),
    "unsaved tables": ("_init_weights", "_initialise"),
    "tied weights": ("_tied_weights_keys = [", "_tied_weights_keys = list(["),
    "output embeddings": ("return self.classifier.emb2vocab.weight", "return self.emb.weight"),
    "gradient checkpointing": ("use_reentrant=True", "**kwargs"),
    "bf16 by GPU": ("static_embeddings.bfloat16()", "static_embeddings.to(torch.bfloat16)"),
    "infinite logits": ('float("-inf")\n        return MaskedLMOutput', "MINUS_INF\n        return MaskedLMOutput"),
    "post_init": ("self.classifier = ", "self.head = "),
    "softmax backward": ("softmax_backward_data(ctx, grad_output", "softmax_backward_data(*ctx, grad_output"),
    "class": ("class NorbertForMaskedLM", "class Norbert3ForMaskedLM"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_revision_with_an_unknown_pattern_stops_with_a_line_that_names_it(name):
    old, new = UNKNOWN[name]
    shape = "norbert3" if name in ("infinite logits", "post_init", "softmax backward", "class") else "norbert4"
    file, code = next((file, code) for file, code in code_of(shape).items() if file in FAMILIES and old in code)
    with pytest.raises(ConfigError) as caught:
        convert(code.replace(old, new), Path("cache") / file, FAMILIES[file])
    message = caught.value.format_message()
    assert message.startswith(f"model.base_model: cache/{file} is not a revision that can be converted")
    assert "was looked for and not found: " in message
    assert "\n" not in message
    if name != "class":
        assert f"to mend its {name} (" in message


# The same faults once more, in a second place that the pattern does not reach.
SECOND = {
    "soft cap": (
        "        return MaskedLMOutput(",
        "        logits = logits.div(7.5).sigmoid()\n        return MaskedLMOutput(",
    ),
    "BOS logit": (
        "        return MaskedLMOutput(",
        "        logits[..., config.bos_token_id] = 1\n        return MaskedLMOutput(",
    ),
    "tied weights": ("class GptBertForCausalLM(GptBertModel):\n", "\\g<0>    _tied_weights_keys: list = ['x']\n"),
    "gradient checkpointing": (
        "class Layer",
        "def again(layer):\n    return checkpoint.checkpoint(layer)\n\n\nclass Layer",
    ),
    "bf16 by GPU": ("class Layer", "BF16 = torch.cuda.is_bf16_supported()\n\n\nclass Layer"),
    "infinite logits": (
        "        return MaskedLMOutput(",
        "        x[..., 107] = float('inf')\n        return MaskedLMOutput(",
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_a_fault_in_a_second_place_stops_the_conversion_instead_of_leaving_it_half_done(name):
    pattern, new = SECOND[name]
    shape = "norbert3" if name == "infinite logits" else "norbert4"
    file, code = next((file, code) for file, code in code_of(shape).items() if file in FAMILIES)
    code, found = re.subn(re.escape(pattern), new.replace("\\g<0>", pattern), code, count=1)
    assert found
    with pytest.raises(ConfigError, match=rf"to mend its {name} \(.*this is still there: "):
        convert(code, Path(file), FAMILIES[file])


def test_every_class_with_a_table_that_is_not_saved_is_rebuilt(tmp_path, published):
    def edit(code):
        new = 'self.window_length = 3\n        self.register_buffer("shift", torch.ones(1), persistent=False)\n'
        code = re.sub(r"self\.window_length = config.*\n", new, code)
        return code.replace(
            "query, key = self.rope_embedding(query)", "query, key = self.shift * self.rope_embedding(query)"
        )

    folder = copy_of(published, "norbert4", tmp_path / "converted", edit=edit)
    assert (folder / "modeling_gptbert.py").read_text().count("@rebuilt_after_load") == 2
    assert not vectors_are_not_numbers_when_unwritten_memory_is_none(folder)


def test_what_need_not_be_mended_is_left_whole_where_it_is_written_in_another_way():
    name, code = "modeling_gptbert.py", code_of("norbert4")["modeling_gptbert.py"]
    other = code.replace("gelu_new(x)", "gelu_new(x + 0)", 1).replace("torch.bmm(query", "torch.matmul(query")
    assert other.count("gelu_new(x)") == 1
    found = convert(other, Path(name), FAMILIES[name])
    first, rest = found.split("\n", 1)
    assert not {"GELU", "attention matrix"} & set(
        first.split(": ")[1].removesuffix(". sha256 of the lines below").split(", ")
    )
    assert "import gelu_new" in rest
    assert rest.count("gelu_new(x") == 2
    assert "masked_softmax(attention_scores" in rest


def test_converted_code_that_was_edited_is_refused():
    name, text = converted("norbert4")
    edited = text.replace("bos_logits = torch.zeros_like", "bos_logits = torch.ones_like")
    with pytest.raises(ConfigError, match=r"modeling_gptbert.py was edited by hand after its conversion"):
        convert(edited, Path(name), FAMILIES[name])


def test_two_models_with_the_same_configuration_file_each_get_their_own_code_in_one_process(tmp_path, published):
    one = language_model(copy_of(published, "norbert4", tmp_path / "one/model", without="BOS logit"))
    two = language_model(copy_of(published, "norbert4", tmp_path / "two/model"))
    ids = torch.arange(10, 20).view(1, 10)
    with torch.no_grad():
        assert one(input_ids=ids).logits[0, 0].sum() == 1.0
        assert two(input_ids=ids).logits[0, 0].sum() == 0.0
