import ast
import json
import re
from zipfile import ZipFile

import pytest

from evaluate.dense import split_dense
from evaluate.subject import open_subject
from tests.conftest import ROOT, TINY, run_trainer
from trainer.config import ConfigError, is_revision, load_config
from trainer.export.ml_commons_reader import read_vectors

SOURCES = sorted(path for package in ("trainer", "evaluate") for path in (ROOT / package).rglob("*.py"))
# Calls that hand a text to a shell, or a pickle to Python.
FORBIDDEN = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load",
    "pickle.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "shutil.unpack_archive",
    "tarfile.open", "tarfile.TarFile", "zipfile.ZipFile",
}  # fmt: skip
# Calls of these, whatever they are called on or imported as.
FORBIDDEN_METHODS = {"extractall", "extract", "unpack_archive", "ZipFile", "TarFile", "system", "popen"}
# The model of an export, zipped and read back at once; zipfile keeps every member within the folder (a test below).
ALLOWED = {
    "trainer/export/ml_commons.py": ["ZipFile"] * 3,  # reads and writes members; extracts none
    "trainer/export/ml_commons_reader.py": ["ZipFile", "zipped.extractall"],
}


def calls(tree):
    """(dotted name, call) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def offences(text):
    """Calls that are forbidden, that ask for a shell, or that read a pickle."""
    found = []
    for name, call in calls(ast.parse(text)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in FORBIDDEN or name.rpartition(".")[2] in FORBIDDEN_METHODS:
            found.append(name)
        if "shell" in keywords:
            found.append(f"{name} with a shell")
        if name.startswith("subprocess.") and call.args and not isinstance(call.args[0], ast.List):
            found.append(f"{name} of something that is no list")
        if name == "torch.load" and not (
            isinstance(keywords.get("weights_only"), ast.Constant) and keywords["weights_only"].value is True
        ):
            found.append("torch.load of a pickle")
    return found


def test_no_code_of_ours_builds_a_shell_command_or_reads_a_pickle():
    assert len(SOURCES) > 60
    found = {str(path.relative_to(ROOT)): offences(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: offence for name, offence in found.items() if offence} == ALLOWED


@pytest.mark.parametrize(
    "text",
    [
        "os.system(x)", "subprocess.run(x, shell=True)", "subprocess.run(x)", "torch.load(x)", "yaml.load(x, L)", "eval(x)",
        "torch.load(x, weights_only=False)", "subprocess.run(f'rm {x}')", "TarFile(x).extractall()", "unpack_archive(x)",
    ],
)  # fmt: skip
def test_what_would_be_an_offence_is_found(text):
    assert offences(text)


def test_a_zip_whose_names_lead_out_of_its_folder_writes_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a/b"))
    (tmp_path / "a/b").mkdir(parents=True)
    with ZipFile(tmp_path / "model.zip", "w") as zipped:
        for name in ("../escaped", "../../escaped", f"{tmp_path}/escaped", "escaped"):
            zipped.writestr(name, "harm")
    with pytest.raises(ValueError):  # there is no model in it
        read_vectors(tmp_path / "model.zip", [])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.zip"]


def test_a_config_full_of_shell_commands_runs_none_of_them(tiny):
    folder = tiny.parent
    harm = [f"{before}touch harmed{number}{after}" for number, (before, after) in enumerate(
        [("$(", ")"), ("`", "`"), ("; ", " #"), ("| ", ""), ("\n", "\n"), ("&& ", ""), ("' ; ", " ; '")]
    )]  # fmt: skip
    quoted = ", ".join('"' + text.replace("\n", "\\n") + '"' for text in harm)
    rows = "\n".join(f'{{"anchor": "spørsmål {n}", "positive": "$(touch harmed) {n}"}}' for n in range(20))
    name = "$(touch harmed) ;touch harmed; .jsonl"
    (folder / name).write_text(rows)
    text = TINY.replace("quickstart: {}", f'mine: {{source: "{name}", language: "$(touch harmed)"}}')
    text = text.replace("max_steps: 6", "max_steps: 2\n  dataloader_num_workers: 1")
    tiny.write_text(text + f'model_card: {{model_name: "{harm[0]}", license: "{harm[1]}", tags: [{quoted}]}}\n')
    for command in ("show", "check", "train"):
        result = run_trainer(folder, command, "tiny.yaml")
        assert result.returncode == 0, result.stderr
    assert not [path.name for path in folder.rglob("harmed*")]
    assert "touch harmed0" in (folder / "models/tiny/final/README.md").read_text()  # it came all the way, as a text


def test_tensorboard_listens_on_loopback_alone():
    host = (ROOT / "docker/run").read_text()
    assert re.findall(r"--host (\S+)", host) == ["127.0.0.1"]
    ports = re.findall(
        r'^\s*(?:ports:\s*\[|-\s*)"?([^"\s]*:\d+)"?\]?\s*$', (ROOT / "compose.yaml").read_text(), re.MULTILINE
    )
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_the_threat_model_names_files_that_exist():
    text = (ROOT / "docs/threat_model.md").read_text()
    named = set(re.findall(r"`((?:trainer|tests|docker|configs)/[\w./]+|compose\.yaml)`", text))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert "docs/threat_model.md" in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------------- revisions
# The hub's client opens <cache>/refs/<revision>: of /dev/zero, it would read until there is no memory left.
NO_REVISIONS = [
    "/dev/zero",
    "/proc/self/mem",
    "../../etc/passwd",
    "a/..",
    "a//b",
    "a/",
    "a b",
    "a:b",
    "a\nb",
    "@{0}",
    "\x00",
    "",
]


def test_only_names_that_git_knows_are_revisions():
    assert [text for text in NO_REVISIONS if is_revision(text)] == []
    names = ["main", "refs/pr/1", "v1.0-beta_2", "norsk/æøå", "386ba2dc5ae5f95fec86d580c5fc4af34d380126"]
    assert [text for text in names if not is_revision(text)] == []


@pytest.mark.parametrize("revision", NO_REVISIONS)
def test_no_revision_reaches_a_file_that_is_not_in_the_cache(tmp_path, revision):
    file = tmp_path / "a.yaml"
    file.write_text(TINY)
    section = {"source": "owner/name", "revision": revision}
    with pytest.raises(ConfigError) as found:
        load_config(file, [f"datasets.other={json.dumps(section)}"])
    says = "'datasets.other.revision' must be a commit, tag or branch, not "
    assert says in found.value.format_message()
    with pytest.raises(ConfigError, match="--revision must be a commit, tag or branch"):
        open_subject(None, "owner/name", revision)
    if revision:
        with pytest.raises(ConfigError, match="a revision is a commit, tag or branch"):
            split_dense(f"owner/name@{revision}")
