import re
import subprocess

import pytest
from click.testing import CliRunner

from evaluate.cli import main as evaluate_main
from tests.conftest import ROOT
from tests.test_shipped_configs import NAMES
from trainer.cli import main as trainer_main

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE))


def test_every_make_command_in_the_readme_exists():
    used = set(re.findall(r"\bmake ([a-z0-9-]+)", README))
    assert {"train", "test"} <= used
    assert used <= TARGETS


def test_make_alone_prints_every_target_with_its_sentence():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in TARGETS:
        assert re.search(rf"^{target} +\S", printed, re.MULTILINE), target
    for name in NAMES:
        assert name in printed


@pytest.mark.parametrize("group", [trainer_main, evaluate_main], ids=["trainer", "evaluate"])
def test_every_command_has_help(group):
    for name, command in group.commands.items():
        result = CliRunner().invoke(command, ["--help"])
        assert result.exit_code == 0
        assert len(command.help) > 20, name


def test_the_readme_table_lists_every_config():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(NAMES)


def test_the_project_speaks_of_no_package_registry_and_no_machine_path():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    banned = re.compile(
        "|".join(["py" + r"pi\.org", "python" + "hosted", "registry\\." + "npmjs", "/" + "work/", "/" + "opt/wheels"])
    )
    for name in files:
        if not name.endswith((".jsonl", ".png")):
            assert not banned.search((ROOT / name).read_text(encoding="utf-8")), name


def test_the_documents_have_no_blank_left_to_fill():
    settings = set()
    for name in ("compose.yaml", "docker/run", "Makefile"):
        settings |= set(re.findall(r"\b[A-Z]+_[A-Z]+(?:_[A-Z]+)*\b", (ROOT / name).read_text()))
    for name in ("README.md", "CHANGELOG.md", "configs/README.md"):
        found = set(re.findall(r"\b(?:TODO|FIXME|XXX|[A-Z]+_[A-Z]+(?:_[A-Z]+)*)\b", (ROOT / name).read_text()))
        assert found <= settings, name
