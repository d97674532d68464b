"""Uploads to a stand-in for the hub: one commit or none, and one line for everything that can go wrong."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.hub import LARGE, Hub

SCRIPT = """
import sys
from pathlib import Path
from trainer.hub.upload import upload, require_repo_name
_, repo, public, *names = sys.argv
require_repo_name(repo)
files = {name: Path(name) for name in names}
print("published", upload(files, repo, public=public == "public", message="a model", echo=print))
"""


@pytest.fixture
def hub():
    with Hub() as found:
        yield found


@pytest.fixture
def files(tmp_path):
    """A small file, and one large enough to be sent apart."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (tmp_path / "model.safetensors").write_bytes(os.urandom(3 * LARGE))
    return tmp_path


def hub_environment(hub, **variables):
    """For a process that asks the stand-in instead of the hub."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_HUB_OFFLINE")}
    return known | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "hf_writer",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    } | variables  # fmt: skip


def send(hub, folder, repo="org/model", visibility="private", **variables):
    names = [file.name for file in sorted(folder.iterdir())]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, repo, visibility, *names],
        cwd=folder, env=hub_environment(hub, **variables), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def refusal(result):
    """The message of the ConfigError, which must be one line."""
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("trainer.config.errors.ConfigError: "), result.stderr
    return message.partition(": ")[2]


def test_an_upload_is_one_commit_into_a_new_private_repository(hub, files):
    result = send(hub, files)
    assert result.returncode == 0, result.stderr
    found = hub.repositories["org/model"]
    assert found.private
    assert len(found.revisions) == 2  # the empty one and ours
    for name in ("README.md", "model.safetensors"):
        assert found.files[name] == (files / name).read_bytes()
    assert hub.sent("PUT", "^/large/") == 1
    assert f"published {hub.url}/org/model at {found.head}" in result.stdout


def test_a_repository_is_open_only_when_that_was_asked_for(hub, files):
    assert send(hub, files, visibility="public").returncode == 0
    assert not hub.repositories["org/model"].private
    private = hub.create("org/other")
    assert send(hub, files, repo="org/other").returncode == 0
    assert private.private
    assert send(hub, files, repo="org/other", visibility="public").returncode == 0
    assert not private.private


def test_files_that_arrived_in_a_repository_that_cannot_be_opened_are_said_to_have_arrived(hub, files):
    found = hub.create("org/model")
    hub.refuse = {"PUT .*/settings": 403}
    message = refusal(send(hub, files, visibility="public"))
    assert message.endswith("The files have arrived, but only you can see them: open the repository in its settings")
    assert len(found.revisions) == 2


def test_a_public_repository_is_not_written_to_as_if_it_were_private(hub, files):
    found = hub.create("org/model", private=False)
    assert re.fullmatch(r"org/model is public, so nothing was uploaded\. .*PUBLIC=1 .*", refusal(send(hub, files)))
    assert len(found.revisions) == 1


def test_files_of_an_earlier_model_go_in_the_same_commit_and_are_named(hub, files):
    found = hub.create("org/model")
    found.commit(found.files | {"modeling_old.py": b"", "README.md": b"old"})
    result = send(hub, files)
    assert "removing  what the revision before had besides: modeling_old.py\n" in result.stdout
    assert set(found.files) == {".gitattributes", "README.md", "model.safetensors"}
    assert len(found.revisions) == 3


def test_an_upload_cut_off_at_its_commit_leaves_the_old_revision_and_goes_on_when_run_again(hub, files):
    found = hub.create("org/model")
    old = found.commit(found.files | {"README.md": b"old"})
    hub.cut_off = "POST .*/commit/"
    message = refusal(send(hub, files))
    assert message.startswith("the way to the hub broke off while uploading to org/model")
    assert f"The revision before, {old[:12]}, is in place" in message
    assert message.endswith("run this again")
    assert found.head == old
    hub.cut_off = None
    assert send(hub, files).returncode == 0
    assert found.files["README.md"] == (files / "README.md").read_bytes()
    assert hub.sent("PUT", "^/large/") == 1  # what had arrived was not sent twice


@pytest.mark.slow  # the library asks again for half a minute
def test_an_upload_cut_off_in_the_middle_of_a_large_file_leaves_the_old_revision_and_goes_on_when_run_again(hub, files):
    hub.cut_off = "PUT /large/"
    message = refusal(send(hub, files))
    assert message.startswith("the way to the hub broke off while uploading to org/model")
    assert message.endswith("run this again")
    found = hub.repositories["org/model"]
    assert len(found.revisions) == 1
    hub.cut_off = None
    assert send(hub, files).returncode == 0
    assert found.files["model.safetensors"] == (files / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "refuse,status,says",
    [
        ("PUT /large/", 403, r"the access token may not write to org/model \(403\)\. Use one .* to org\. .*"),
        ("POST .*/commit/", 412, r"somebody else changed org/model in the meantime \(412\)\. The revision before, .*"),
        ("POST .*/commit/", 409, r"somebody else changed org/model in the meantime \(409\)\. .*"),
        ("POST .*/commit/", 500, r"the hub answered 500 for org/model\. The revision before, .*"),
        ("GET /api/models/", 404, r"there is no model repository org/model .* taken by something else\. .*"),
        ("POST .*/create", 429, r"the hub asks to wait, .* \(429\)\. Nothing was uploaded"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line_and_changes_nothing(hub, files, refuse, status, says):
    found = hub.create("org/model")
    hub.refuse = {refuse: status}
    assert re.fullmatch(says, refusal(send(hub, files)))
    assert len(found.revisions) == 1


def test_a_token_that_the_hub_does_not_know_is_one_line_without_the_token(hub, files):
    result = send(hub, files, HF_TOKEN="hf_expired")
    assert refusal(result).startswith("the hub does not know the access token (401). Set HF_TOKEN")
    assert "hf_expired" not in result.stdout + result.stderr


def test_a_token_without_rights_is_named_before_anything_is_sent(hub, files):
    assert "may not write to org/new (403)" in refusal(send(hub, files, repo="org/new", HF_TOKEN="hf_reader"))
    hub.create("org/model")
    assert "may not write to org/model (403)" in refusal(send(hub, files, HF_TOKEN="hf_reader"))
    assert "may not write to others/model (403)" in refusal(send(hub, files, repo="others/model"))
    assert hub.sent("PUT", "^/large/") == 0


def test_without_a_token_nobody_is_asked(hub, files):
    assert refusal(send(hub, files, HF_TOKEN="")).startswith("there is no access token for org/model. Set HF_TOKEN")
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_and_offline_mode_are_one_line(hub, files):
    message = refusal(send(hub, files, HF_HUB_OFFLINE="1"))
    assert message == "HF_HUB_OFFLINE is set, so the hub is not asked for org/model. Unset it to upload"
    nobody = refusal(send(hub, files, HF_ENDPOINT="http://127.0.0.1:9"))
    assert re.fullmatch(r"the way to the hub broke off .*refused\)\. Nothing was uploaded", nobody)


@pytest.mark.parametrize("repo", ["model", "org/a/b", "org/mo del", "org/--x"])
def test_a_repository_is_written_owner_and_name(hub, files, repo):
    assert refusal(send(hub, files, repo=repo)).startswith(f"--repo {repo}: ")
    assert hub.requests == []


def test_no_repository_is_asked_for(hub, files):
    assert refusal(send(hub, files, repo="")) == "say where to upload to: REPO=owner/name (--repo)"
