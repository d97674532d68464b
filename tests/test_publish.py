"""What is uploaded opens in stock sentence-transformers with the vectors of the run, and holds nobody's secrets."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import typing

import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT, run_trainer
from tests.hub import Hub
from tests.standins import COMMIT, write_norbert
from tests.test_models import build_from, config_of
from tests.test_upload import hub_environment
from trainer.config import Config, ConfigError, load_config, render
from trainer.config.schema import HubSource, LocalSource, OneOfTeachers
from trainer.encoding.stock import encode_both, open_model
from trainer.models.build import save_model
from trainer.publish.local_paths import FILE_KEYS, LocalPaths
from trainer.publish.publish import (
    build_upload_folder,
    encode_in_a_fresh_process,
    largest_difference,
    publish,
    require_no_secrets,
    sample_texts,
)
from trainer.runs.run import Run

TOKEN = "hf_" + "planted" * 5


@pytest.fixture
def upload(trained):
    """The folder that would be uploaded."""
    build_upload_folder(Run.finished("tiny"), trained / "upload", "org/model", 800)
    return trained / "upload"


def override(trained, *settings):
    """Change the resolved config of the run."""
    file = trained / "models/tiny/config.yaml"
    file.write_text(render(load_config(file, settings)))


def every_byte(folder):
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


# ---------------------------------------------------------------------------------- the folder
def test_the_upload_folder_holds_the_model_a_card_the_config_and_a_summary(upload, trained):
    final = trained / "models/tiny/final"
    model = {str(file.relative_to(final)) for file in final.rglob("*") if file.is_file()}
    found = {str(file.relative_to(upload)) for file in upload.rglob("*") if file.is_file()}
    assert found == model | {"README.md", "config.yaml", "training.json"}
    for name in model - {"README.md"}:
        assert (upload / name).read_bytes() == (final / name).read_bytes()
    assert "# model\n" in (upload / "README.md").read_text()
    assert "# model\n" not in (final / "README.md").read_text()
    assert load_config(upload / "config.yaml").config == load_config(trained / "tiny.yaml").config


def test_no_file_of_the_upload_folder_says_where_or_how_it_was_made_on_this_machine(upload, trained):
    written = every_byte(upload).decode(errors="ignore")
    for secret in (str(trained), os.path.expanduser("~") + "/", os.environ["HF_HOME"], str(ROOT), "tiny.yaml"):
        assert secret not in written, secret
    summary = json.loads((upload / "training.json").read_text())
    manifest = json.loads((trained / "models/tiny/run.json").read_text())
    assert summary.items() <= manifest.items()
    assert not summary.keys() & {"command", "config_file", "overrides", "best_checkpoint", "id"}


def texts_of(folder):
    """(file, text) of every value, key and word that is uploaded, of the headers of the weights too."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            with file.open("rb") as data:
                length = int.from_bytes(data.read(8), "little")
                text = data.read(length).decode()
        elif file.is_file():
            text = file.read_text(encoding="utf-8")
        else:
            continue
        quoted = {
            found
            for kind in (r'"([^"\n]*)"', r"`([^`\n]*)`", r": ([^\n]+?)(?: +#.*)?\n")
            for found in re.findall(kind, text)
        }
        words = re.split(r"[\s\"'`(),\[\]{}|]+", text)
        yield from ((file.name, found) for found in {*words, *quoted} if found)


def paths_among(texts):
    """Those that name something here: a path with a folder in it, a pattern of files, a folder with its language."""
    for file, text in texts:
        name = re.sub(r":[a-z]{2}$", "", text.rstrip(".,:;"))
        if "/" in name and len(name) < 300 and name.strip("/") and glob.glob(os.path.expanduser(name)):
            yield file, text


@pytest.fixture
def private(trained):
    """The run, made with files of this machine: every key of a config that may name some does."""
    places = {name: trained / "private data" / name for name in ("our base", "miner", "teacher", "search", "cache")}
    for folder in (*places.values(), trained / "data/customer"):
        folder.mkdir(parents=True)
    (trained / "data/customer/clicks-1.jsonl").touch()
    (trained / "rows.jsonl").touch()
    override(
        trained,
        "model.base_model=private data/our base",
        "model.from_scratch=null",
        "datasets.quickstart=null",
        "datasets.clicks={source: data/customer/clicks-*.jsonl, columns: {anchor: q, positive: p}, "
        "mine: {method: model, model: private data/miner}}",
        "datasets.flat={source: rows.jsonl, columns: {anchor: q, positive: p}}",
        f"datasets.far={{source: {places['search']}, columns: {{anchor: q, positive: p}}}}",
        f"loss.teacher={{model: private data/teacher, kind: dense, cache: {places['cache']}}}",
        "evaluation.search=[private data/search]",
        f"evaluation.mteb_tasks=[norwegian, 'private data/search:no', '{places['search']}']",
    )
    run = Run.finished("tiny")
    data = run.manifest["datasets"]
    data["clicks"] = data.pop("quickstart_nli") | {
        "name": "clicks",
        "revisions": {"data/customer/clicks-1.jsonl": None},
    }
    data["clicks"]["mined"] = {"method": "private data/miner", "queries": 3}
    run.update(
        base_model={"source": "private data/our base", "commit": None, "code": {}},
        warnings=[{"message": f"nothing is in {places['search']}, nor in private data/teacher."}],
        teacher={"model": "private data/teacher"},
    )
    return run


def test_no_text_of_the_upload_names_a_path_that_exists_here(private, trained):
    folder = trained / "upload"
    build_upload_folder(private, folder, "org/model", 800)
    texts = list(texts_of(folder))
    assert len(texts) > 1000
    assert list(paths_among(texts)) == []
    written = every_byte(folder).decode(errors="ignore")
    for name in ("private data", "our base", "customer", "clicks-", "rows.jsonl", "miner", str(trained)):
        assert name not in written, name
    # what the run itself says would have been found
    (trained / "said").mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(trained / "models/tiny" / name, trained / "said")
    found = {text for _, text in paths_among(texts_of(trained / "said"))}
    assert {"data/customer/clicks-*.jsonl", "private data/our base", "private data/miner"} <= found


def test_the_uploaded_config_says_what_was_removed_and_can_be_read(private, trained):
    build_upload_folder(private, trained / "upload", "org/model", 800)
    file = trained / "upload/config.yaml"
    removed = (
        "datasets.clicks.mine.model, datasets.clicks.source, datasets.far.source, datasets.flat.source, "
        "evaluation.mteb_tasks, evaluation.search, loss.teacher.cache, loss.teacher.model, model.base_model"
    )
    assert f"# <local> stands for files of the machine it ran on, at {removed}\n" in file.read_text()
    config = load_config(file).config
    assert config.datasets.local["clicks"].source == "<local>"
    assert config.evaluation.mteb_tasks == ["norwegian", "<local>", "<local>"]
    assert config.loss.teacher.cache is None
    assert f"says `<local>` at {removed}." in (trained / "upload/README.md").read_text()
    summary = json.loads((trained / "upload/training.json").read_text())
    assert summary["base_model"]["source"] == "<local>"
    assert summary["warnings"][0]["message"] == "nothing is in <local>, nor in <local>."


def test_hub_names_prompts_and_numbers_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "model": {"base_model": "ltg/norbert4-base", "prompts": {"query": "/tmp ", "document": None}},
        "datasets": {"a": {"source": "owner/name", "max_samples": 7}},
        "evaluation": {"mteb_tasks": ["norwegian", "SweFaqRetrieval"]},
        "notes": ["1/2 of https://host/tmp and and/or"],
    }
    paths = LocalPaths(values)
    assert paths.keys == []
    assert paths.without(values) == values


def test_every_text_of_the_schema_is_known_to_name_files_or_not():
    plain = {
        "revision", "query", "document", "anchor", "positive", "negative", "subset", "split", "eval_split", "language",
        "model_name", "license", "tags", "repo", "code_sha256", "scores", "positive_scores", "negative_scores",
    }  # fmt: skip
    named = set()

    def kinds_in(annotation):
        return [annotation, *(kind for inner in typing.get_args(annotation) for kind in kinds_in(inner))]

    def walk(section):
        for name, field in section.model_fields.items():
            kinds = kinds_in(field.annotation)
            if str in kinds:
                named.add(name)
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    walk(kind)

    walk(Config)
    for section in (LocalSource, HubSource, OneOfTeachers):  # which the schema reaches by names of the user's
        walk(section)
    assert named - plain == set(FILE_KEYS)


# ---------------------------------------------------------------------------------- the check
@pytest.mark.slow
def test_a_dry_run_checks_the_vectors_lists_the_files_with_their_sizes_and_leaves_nothing_behind(trained, monkeypatch):
    monkeypatch.setattr("trainer.publish.publish.upload", lambda *arguments, **settings: pytest.fail("uploaded"))
    before = set(trained.rglob("*"))
    lines = []
    publish(Run.finished("tiny"), "org/model", dry_run=True, echo=lines.append)
    assert lines[0].startswith("checked   24 queries and 32 documents, encoded anew in a fresh process with stock ")
    weights = trained / "models/tiny/final/document_0_Transformer/model.safetensors"
    size = f"{weights.stat().st_size / 1024:,.1f} KiB"
    assert any(
        line.split(maxsplit=1)[1].lstrip() == f"{size}  document_0_Transformer/model.safetensors" for line in lines
    )
    assert lines[-1].startswith(f"dry run   {len(lines) - 2} files, ")
    assert lines[-1].endswith("would go to org/model; nothing was uploaded")
    assert set(trained.rglob("*")) == before


@pytest.mark.slow
def test_a_model_that_gives_other_vectors_than_the_run_is_not_uploaded(upload, trained):
    texts = sample_texts()
    expected = encode_both(open_model(trained / "models/tiny/final", False), texts)
    assert all((vectors > 0).any(axis=1).all() for vectors in expected.values())  # there is something to compare
    file = upload / "query_0_SparseStaticEmbedding/model.safetensors"
    weights = load_file(file)
    file.unlink()  # it may be a link to final/
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, file)
    with pytest.raises(ConfigError, match=r"gives another vector than final/ for query \d+ of 24: it differs by 0\.0"):
        largest_difference(expected, encode_in_a_fresh_process(upload, texts))


@pytest.mark.slow
def test_a_folder_that_does_not_open_is_not_uploaded(upload):
    (upload / "router_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"does not open in stock sentence-transformers, so nothing was uploaded: \w+"
    ):
        encode_in_a_fresh_process(upload, sample_texts())


def test_a_run_folder_that_cannot_be_written_is_one_line(trained, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.publish.publish.build_upload_folder", full)
    with pytest.raises(
        ConfigError, match=r"the upload folder cannot be made in models/tiny: .*No space left on device"
    ):
        publish(Run.finished("tiny"), "org/model", dry_run=True, echo=print)


def test_vectors_that_are_not_numbers_differ():
    vectors = {"query": np.ones((2, 3)), "document": np.ones((2, 3))}
    assert largest_difference(vectors, vectors) == 0
    with pytest.raises(ConfigError, match="for document 2 of 2: it differs by nan"):
        largest_difference(vectors, vectors | {"document": np.array([[1, 1, 1], [1, np.nan, 1]])})


@pytest.mark.slow
def test_a_model_with_code_of_its_own_is_uploaded_with_the_code_and_opens_from_it_alone(trained):
    base = write_norbert(trained / "norbert", "norbert4")
    (trained / "with_code").mkdir()
    config_of(trained / "with_code", base, "splade", "model.trust_remote_code=true", f"model.revision='{COMMIT}'")
    loaded = load_config(trained / "with_code/config.yaml")
    shutil.rmtree("models/tiny/final")
    save_model(build_from(loaded.config), trained / "models/tiny/final")
    shutil.copy("with_code/config.yaml", "models/tiny/config.yaml")
    run = Run.finished("tiny")
    run.update(base_model={"source": str(base), "commit": COMMIT, "code": {"modeling_gptbert.py": ["soft cap"]}})
    lines = []
    publish(run, "org/model", dry_run=True, echo=lines.append)
    assert "largest difference 0" in lines[0]
    assert any(line.endswith("  modeling_gptbert.py") for line in lines)
    build_upload_folder(run, trained / "upload", "org/model", 395)
    assert str(trained).encode() not in every_byte(trained / "upload")


# ---------------------------------------------------------------------------------- secrets
def test_a_file_that_holds_the_token_is_refused_wherever_it_stands_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "weights").write_bytes(b"\0" * (2**24 - 7) + TOKEN.encode() + b"\0" * 100)  # across two pieces
    with pytest.raises(ConfigError, match=r"^weights holds your access token, so nothing was uploaded") as caught:
        require_no_secrets(tmp_path)
    assert TOKEN not in str(caught.value)
    (tmp_path / "weights").write_bytes(TOKEN[:-1].encode())
    require_no_secrets(tmp_path)


def test_a_token_in_the_config_stops_the_upload(trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    override(trained, f"model_card.model_name=mine {TOKEN}")
    build_upload_folder(Run.finished("tiny"), trained / "upload", "org/model", 800)
    with pytest.raises(ConfigError, match=r"^README\.md holds your access token"):
        require_no_secrets(trained / "upload")


# ---------------------------------------------------------------------------------- the command
def test_a_run_that_is_not_there_or_not_finished_is_one_line(trained):
    def refusal(*arguments):
        result = run_trainer(trained, "publish", "tiny.yaml", *arguments)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "Error: models/other holds no trained model. Train it first:" in refusal(
        "--repo", "org/x", "--name", "other"
    )
    Run.finished("tiny").update(status="stopped")
    assert "models/tiny holds no finished run (its status is 'stopped')" in refusal("--repo", "org/x")


@pytest.mark.slow  # two processes that import the library
def test_what_others_download_opens_and_scores_like_the_run_and_the_token_is_in_no_file_log_or_card(trained):
    with Hub() as hub:
        hub.tokens[TOKEN] = {"org"}
        environment = hub_environment(hub, HF_TOKEN=TOKEN)
        result = subprocess.run(
            [sys.executable, "-m", "trainer", "publish", "tiny.yaml", "--repo", "org/model"],
            cwd=trained, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found = hub.repositories["org/model"]
    assert len(found.revisions) == 2
    assert f"published {hub.url}/org/model at {found.head}" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    for name, content in found.files.items():
        assert TOKEN.encode() not in content
        file = trained / "downloaded" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert TOKEN.encode() not in every_byte(trained)
    texts = sample_texts()
    expected = encode_both(open_model(trained / "models/tiny/final", False), texts)
    assert largest_difference(expected, encode_in_a_fresh_process(trained / "downloaded", texts)) <= 1e-6
