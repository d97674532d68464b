import ast
import json
import re

import pytest

from tests.conftest import ROOT
from trainer.config import Config, ConfigError, config_name, find_config, json_schema, load_config, render
from trainer.config.schema import LocalSource

NAMES = [
    "csr",
    "csr_h100",
    "e5",
    "quickstart",
    "splade",
    "splade_h100",
    "splade_large",
    "splade_large_h100",
    "splade_regular",
    "splade_regular_h100",
]
NORBERT_CSR = "thivy/norbert4-base-scandinavian-embedding"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(name):
    return load_config(find_config(name)).config


def test_the_shipped_configs_are_these_ten():
    files = {file.name for file in (ROOT / "configs").glob("*.yaml")} - {"pins.yaml"}  # a lock file is the user's own
    assert sorted(config_name(ROOT / "configs" / name) for name in files) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_loads_and_show_prints_it_again(name, tmp_path):
    loaded = load_config(find_config(name))
    file = tmp_path / f"{name}.yaml"
    file.write_text(render(loaded))
    assert load_config(file).config == loaded.config


@pytest.mark.parametrize(
    ("name", "base", "architecture", "length", "batch", "eval_batch", "accumulation", "device"),
    [
        ("splade", "ltg/norbert3-xs", "inference-free-splade", 256, 16, 16, 1, "mps"),
        ("splade_regular", "ltg/norbert3-base", "splade", 256, 16, 16, 1, "mps"),
        ("splade_large", "ltg/norbert4-base", "inference-free-splade", 512, 8, 8, 2, "mps"),
        ("csr", NORBERT_CSR, "csr", 512, 32, 32, 1, "mps"),
        ("e5", "intfloat/multilingual-e5-small", "inference-free-splade", 224, 12, 16, 1, "mps"),
        ("splade_h100", "ltg/norbert4-large", "inference-free-splade", 512, 32, 64, 1, "cuda"),
        ("splade_regular_h100", "ltg/norbert4-large", "splade", 512, 32, 64, 1, "cuda"),
        ("splade_large_h100", "ltg/norbert4-large", "inference-free-splade", 512, 32, 64, 1, "cuda"),
        ("csr_h100", NORBERT_CSR, "csr", 512, 128, 256, 1, "cuda"),
        ("quickstart", "from-scratch", "inference-free-splade", 128, 32, 32, 1, "cpu"),
    ],
)
def test_shipped_values(name, base, architecture, length, batch, eval_batch, accumulation, device):
    config = config_of(name)
    training = config.training
    assert (config.model.base_model, config.model.architecture) == (base, architecture)
    assert (training.max_seq_length, training.per_device_train_batch_size) == (length, batch)
    assert (training.per_device_eval_batch_size, training.gradient_accumulation_steps) == (eval_batch, accumulation)
    assert config.hardware.device == device
    assert config.datasets.sampling_strategy == ("proportional" if name == "quickstart" else "round_robin")
    assert not config.hub.push


def test_weights_and_rates_of_the_starter_config():
    config = config_of("splade")
    assert (config.loss.query_regularizer_weight, config.loss.document_regularizer_weight) == (0, 3e-3)
    assert (config.training.learning_rate, config.training.query_learning_rate) == (2e-5, 1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("h100")])
def test_the_h100_overlay(name):
    training = config_of(name).training
    assert config_of(name).hardware.tf32
    assert training.bf16
    assert training.torch_compile
    assert (training.dataloader_num_workers, training.dataloader_pin_memory) == (8, True)
    assert training.dataloader_prefetch_factor == 4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_all_but_the_quickstart_train_on_the_same_three_sets_with_pinned_sources(name):
    datasets = config_of(name).datasets
    sources = [datasets.nli, datasets.ddsc, *(getattr(datasets.scandi_qa, s) for s in SCANDI_QA_SOURCES)]
    assert datasets.scandi_qa.enabled
    assert all(source.enabled and source.revision for source in sources)


SCANDI_QA_SOURCES = ("norquad", "noropenbookqa", "scandiqa", "supervised_da", "paws_x")


def test_no_two_shipped_configs_share_a_run_folder():
    assert len({load_config(find_config(name)).name for name in NAMES}) == len(NAMES)


def test_a_copy_under_a_new_name_is_a_config_of_its_own(tmp_path):
    text = find_config("splade").read_text()
    copy = tmp_path / "training_config_mine.yaml"
    copy.write_text(
        text.replace("ltg/norbert3-xs", "ltg/norbert3-small").replace("train_batch_size: 16", "train_batch_size: 4")
    )
    loaded = load_config(copy, ["datasets.ddsc.enabled=false"])
    assert (loaded.name, loaded.config.model.base_model) == ("mine", "ltg/norbert3-small")
    assert not loaded.config.datasets.ddsc.enabled


def test_an_unknown_config_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"there is no config 'slpade' in configs. Did you mean 'splade'\?"):
        find_config("slpade")


def test_the_json_schema_in_the_checkout_is_current():
    assert json.loads((ROOT / "configs/schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_names_the_schema_for_editors_and_how_to_run_it(name):
    head = find_config(name).read_text().splitlines()
    assert head[0] == "# yaml-language-server: $schema=schema.json"
    command = "make train" if name == "quickstart" else f"make train CONFIG={name}"
    assert f"# Run: {command}" in head


def schema_keys(model):
    """Every key of a section and the sections under it."""
    for key, field in model.model_fields.items():
        yield model.__name__, key
        for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(option, type) and hasattr(option, "model_fields"):
                yield from schema_keys(option)


def test_every_key_of_the_schema_is_read_by_the_code():
    code = [
        file for part in ("trainer", "evaluate") for file in (ROOT / part).rglob("*.py") if file.name != "schema.py"
    ]
    read = set()
    for file in code:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)  # getattr(config, "norquad"), the names of column roles
    # the training section goes to the library whole: test_every_training_key_reaches_the_library in test_arguments.py
    keys = {
        (section, key)
        for section, key in [*schema_keys(Config), *schema_keys(LocalSource)]
        if section != "TrainingConfig"
    }
    assert len(keys) > 60
    assert {key for _, key in keys} - read == set()


def test_every_line_of_a_shipped_config_sets_a_key_of_the_schema():
    keys = {key for _, key in [*schema_keys(Config), *schema_keys(LocalSource)]} | {"extends"}
    for file in (ROOT / "configs").rglob("*.yaml"):
        written = re.findall(r"^\s*(\w+):", file.read_text(), re.MULTILINE)
        assert written
        assert set(written) <= keys, file
