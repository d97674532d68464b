"""The documents keep what they promise: links lead somewhere, commands parse, configs load, and Python is run."""

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from evaluate.cli import main as evaluate_main
from tests.conftest import ROOT
from tests.test_shipped_configs import NAMES
from trainer.cli import main as trainer_main
from trainer.config import Config, ConfigError, find_config, load_config
from trainer.config.words import split_pairs

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE))
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("docs/*.md"))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
GROUPS = {"trainer": trainer_main, "evaluate": evaluate_main}
# What a page calls the config that its reader is going to write.
READERS_OWN = {"mine", "path/to/mine.yaml"}
# Variables that the Makefile or docker/run read.
VARIABLES = set(re.findall(r"\$\(?\{?([A-Z_]+)", MAKEFILE + (ROOT / "docker/run").read_text()))


def blocks(page, language):
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)


def printed_commands(page):
    """Every command of a page: the lines of its console blocks that a reader types, and those within its sentences."""
    typed = [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:make|docker|\.venv/bin/\w+|python3? -m) [^`]+)`", prose)
    named += [f"make check CONFIG=splade {text}" for text in re.findall(r"`(SET=[^`]+)`", prose)]
    named += [f"make export CONFIG=splade TO=qdrant {text}" for text in re.findall(r"`(ARGS=[^`]+)`", prose)]
    for line in typed + [" ".join(text.split()) for text in named]:
        words = shlex.split(line, comments=True)
        yield from (list(part) for is_and, part in itertools.groupby(words, "&&".__eq__) if not is_and)


COMMANDS = sorted({(page, shlex.join(words)) for page in PAGES for words in printed_commands(page)})


# ------------------------------------------------------------------------------------------- the pages
def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 160


def headings(text):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text()), link


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(([^)\s#]+)", README))
    assert linked >= set(PAGES) - {"README.md"}


def test_every_file_that_a_page_names_exists():
    for page, text in TEXTS.items():
        for name in re.findall(r"`((?:trainer|evaluate|tests|docker|configs|docs)/[\w./-]+)`", text):
            assert (ROOT / name).exists() or "_mine" in name, f"{page}: {name}"


def test_every_key_that_a_page_names_is_in_the_schema():
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    named = re.compile(rf"`({'|'.join(sections)})\.([a-z_0-9]+)[^`]*`")
    keys = {(page, *key) for page, text in TEXTS.items() for key in named.findall(text)}
    assert len(keys) > 10
    assert [key for key in keys if key[2] not in sections[key[1]]] == []


def test_the_readme_table_lists_every_config():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(NAMES)


def test_the_documents_have_no_blank_left_to_fill():
    settings = set()
    for name in ("compose.yaml", "docker/run", "Makefile"):
        settings |= set(re.findall(r"\b[A-Z]+_[A-Z]+(?:_[A-Z]+)*\b", (ROOT / name).read_text()))
    for name in (*PAGES, "CHANGELOG.md"):
        found = set(re.findall(r"\b(?:TODO|FIXME|XXX|[A-Z]+_[A-Z]+(?:_[A-Z]+)*)\b", (ROOT / name).read_text()))
        assert found <= settings, name


def test_the_project_speaks_of_no_package_registry_and_no_machine_path():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    banned = re.compile(
        "|".join(["py" + r"pi\.org", "python" + "hosted", "registry\\." + "npmjs", "/" + "work/", "/" + "opt/wheels"])
    )
    for name in files:
        if not name.endswith((".jsonl", ".png")):
            assert not banned.search((ROOT / name).read_text(encoding="utf-8")), name


# ------------------------------------------------------------------------------------------- commands
def test_make_alone_prints_every_target_with_its_sentence():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in TARGETS:
        assert re.search(rf"^{target} +\S", printed, re.MULTILINE), target
    for name in NAMES:
        assert name in printed


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_every_command_has_help(group):
    for name, command in group.commands.items():
        result = CliRunner().invoke(command, ["--help"])
        assert result.exit_code == 0
        assert len(command.help) > 20, name


def test_the_pages_print_the_commands_that_a_reader_starts_with():
    assert {("README.md", "make train"), ("README.md", "make test")} <= set(COMMANDS)
    assert len(COMMANDS) > 50


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_printed_command_parses(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    require_parses(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "make trian",
        "make train CONFIG=spalde",
        "make train CONFIG=splade STEPS=3",
        'make train CONFIG=splade SET="training.learnin_rate=1"',
        'make export CONFIG=splade TO=qdrant ARGS="--upsrt http://localhost"',
        "python -m trainer train splade --resum",
        "python -m evaluate sparsty",
        "python -m tests.benchmarks.nothing",
        "python -m tests.benchmarks.sparsity weight --wieght 1",
        "docker compose run --rm trian quickstart",
        "docker compose -f docker/nothing.yaml up tensorboard",
    ],
)
def test_a_mistyped_command_does_not(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, click.ClickException)):
        require_parses(shlex.split(command))


def require_parses(words):
    """Raise where a command names a target, config, key, module, option, service or file that does not exist."""
    program, *rest = words
    if program == "make":
        require_make(rest)
    elif Path(program).name in ("python", "python3"):
        assert rest[0] == "-m"
        require_module(rest[1], rest[2:])
    elif program == "docker":
        require_docker(rest)
    else:
        assert program in ("export", "cmp", "chromium", "hf", ".venv/bin/ruff"), program


def require_make(words):
    values = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= TARGETS
    assert values.keys() <= VARIABLES
    values["CONFIG"] = require_config(values.get("CONFIG", "quickstart"), values.get("SET", ""))
    printed = subprocess.run(
        ["make", "-n", *targets, *(f"{name}={value}" for name, value in values.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MAKEFLAGS": ""},
    ).stdout.replace("\\\n", " ")
    for line in printed.splitlines():
        if " docker/run " in line:
            found = [re.sub(r"\$(\w+)", lambda name: values.get(name[1], ""), word) for word in shlex.split(line)]
            kind, *arguments = found[found.index("docker/run") + 1 :]
            if kind in GROUPS:
                require_module(kind, arguments)


def require_config(name, overrides):
    """The config, or one of the reader's own as the starter config. Its overrides are keys that exist."""
    name = "splade" if name in READERS_OWN else name
    load_config(find_config(name), split_pairs(overrides.replace("<commit>", "a" * 40)))
    return name


def require_module(module, arguments):
    found = importlib.util.find_spec(module)
    assert found, module
    if module in GROUPS and arguments and arguments != ["--help"]:
        name, *options = arguments
        assert name in GROUPS[module].commands, name
        context = GROUPS[module].commands[name].make_context(name, options)
        if context.params.get("config"):
            require_config(context.params["config"], "")
    elif module.startswith("tests."):
        source = Path(found.origin).read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("-")), arguments


def require_docker(words):
    if words[0] != "compose":
        assert words == ["stop"]
        return
    words, files = words[1:], ["compose.yaml"]
    while words[0] == "-f":
        files, words = [*files, words[1]], words[2:]
    assert all((ROOT / file).is_file() for file in files), files
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    action, *rest = [word for word in words if word != "--rm"]
    assert action in ("up", "run")
    assert rest[0] in services, rest
    if action == "run":
        module, *first = services[rest[0]]["entrypoint"][2:]
        require_module(module, [*first, *rest[1:]])


# ------------------------------------------------------------------------------------------- snippets
@pytest.mark.parametrize(
    ("page", "block"), [(page, block) for page in PAGES for block in blocks(page, "yaml")], ids=lambda text: text[:30]
)
def test_every_yaml_snippet_is_part_of_a_config(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, errors = tmp_path / "snippet.yaml", []
    for name in ("splade", "csr"):
        starter = ROOT / f"configs/training_config_{name}.yaml"
        file.write_text(f"extends: {starter}\n" + block.replace("<commit>", "a" * 40))
        try:
            load_config(file)
        except ConfigError as error:
            errors.append(error.format_message())
    assert len(errors) < 2, errors


def test_the_snippet_of_the_readme_searches(trained, capsys):
    (block,) = blocks("README.md", "python")
    exec(block.replace("models/quickstart", "models/tiny"), names := {})  # noqa: S102, the README's own lines
    assert names["queries"].shape[1] == names["documents"].shape[1]
    assert names["model"].similarity(names["queries"], names["documents"]).shape == (1, 2)
    assert names["model"].decode(names["documents"][0], top_k=5)
    assert capsys.readouterr().out
