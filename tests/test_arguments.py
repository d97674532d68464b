from types import SimpleNamespace

import pytest
from datasets import Dataset
from sentence_transformers.sparse_encoder import SparseEncoderTrainingArguments

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert
from tests.test_models import config_of
from trainer.config.schema import TrainingConfig
from trainer.losses.build import build_loss
from trainer.losses.statistics import BatchStatistics
from trainer.models.build import build_model, fetch_base_model
from trainer.runs.run import Run
from trainer.training.arguments import APPLIED_HERE, OWN_KEYS, build_arguments, query_rate_mapping
from trainer.training.trainer import SparseTrainer


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def built(tmp_path, bert, architecture, *overrides):
    config = config_of(tmp_path, bert, architecture, *overrides)
    model = build_model(config, fetch_base_model(config), QUERIES, DOCUMENTS, "cpu")
    loss = build_loss(config, model, BatchStatistics())
    arguments = build_arguments(config, Run(tmp_path / "run"), model, loss, "cpu", best_metric="eval_loss")
    return config, model, loss, arguments


def parameter_groups(config, model, loss, arguments):
    """Learning rate -> names of the parameters the optimizer trains at it."""
    held_out = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})
    trainer = SparseTrainer(
        SimpleNamespace(
            model=model, arguments=arguments, loss=loss, config=config, progress=None, evaluator=None,
            best=SimpleNamespace(depends_on={}), data=SimpleNamespace(train=None, eval=held_out),
        ),
        run_id="", throughput=None, stop=None, regularizer_weights=None, callbacks=[],
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {}
    for group in trainer.create_optimizer().param_groups:
        groups.setdefault(group["lr"], set()).update(names[id(parameter)] for parameter in group["params"])
    return groups


def test_the_query_rate_reaches_the_static_query_weights_and_nothing_else(tmp_path, bert):
    config, model, loss, arguments = built(tmp_path, bert, "inference-free-splade")
    groups = parameter_groups(config, model, loss, arguments)
    assert groups[1e-2] == {"0.sub_modules.query.0.weight"}
    rest = {name for name, _ in model.named_parameters()} - groups[1e-2]
    assert groups[1e-3] == rest
    assert any(".attention.self.query." in name for name in rest)


def test_the_pattern_people_write_would_train_attention_at_the_query_rate(tmp_path, bert):
    config, model, loss, arguments = built(tmp_path, bert, "inference-free-splade")
    arguments.learning_rate_mapping = {r".*\.query\..*": 1e-2}
    assert any(".attention.self.query." in name for name in parameter_groups(config, model, loss, arguments)[1e-2])


def test_a_model_without_static_query_weights_trains_at_one_rate(tmp_path, bert):
    config, model, loss, arguments = built(tmp_path, bert, "splade")
    assert query_rate_mapping(config, loss) == {}
    assert parameter_groups(config, model, loss, arguments) == {1e-3: {name for name, _ in model.named_parameters()}}


# A value other than the default for every key of the training section.
OTHER = {
    "num_train_epochs": 2.0,
    "max_steps": 7,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-4,
    "warmup_steps": 0.2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.2,
    "max_grad_norm": 0.5,
    "bf16": True,
    "fp16": True,
    "dataloader_num_workers": 2,
    "dataloader_pin_memory": True,
    "dataloader_prefetch_factor": 3,
    "eval_steps": 4,
    "save_steps": 8,
    "save_total_limit": 5,
    "load_best_model_at_end": False,
    "logging_steps": 3,
    "seed": 7,
}


@pytest.mark.parametrize("key", sorted(set(TrainingConfig.model_fields) - OWN_KEYS - APPLIED_HERE))
def test_every_training_key_reaches_the_library(tmp_path, bert, key, monkeypatch):
    monkeypatch.setattr(
        "trainer.training.arguments.SparseEncoderTrainingArguments", dict
    )  # the real ones adapt to this machine
    value = OTHER[key]
    assert value != TrainingConfig.model_fields[key].default
    together = {
        "eval_steps": ["save_steps=4"],
        "save_steps": ["eval_steps=8"],
        "dataloader_prefetch_factor": ["dataloader_num_workers=2"],
    }
    overrides = [f"training.{pair}" for pair in (*together.get(key, ()), f"{key}={str(value).lower()}")]
    if key == "fp16":
        overrides.append("hardware.device=auto")
    arguments = built(tmp_path, bert, "splade", *overrides)[3]
    assert arguments[key] == value


def test_training_keys_are_names_of_the_library():
    names = SparseEncoderTrainingArguments.__dataclass_fields__
    assert set(TrainingConfig.model_fields) - set(names) == OWN_KEYS


def test_nothing_is_pushed_unless_the_config_says_so(tmp_path, bert):
    assert not built(tmp_path, bert, "splade")[3].push_to_hub
    pushed = built(tmp_path, bert, "splade", "hub.push=true", "hub.repo=org/name")[3]
    assert (pushed.push_to_hub, pushed.hub_model_id, pushed.hub_private_repo) == (True, "org/name", True)


def test_gradient_checkpointing_is_never_reentrant(tmp_path, bert):
    arguments = built(tmp_path, bert, "splade", "hardware.gradient_checkpointing=true")[3]
    assert arguments.activation_checkpointing
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_in_pinned_memory_are_copied_without_waiting(tmp_path, bert, pinned):
    _, _, _, arguments = built(tmp_path, bert, "splade", f"training.dataloader_pin_memory={str(pinned).lower()}")
    assert arguments.accelerator_config.non_blocking == pinned
