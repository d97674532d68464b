import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, TINY
from trainer.config import ConfigError, load_config, render
from trainer.config.tree import TOO_LARGE, parse, read_file


def write(folder, text, name="my.yaml"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def error_of(folder, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    message = caught.value.format_message()
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def changed(old, new):
    assert old in TINY
    return TINY.replace(old, new)


def line_of(text, part):
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


# ---------------------------------------------------------------------------------- YAML 1.2
def test_norwegian_language_code_survives_yaml(tmp_path):
    values, _ = read_file(write(tmp_path, "model: {languages: [no, da, sv]}"))
    assert values["model"]["languages"] == ["no", "da", "sv"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("100_000", 100_000),
        ("0o17", 15),
        ("0x1f", 31),
        ("010", 10),
        ("yes", "yes"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("true", True),
        ("null", None),
        ("", None),
        ("'2e-5'", "2e-5"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text, value):
    found = parse(f"key: {text}", "file")[0]["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_value_remembers_its_line(tmp_path):
    _, origins = read_file(write(tmp_path, "a:\n  b: 1\n  c:\n    - x\n"))
    assert [origins[path].line for path in [("a",), ("a", "b"), ("a", "c"), ("a", "c", 0)]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: duplicate key 'a', first given on line 1"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", ":1: a config is a mapping"),
        ("a: &x [*x]\n", "too deeply nested"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", ":2: keys must be plain words; merge keys (<<) are not read"),
        ("a: !!python/object:os.system x\n", "is not allowed"),
        ("a: b: c\n", ":1: not valid YAML"),
    ],
)
def test_malformed_yaml_is_one_line_with_its_place(tmp_path, text, says):
    assert says in error_of(tmp_path, text)


def test_a_malformed_override_is_named_with_its_key_and_the_way_out(tmp_path):
    message = error_of(tmp_path, TINY, "model.prompts.document=passage: ")
    assert message.startswith("--set model.prompts.document=passage: : not valid YAML: ")
    assert message.endswith('Should it be a text, put it in quotes: model.prompts.document="…"')


@pytest.mark.parametrize(
    "brackets", [25, 900_000]
)  # so many end a process by a segmentation fault in libyaml's composer
def test_lists_in_lists_are_refused_however_deep(tmp_path, brackets):
    assert error_of(tmp_path, "a: " + "[" * brackets + "x" + "]" * 25).endswith(":1: " + TOO_LARGE)


def test_an_override_that_is_not_utf_8_is_named(tmp_path):
    message = error_of(tmp_path, TINY, "model_card.model_name=\udce6")
    assert message == "--set model_card.model_name=\\udce6: not a text in UTF-8"


def test_aliases_that_multiply_stop_at_once(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    start = time.process_time()
    assert "too large" in error_of(tmp_path, bomb)
    assert time.process_time() - start < 1


# ---------------------------------------------------------------------------------- extends and overrides
def test_a_child_changes_one_entry_of_a_mapping_and_keeps_the_others(tmp_path):
    write(tmp_path, TINY, "base.yaml")
    loaded = load_config(write(tmp_path, "extends: base.yaml\ntraining: {learning_rate: 5e-4}\n"))
    assert loaded.config.training.learning_rate == 5e-4
    assert loaded.config.training.query_learning_rate == 1e-2
    assert loaded.where("training", "learning_rate").endswith("my.yaml:2")
    assert loaded.where("training", "eval_steps").endswith(f"base.yaml:{line_of(TINY, 'eval_steps')}")


def test_later_overlays_win_over_earlier_ones_and_the_file_over_all(tmp_path):
    write(tmp_path, TINY, "base.yaml")
    write(tmp_path, "training: {seed: 1, logging_steps: 1, eval_steps: 2}", "one.yaml")
    write(tmp_path, "training: {seed: 2, logging_steps: 2}", "two.yaml")
    text = "extends: [base.yaml, one.yaml, two.yaml]\ntraining: {seed: 3}"
    training = load_config(write(tmp_path, text)).config.training
    assert (training.seed, training.logging_steps, training.eval_steps) == (3, 2, 2)


def test_extends_in_a_circle_is_named(tmp_path):
    write(tmp_path, "extends: my.yaml", "other.yaml")
    assert "circle" in error_of(tmp_path, "extends: other.yaml")


def test_a_parent_that_is_not_there_is_named_with_its_line(tmp_path):
    message = error_of(tmp_path, "model: {}\nextends: nothing.yaml")
    assert "my.yaml:2" in message
    assert "nothing.yaml" in message


def test_any_key_can_be_overridden(tmp_path):
    file = write(tmp_path, TINY)
    loaded = load_config(
        file, ["training.max_steps=50", "model_card.language=[no, da]", "datasets.mine.source=./x.jsonl"]
    )
    assert loaded.config.training.max_steps == 50
    assert loaded.config.model_card.language == ["no", "da"]
    assert loaded.config.datasets.local["mine"].source == "./x.jsonl"
    assert loaded.where("training", "max_steps") == "--set training.max_steps=50"


# ---------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "learning_rate: 1e-3",
            "learnin_rate: 1e-3",
            "unknown key 'training.learnin_rate'. Did you mean 'learning_rate'?",
        ),
        ("architecture: inference-free-splade", "architecture: spalde", "Did you mean 'splade'?"),
        ("max_steps: 6", "max_steps: six", "'training.max_steps' must be a whole number, not the text 'six'"),
        ("max_steps: 6", "max_steps: 6.5", "'training.max_steps' must be a whole number, not 6.5"),
        ("max_steps: 6", "bf16: yes", "'training.bf16' must be true or false, not the text 'yes'"),
        ("learning_rate: 1e-3", "learning_rate: -1", "'training.learning_rate' must be greater than 0, not -1"),
        ("learning_rate: 1e-3", "learning_rate: .nan", "must be a finite number"),
        ("quickstart: {}", "quickstat: {}", "Did you mean 'quickstart'?"),
        ("  save_steps: 2", "  save_steps: 3", "must be a multiple of eval_steps (2)"),
        ("  architecture: inference-free", "  use_router: false\n  architecture: inference-free", "needs router"),
        ("  architecture: inference-free-splade", "  architecture: splade", "has none. Remove it"),
        ("document_regularizer_weight: 1e-3", "document_regularizer_weight: 0", "documents stay dense"),
        (
            "1e-3}\ndatasets",
            "1e-3, target_document_dims: 90}\ndatasets",
            "'loss.target_document_dims' (90) finds the weight",
        ),
        ("document_regularizer_weight: 1e-3", "target_document_dims: 90, target_query_dims: 9", "are their own words"),
        (
            "document_regularizer_weight: 1e-3",
            "target_document_dims: 90, document_dims_cap: 90",
            "must be less than target",
        ),
        ("loss: {type: splade", "loss: {type: csr", "needs splade"),
        ("hidden_size: 64", "hidden_size: 63", "multiple of num_attention_heads"),
        ("base_model: from-scratch", "base_model: ltg/norbert3-xs", "needs 'model.revision'"),
        ("quickstart: {}", "quickstart: {enabled: false}", "has no set that is enabled"),
        (
            "quickstart: {}",
            "mine: {source: org/data, columns: {anchor: a, positive: b}}",
            "needs 'datasets.mine.revision'",
        ),
        ("quickstart: {}", "mine: {source: org/data, revision: main}", "needs 'datasets.mine.columns'"),
        ("hardware: {device: cpu}", "hub: {push: true}", "'hub.push' needs 'hub.repo'"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_what_to_do(tmp_path, old, new, says):
    text = changed(old, new)
    message = error_of(tmp_path, text)
    assert says in message
    assert message.startswith(f"{tmp_path}/my.yaml:")


def test_the_line_of_an_error_is_the_line_of_the_key(tmp_path):
    text = changed("  eval_steps: 2", "  eval_step: 2")
    assert error_of(tmp_path, text).startswith(f"{tmp_path}/my.yaml:{line_of(text, 'eval_step:')}:")


def test_a_missing_key_is_named_with_its_meaning(tmp_path):
    message = error_of(tmp_path, changed("  base_model: from-scratch\n", ""))
    assert "missing key 'model.base_model': A Hugging Face repository" in message


def test_regular_splade_needs_a_query_weight(tmp_path):
    text = changed("inference-free-splade", "splade").replace("  query_learning_rate: 1e-2\n", "")
    assert "'loss.query_regularizer_weight' must be more than 0" in error_of(tmp_path, text)


def test_remote_code_needs_a_full_commit(tmp_path):
    for revision, allowed in (("main", False), ("386ba2d", False), ("386ba2dc5ae5f95fec86d580c5fc4af34d380126", True)):
        text = changed(
            "  base_model: from-scratch",
            f"  base_model: ltg/norbert4-base\n  revision: {revision}\n  trust_remote_code: true",
        ).replace(next(line for line in TINY.splitlines() if "from_scratch" in line), "")
        if allowed:
            assert load_config(write(tmp_path, text)).config.model.trust_remote_code
        else:
            assert "full commit hash" in error_of(tmp_path, text)


def test_two_configs_of_one_output_folder_are_refused(tmp_path):
    write(tmp_path, TINY, "training_config_my.yaml")
    assert "would write to models/my" in error_of(tmp_path, TINY)


def test_two_configs_of_one_hub_repository_are_refused(tmp_path):
    text = TINY + "hub: {repo: org/model}\n"
    write(tmp_path, text, "other.yaml")
    assert "other.yaml pushes to the same 'hub.repo' org/model" in error_of(tmp_path, text)


# ---------------------------------------------------------------------------------- show
def test_what_show_prints_is_the_same_config(tmp_path):
    first = load_config(write(tmp_path, TINY))
    shown = render(first)
    second = load_config(write(tmp_path / "again", shown))
    assert second.config == first.config
    assert f"my.yaml:{line_of(TINY, 'max_steps')}" in next(line for line in shown.splitlines() if "max_steps" in line)
    assert "# default" in next(line for line in shown.splitlines() if "weight_decay" in line)


def test_show_keeps_a_section_in_which_nothing_is_set(tmp_path):
    first = load_config(write(tmp_path, TINY), ["model.prompts={query: null, document: null}"])
    assert first.config.model.prompts is not None
    for shown in (render(first), render(first, origins=False)):
        assert load_config(write(tmp_path / "again", shown)).config == first.config


@pytest.mark.parametrize(
    "name", ["no", "true", "2e-5", "a: b", "#1", "", " x", "null", "- a", "[x]", "it's", "å\\n", "a\nb"]
)
def test_show_quotes_a_text_that_yaml_would_read_otherwise(tmp_path, name):
    text = TINY + "model_card: {}\n"
    loaded = load_config(write(tmp_path, text))
    card = loaded.config.model_card.model_copy(update={"model_name": name, "tags": [name]})
    changed_config = loaded.config.model_copy(update={"model_card": card})
    shown = render(type(loaded)(loaded.name, loaded.file, changed_config, loaded.origins))
    assert load_config(write(tmp_path / "again", shown)).config.model_card == card


# ---------------------------------------------------------------------------------- speed
@pytest.mark.parametrize(
    "arguments", [["--help"], ["show", "quickstart"], ["train", "quickstart", "--set", "training.x=1"]]
)
def test_help_show_and_errors_import_no_heavy_library(arguments):
    code = (
        "import sys, runpy; sys.argv = ['trainer', *sys.argv[1:]]\n"
        "try: runpy.run_module('trainer', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sentence_transformers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True)


def test_a_key_is_read_under_the_name_that_it_had_in_older_runs(tmp_path):
    file = tmp_path / "older.yaml"
    file.write_text(TINY.replace("loss: {type: splade,", "loss: {type: splade, penalty: l1,"))
    loaded = load_config(file)
    assert loaded.config.loss.regularizer == "l1"
    assert loaded.where("loss", "regularizer").endswith("older.yaml:17")
    file.write_text(TINY.replace("loss: {type: splade,", "loss: {type: splade, penalty: l1, regularizer: flops,"))
    with pytest.raises(ConfigError, match=r"older.yaml:17: unknown key 'loss.penalty'"):
        load_config(file)
