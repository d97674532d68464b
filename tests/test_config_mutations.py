"""Mutates the shipped configs: whatever comes out is a config that round-trips through `show`, or one line, at once."""

import copy
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.test_plan import decisions_of
from trainer.config import ConfigError, load_config, render

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("training_config_*.yaml"))
VALUES = [
    None, True, False, 0, -1, 1, 10**30, -(10**30), 10**4000, 2**63, 1.5, -0.0, 1e308, 1e-320, float("inf"), float("nan"),
    "", " ", "no", "null", "~", "1e-3", "x" * 100_000, "æøå", "𝒳", "‮⁦", "​", "\x00", "\ud800", "\t", "a\nb", "a\r\nb", "\x85",
    "\u2028", "../../etc/passwd", "$(touch x)", "`id`", "; rm -rf /", "/dev/zero", "/proc/self/mem", "~", "~nobody/x",
    "org/name", "%s%s%s", "{0}", "*", "?*[", "a" * 5000 + "/b", [], {}, [[]], [None], [{}], {"a": None}, {"": ""},
    {"x" * 10_000: 1}, {"source": "x"}, {"source": "org/name", "revision": "main"}, list(range(50)), ["x"] * 500,
]  # fmt: skip
TEXTS = [
    "\t", "\x00", "\ufeff", "\x1b[2J", ": ", "- ", "? ", "&a ", "*a", "*a *a", "<<: *a\n", "!!python/object:os.system x",
    "!!binary aGk=", "!!set {a}", "%YAML 1.1\n", "---\n", "...\n", "'", '"', "{", "}", "[", "]", "|", ">", "#", "@",
    "\u2028", "\x85", "\r", "\n", "\n\n  ", "🦄", "\u202e", "é" * 100, "[" * 400, "{a: " * 400, "- " * 400, "a: &x [*x]\n",
    "extends: .\n", "extends: /dev/zero\n", "extends: training_config_splade.yaml\n", "0x", "0o8", "1_", "-_",
    "1__0", ".inf", "9" * 5000, "1e999999", "-.inf", "= ",
]  # fmt: skip
BOMB = "bomb: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"bomb{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
# A plan takes 0.5 to 1.2 s of a processor, for it builds a model; what is guarded against takes minutes.
SECONDS, MEMORY = 5.0, 200e6


class Slow(Exception):
    """A load that does not end by itself."""


def tree_of(file):
    class Plain(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict] = {}

    return yaml.load(file.read_text(), Loader=Plain)


def places(value, path=()):
    """Paths of everything in a tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(tree, rng):
    """One change of a key or a value."""
    path = rng.choice([path for path in places(tree) if path])
    parent, key = at(tree, path[:-1]), path[-1]
    match rng.choice(["value", "value", "value", "delete", "nest", "deep", "rename", "move", "list"]):
        case "value":
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        case "delete":
            del parent[key]
        case "nest":
            parent[key] = {str(key): parent[key]}
        case "deep":
            for _ in range(rng.choice([5, 18, 25, 60])):
                parent[key] = rng.choice([{"a": parent[key]}, [parent[key]]])
        case "rename" if isinstance(parent, dict):
            parent[str(rng.choice([*TEXTS, key.upper(), key[:-1], key + "​", "x" * 20_000, "a.b", "1", ""]))] = (
                parent.pop(key)
            )
        case "move":
            other = at(tree, rng.choice([path for path in places(tree)]))
            if isinstance(other, dict):
                other[str(key)] = parent[key] if not isinstance(parent[key], (dict, list)) else None
        case _:
            parent[key] = [copy.deepcopy(parent[key]) for _ in range(rng.choice([1, 2, 50]))]


def mutate_text(text, rng):
    """One change of the text itself."""
    lines = text.splitlines(keepends=True) or [""]
    place, line = rng.randrange(len(text) + 1), rng.randrange(len(lines))
    match rng.choice(["insert", "insert", "duplicate", "cut", "swap", "indent", "bomb", "byte", "tag"]):
        case "insert":
            return text[:place] + rng.choice(TEXTS) + text[place:]
        case "duplicate":
            return "".join([*lines[:line], lines[line], *lines[line:]])
        case "cut":
            return text[:place]
        case "swap":
            other = rng.randrange(len(lines))
            lines[line], lines[other] = lines[other], lines[line]
            return "".join(lines)
        case "indent":
            lines[line] = rng.choice([" ", "\t", "    ", "- "]) + lines[line]
            return "".join(lines)
        case "bomb":
            return text + BOMB
        case "byte":
            return text[:place] + chr(rng.randrange(0x110000)) + text[place + 1 :]
        case _:
            return text.replace(": ", f": {rng.choice(['!!str ', '!!int ', '!x ', '&a ', '!!float ', '!!bool '])}", 1)


def mutant(rng):
    """A shipped config after one to three changes, as bytes."""
    file = rng.choice(SHIPPED)
    tree = tree_of(file)
    for _ in range(rng.randint(0, 2)):
        if len(tree) > 1:
            mutate_tree(tree, rng)
    kept = {"allow_unicode": True, "sort_keys": False, "Dumper": yaml.SafeDumper}
    text = yaml.dump(tree, **kept).replace("'", "") if rng.random() < 0.5 else yaml.dump(tree, **kept)
    for _ in range(rng.randint(0, 2)):
        text = mutate_text(text, rng)
    return text.encode("utf-8", "surrogatepass")


def assert_one_line(error, places):
    """A refusal is one printable line that begins with one of the places, and exit code 2."""
    message = error.format_message()
    assert error.exit_code == 2
    assert message.splitlines() == [message], repr(message[:300])
    assert message.isprintable(), repr(message[:300])
    assert len(message) < 1100, len(message)
    assert message.startswith(places), message[:300]


def load_and_show(file):
    """The config that loads and round-trips through `show`; None when it is refused. Anything else raises."""
    try:
        loaded = load_config(file)
    except ConfigError as error:
        assert_one_line(error, (f"{file.parent}/", "/proc/self/mem:"))  # the file, or one it extends
        return None
    again = file.with_name("again.yaml")
    for shown in (render(loaded), render(loaded, origins=False)):
        again.write_text(shown, encoding="utf-8")
        assert load_config(again).config.model_dump_json() == loaded.config.model_dump_json()
        again.unlink()
    return loaded


def check(loaded):
    """What `check` makes of it: the embedded data is read and its model built; what is on the hub is said to be there."""
    try:
        return "planned" if decisions_of(loaded) else "nothing"
    except ConfigError as error:
        # the key, or the line of a file that it names
        assert_one_line(
            error, ("model.", "training.", "datasets.", "evaluation.", "hardware.", "loss.", "hub.", "/", "this CPU")
        )
        return "refused by check"


def stop(*_):
    raise Slow


def at_once(command, value):
    """What the command returns; raises when it takes longer. Processor time: on a shared machine the wall's says little."""
    start = time.process_time()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        found = command(value)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert time.process_time() - start < SECONDS, time.process_time() - start
    return found


def try_mutants(folder, monkeypatch, count):
    """How many mutants load, how many of these `check` refuses, and how many were different."""
    (folder / "hardware").symlink_to(CONFIGS / "hardware")
    for file in SHIPPED:
        (folder / file.name).write_bytes(file.read_bytes())
    file, found, seen = folder / "mutant.yaml", Counter(), set()
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads count as processor time
    check(load_config(CONFIGS / "training_config_quickstart.yaml"))  # imports are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def try_one(rng):
        content = mutant(rng)
        seen.add(content)
        file.write_bytes(content)
        if loaded := at_once(load_and_show, file):
            found[at_once(check, loaded)] += 1
        else:
            found["refused"] += 1

    try:
        try_one()
    finally:
        torch.set_num_threads(threads)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, grown
    assert found.total() >= count
    return found, len(seen)


@pytest.mark.slow
def test_three_hundred_mutants_load_and_round_trip_or_are_refused_in_one_line(tmp_path, monkeypatch):
    found, different = try_mutants(tmp_path, monkeypatch, 300)
    assert different > 250
    assert found["refused"] > 100
    assert found["planned"] > 10


@pytest.mark.parametrize(
    "override",
    [
        "=", "x", "." * 50, ".".join("a" * 5000) + "=1", "training.max_steps=" + "[" * 5000, "a=" + "x" * 100_000,
        "training.max_steps=1\nvalue: 2", "training=", "training.max_steps=*a", "datasets.\x1b[2J.source=x", "=\ud800",
        "extends=x", "training.seed=" + "9" * 5000,
    ],
)  # fmt: skip
def test_an_override_of_any_kind_is_one_line(override):
    with pytest.raises(ConfigError) as caught:
        load_config(SHIPPED[0], [override])
    message = caught.value.format_message()
    assert message.isprintable()
    assert len(message) < 1100


@pytest.mark.parametrize(
    "key,value",
    [
        *((f"model.from_scratch.{key}", number) for number in (10**7, 10**9, 2**63, 10**30) for key in (
            "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings",
        )),
        ("model.csr_hidden_dim", 10**9),
        ("training.num_train_epochs", "1e308"),
        *((key, "[" + value + "]" if key == "evaluation.search" else value)
          for key in ("model.base_model", "datasets.mine.source", "evaluation.search")
          for value in ("x" * 300 + ".jsonl", "/" + "y/" * 3000, "~nobody_of_this_name/x")),
    ],
)  # fmt: skip
def test_what_would_take_all_memory_or_cannot_be_a_file_is_refused_before_anything_is_built(tiny, key, value):
    overrides = [f"{key}={value}"]
    if key == "model.base_model":
        overrides.append("model.from_scratch=null")
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, overrides)
    assert f"'{key}" in caught.value.format_message()
    assert_one_line(caught.value, (f"{tiny.parent}/", "--set"))


def test_a_model_of_valid_sizes_with_too_many_parameters_is_refused_with_their_number(tiny):
    sizes = [f"model.from_scratch.{key}={n}" for key, n in (("hidden_size", 8192), ("num_hidden_layers", 100))]
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, sizes)
    # (800 + 512) × 8192 + 100 × (4 × 8192² + 2 × 8192 × 64)
    assert "'model.from_scratch' would have 26,959,151,104 parameters" in caught.value.format_message()


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.max_steps=" + "9" * 30],
        ["training.max_steps=-1", "training.num_train_epochs=1e9", "datasets.sampling_strategy=proportional"],
        ["training.per_device_train_batch_size=" + "9" * 30],
    ],
)
def test_a_run_of_any_length_is_planned_at_once(tiny, overrides):
    assert at_once(check, load_config(tiny, overrides)) == "planned"


@pytest.mark.parametrize("text", ["\0", "a\x1bb", "a\x85b", "a\u2028b", "a\u00a0b", "\U000e0001", "𝒳 æ", "\ta\n"])
def test_a_value_of_any_characters_round_trips_through_show(tiny, text):
    quoted = "".join(f"\\U{ord(character):08x}" for character in text)
    tiny.write_text(tiny.read_text() + f'model_card: {{model_name: "{quoted}", tags: ["{quoted}"]}}\n')
    loaded = load_and_show(tiny)
    assert (loaded.config.model_card.model_name, loaded.config.model_card.tags) == (text, [text])


@pytest.mark.parametrize("architecture", ["splade", "csr"])
def test_a_base_model_that_is_the_whole_disk_is_not_searched_for_code(tiny, architecture):
    overrides = ["model.base_model=/", "model.from_scratch=null", "training.query_learning_rate=null"]
    overrides += [f"model.architecture={architecture}", "loss.query_regularizer_weight=1e-3"]
    if architecture == "csr":
        overrides += ["loss.type=csr", "loss.document_regularizer_weight=null", "loss.query_regularizer_weight=null"]
    assert at_once(check, load_config(tiny, overrides)) == "refused by check"


def test_a_parent_of_gigabytes_is_refused_without_being_read(tmp_path):
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(50 * 2**30)  # takes no space on the disk
    child = tmp_path / "child.yaml"
    child.write_text("extends: huge.yaml\n")
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"huge.yaml:1: the file is larger than 1000 kB"):
        load_config(child)
    assert time.process_time() - start < SECONDS


def test_a_broken_neighbour_with_a_hub_section_of_any_kind_is_no_obstacle(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(SHIPPED[0].read_text() + "\nhub: {repo: org/name}\n")
    for hub in ("[]", "x", "3", "{repo: [org/name]}", "{"):
        (tmp_path / "neighbour.yaml").write_text(f"hub: {hub}\n")
        for name in ("hardware", *(file.name for file in SHIPPED)):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(CONFIGS / name)
        assert load_config(mine).config.hub.repo == "org/name"


@pytest.mark.slow
def test_five_thousand_mutants_load_and_round_trip_or_are_refused_in_one_line(tmp_path, monkeypatch):
    found, different = try_mutants(tmp_path, monkeypatch, 6000)
    print(found, different)
    assert different > 5000
    assert found["refused"] > 2000
    assert found["planned"] > 300
