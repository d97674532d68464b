"""No model's own code runs in an evaluation, as a teacher or in mining unless the user says so at a commit."""

import contextlib
import inspect
import json
import sys

import mteb
import pytest

from evaluate.dense import load_dense
from evaluate.subject import open_subject
from evaluate.trust import require_trust, runs_own_code
from tests.checkpoints import write_dense
from trainer.config import ConfigError
from trainer.config.schema import TeacherConfig
from trainer.data import mining
from trainer.hub.download import Snapshot
from trainer.losses.teacher_models import TeacherFiles

NEEDS_CODE = "Alibaba-NLP/gte-multilingual-base"
COMMIT = "ca1791e0bcc104f6db161f27de1340241b13c5a4"
PLAIN = "intfloat/multilingual-e5-small"


@pytest.fixture
def harmful(tmp_path):
    """A dense model whose settings name a class beside them, in a file that leaves a mark when it is run."""
    folder = write_dense(tmp_path / "harmful")
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "harm.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "harm.py").write_text(
        f"open({str(folder.parent / 'ran')!r}, 'w').close()\nfrom sentence_transformers.models import Pooling\n"
    )
    return folder


def refused(call, *arguments):
    with pytest.raises(ConfigError) as found:
        call(*arguments)
    assert "\n" not in found.value.format_message()
    return found.value.format_message()


def test_no_model_of_the_registry_whose_entry_or_loader_trusts_code_is_loaded_without_a_word():
    texts = {}
    entries = mteb.get_model_metas()
    for entry in entries:
        module = getattr(entry.loader, "__module__", "sys")
        texts.setdefault(module, inspect.getsource(sys.modules[module]) if module != "sys" else "")
    trusting = [
        entry
        for entry in entries
        if "'trust_remote_code': True" in repr(entry.loader_kwargs)
        or "trust_remote_code=True" in texts[getattr(entry.loader, "__module__", "sys")]
    ]
    assert len(trusting) > 132
    assert [entry.name for entry in trusting if not runs_own_code(entry)] == []
    plain = {entry.name for entry in entries if not runs_own_code(entry)}
    assert len(plain) > 300  # not simply all of them
    assert {PLAIN, "BAAI/bge-m3", "intfloat/multilingual-e5-base"} <= plain


def test_a_name_that_needs_code_is_refused_in_one_line_that_says_how_to_trust_it(monkeypatch):
    monkeypatch.setattr("mteb.get_model", lambda *_, **__: pytest.fail("loaded"))
    said = refused(load_dense, NEEDS_CODE, False)
    assert f"--dense {NEEDS_CODE}@{COMMIT} --trust-remote-code" in said
    assert "mteb loads it with code of its own" in said
    for revision in (None, "main", COMMIT[:12]):
        refused(require_trust, NEEDS_CODE, revision, True)
    refused(require_trust, NEEDS_CODE, COMMIT, False)
    require_trust(NEEDS_CODE, COMMIT, True)
    require_trust(PLAIN, None, False)


def test_the_users_word_reaches_the_loader_at_that_commit(monkeypatch):
    loaded = []
    monkeypatch.setattr("evaluate.dense.SearchEncoderWrapper", lambda model: model)
    monkeypatch.setattr("evaluate.dense.require_pinned_code", lambda *_: None)
    monkeypatch.setattr("mteb.get_model", lambda name, **settings: loaded.append((name, settings)))
    load_dense(f"{NEEDS_CODE}@{COMMIT}", True)
    assert loaded == [(NEEDS_CODE, {"revision": COMMIT})]


def test_code_beside_a_model_runs_neither_for_dense_nor_teacher_nor_mining(harmful):
    ran = harmful.parent / "ran"
    said = refused(load_dense, str(harmful), False)
    assert said.endswith(f"to run it: --dense {harmful} --trust-remote-code")
    snapshot = Snapshot(str(harmful), harmful, None)
    for kind in ("cross-encoder", "dense", "sparse"):
        files = TeacherFiles("loss.teacher", TeacherConfig(model=str(harmful), kind=kind), None)
        with contextlib.suppress(ConfigError):
            (files.load_cross_encoder if kind == "cross-encoder" else files.load_encoder)("cpu")
    refused(mining.load_dense, snapshot, "datasets.a.mine.model", {}, "cpu")
    assert not ran.exists()
    load_dense(str(harmful), True)  # the code is one that would run
    assert ran.exists()


def test_trusted_code_that_another_repository_holds_is_refused(harmful, monkeypatch):
    modules = (harmful / "modules.json").read_text().replace("harm.Pooling", "other/repo--harm.Pooling")
    (harmful / "modules.json").write_text(modules)
    says = "takes its code, harm.Pooling, from other/repo, which nothing pins"
    assert says in refused(load_dense, str(harmful), True)
    settings = harmful / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace('"SentenceTransformer"', '"SparseEncoder"'))
    assert says in refused(open_subject(None, str(harmful), None, True).load)
    # of a name on the hub, the files at that commit are looked at
    monkeypatch.setattr("evaluate.trust.snapshot_download", lambda name, revision, allow_patterns: str(harmful))
    assert says in refused(open_subject(None, "owner/name", COMMIT, True).load)


def test_the_flag_on_the_command_line_is_the_word_for_the_dense_model(monkeypatch):
    from evaluate import cli

    monkeypatch.setattr("evaluate.session.Session.__init__", lambda self, *arguments: setattr(self, "got", arguments))
    monkeypatch.setattr("evaluate.subject.open_subject", lambda *_: None)
    options = {
        "config": "a",
        "model": None,
        "revision": None,
        "tasks": "",
        "language": None,
        "batch_size": 1,
        "long_documents": None,
    }
    for word in (True, False):
        assert cli.open_session(options | {"trust_remote_code": word}).got[-1] is word
