"""Base models and teachers whose files lack weights: transformers would start these at random numbers."""

import re

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForSequenceClassification

from evaluate.dense import load_dense
from evaluate.subject import Subject
from tests.checkpoints import write_bert, write_dense, write_modernbert, write_roberta
from tests.test_models import build_from, config_of
from trainer.config import ConfigError
from trainer.config.schema import TeacherConfig
from trainer.losses.teacher_models import TeacherFiles
from trainer.models.build import save_model

WRITE = {"bert": write_bert, "roberta": write_roberta, "modernbert": write_modernbert}
# The first tensor, by name, of each head, as the model's own authors named it.
HEAD = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias", "modernbert": "decoder.bias"}


def rename(folder, old, new):
    """Give the tensors of a saved model other names, or with new=None take them out."""
    file = folder / "model.safetensors"
    weights = {re.sub(old, new or "", name): value for name, value in load_file(file).items() if new or old not in name}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", WRITE)
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_an_encoder_without_its_masked_language_model_head_is_refused(tmp_path, family, architecture):
    whole = WRITE[family](tmp_path / "whole")
    AutoModelForMaskedLM.from_pretrained(whole).base_model.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(whole).save_pretrained(tmp_path / "encoder")
    build_from(config_of(tmp_path, whole, architecture))
    lacks = rf"model.base_model: .*encoder lacks weights of \w+ForMaskedLM, .* random numbers: {HEAD[family]}, "
    with pytest.raises(ConfigError, match=lacks + ".*Name a model that was saved whole, with its head"):
        build_from(config_of(tmp_path, tmp_path / "encoder", architecture))


def test_weights_under_names_that_nobody_maps_are_named_on_both_sides(tmp_path):
    base = write_bert(tmp_path / "base")
    rename(base, r"bert\.encoder\.layer\.0\.attention", "bert.encoder.layer.0.looking")
    with pytest.raises(ConfigError) as caught:
        build_from(config_of(tmp_path, base, "splade"))
    message = caught.value.format_message()
    assert "bert.encoder.layer.0.attention.output.LayerNorm.bias" in message
    assert "others that are not read: bert.encoder.layer.0.looking.output.LayerNorm.bias" in message
    assert message.endswith("Name a model that was saved whole, with its head")
    assert "\n" not in message


def test_names_that_transformers_maps_are_fine(tmp_path):
    """TensorFlow's names of LayerNorm's weights, as in the first checkpoints of BERT."""
    base = write_bert(tmp_path / "base")
    rename(base, r"LayerNorm\.weight$", "LayerNorm.gamma")
    rename(base, r"LayerNorm\.bias$", "LayerNorm.beta")
    assert any(name.endswith("gamma") for name in load_file(base / "model.safetensors"))
    build_from(config_of(tmp_path, base, "splade"))


def test_a_weight_of_another_shape_is_refused(tmp_path):
    base = write_bert(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["cls.predictions.transform.dense.weight"] = weights["cls.predictions.transform.dense.weight"][:8].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.base_model: .* cannot be loaded: "):
        build_from(config_of(tmp_path, base, "splade"))


def test_a_dense_base_that_lacks_a_layers_weights_is_refused_and_one_without_a_pooler_is_fine(tmp_path):
    base = write_dense(tmp_path)
    rename(base, "pooler", None)
    build_from(config_of(tmp_path, base, "csr"))
    rename(base, "layer.0.output.dense.weight", None)
    with pytest.raises(ConfigError, match=r"lacks weights of BertModel.*: encoder.layer.0.output.dense.weight"):
        build_from(config_of(tmp_path, base, "csr"))


@pytest.mark.parametrize("part", ["classifier", "pooler"])
def test_a_cross_encoder_without_its_classifier_is_refused(tmp_path, part):
    bert = write_bert(tmp_path / "bert")
    BertForSequenceClassification.from_pretrained(bert, num_labels=1).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "teacher")
    files = TeacherFiles("loss.teacher", TeacherConfig(model=str(tmp_path / "teacher"), kind="cross-encoder"), None)
    files.load_cross_encoder("cpu")
    rename(tmp_path / "teacher", part, None)
    with pytest.raises(ConfigError, match=rf"lacks weights of BertForSequenceClassification.*{part}.*\.bias"):
        files.load_cross_encoder("cpu")


def test_a_model_that_is_evaluated_may_lack_no_weights_either(tmp_path):
    saved = tmp_path / "saved"
    save_model(build_from(config_of(tmp_path, write_bert(tmp_path / "base"), "inference-free-splade")), saved)
    dense = write_dense(tmp_path)
    sparse = Subject("saved", str(saved), None, False, saved)
    loads = {
        f"--dense: {dense}": (dense, lambda: load_dense(str(dense), trust_remote_code=False)),
        f"model: {saved}": (saved / "document_0_Transformer", sparse.load),
    }
    for where, (weights, load) in loads.items():
        load()
        rename(weights, "layer.1.output.dense", None)
        with pytest.raises(ConfigError) as caught:
            load()
        message = caught.value.format_message()
        assert message.startswith(f"{where} lacks weights of Bert")
        assert "which would start as random numbers: " in message
        assert "layer.1.output.dense.bias" in message
