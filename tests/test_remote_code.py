"""Base models with Python code of their own: trained, saved and reloaded anywhere, and run only when pinned."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from transformers import AutoConfig

import trainer.system.device
import trainer.training.train
from evaluate.trust import require_pinned_code
from tests.checkpoints import DOCUMENTS, QUERIES, nfd, write_bert
from tests.conftest import run_trainer
from tests.standins import COMMIT, SHAPES, code_of, write_dense_norbert, write_norbert
from tests.test_models import build_from, config_of, dense_vectors
from tests.test_training import assert_same_weights, manifest
from trainer.config import ConfigError, load_config
from trainer.hub.own_code import references_in
from trainer.models.build import fetch_base_model, load_model, save_model
from trainer.runs.run import Run
from trainer.training.callbacks.regularizer_weights import STATE
from trainer.training.progress import FILE as PROGRESS
from trainer.training.train import train
from trainer.training.trainer import SparseTrainer

PINNED = ("model.trust_remote_code=true", f"model.revision='{COMMIT}'")
ARCHITECTURES = ("inference-free-splade", "splade", "csr")
# The score that chooses the checkpoint falls with every evaluation: with the few queries of a test it is chance otherwise.
FALLING = """
import itertools
from trainer.runs.choice import SCORE
from trainer.training.evaluators import SearchEvaluator
scores, search = itertools.count(1, -0.1), SearchEvaluator.__call__
SearchEvaluator.__call__ = lambda *args, **kwargs: search(*args, **kwargs) | {SCORE: next(scores)}
"""


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return {shape: write_norbert(tmp_path_factory.mktemp(shape), shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return {shape: write_dense_norbert(tmp_path_factory.mktemp(shape), shape) for shape in SHAPES}


@pytest.fixture
def norbert4(masked, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(masked["norbert4"], tmp_path / "norbert4")


def converted_folder(config):
    return fetch_base_model(config).folder


# ---------------------------------------------------------------------------------- saved models open anywhere
REOPEN = """
import importlib.util, json, sys
import torch
from sentence_transformers import SparseEncoder
assert importlib.util.find_spec("trainer") is None
worst = 0.0
for folder, expected in torch.load(sys.argv[1]).items():
    model = SparseEncoder(folder, trust_remote_code=True, device="cpu")
    for route, texts, vectors in expected:
        found = getattr(model, f"encode_{route}")(texts, convert_to_sparse_tensor=False)
        assert (vectors > 0).any(), folder
        worst = max(worst, (found - vectors).abs().max().item())
print(json.dumps(worst))
"""


def reopen_elsewhere(expected, tmp_path):
    """Largest difference to the expected vectors, in a process without this project, its cache or its directory."""
    torch.save(expected, tmp_path / "expected.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", REOPEN, str(tmp_path / "expected.pt")],
        cwd="/",
        env=environment | {"HF_HOME": str(tmp_path / "empty-cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def both_routes(model):
    return [
        (route, texts, dense_vectors(model, texts, route))
        for route, texts in (("query", QUERIES), ("document", DOCUMENTS))
    ]


def both_routes_in_training(model):
    """Vectors of the model as it is now, in float32 and not under training's autocast, without disturbing its training."""
    training, autocast = model.training, model.__dict__.pop("forward", None)
    vectors = both_routes(model)
    model.train(training)
    if autocast is not None:
        model.forward = autocast
    return vectors


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_and_final_models_of_every_architecture_give_the_trained_vectors_elsewhere(
    tmp_path, monkeypatch, masked, dense, shape
):
    monkeypatch.chdir(tmp_path)
    expected = {}
    library_save = SparseTrainer._save

    def save_checkpoint(self, output_dir=None, state_dict=None):
        library_save(self, output_dir, state_dict)
        expected[str(tmp_path / output_dir).replace("_writing/", "")] = both_routes_in_training(self.model)

    def save_final(model, folder):
        save_model(model, folder)
        expected[str(tmp_path / folder).replace(".final", "final")] = both_routes(model)

    monkeypatch.setattr(trainer.system.device, "bfloat16_time", lambda: 1.0)  # slow bf16 is fine here
    monkeypatch.setattr(SparseTrainer, "_save", save_checkpoint)
    monkeypatch.setattr(trainer.training.train, "save_model", save_final)
    # What must also work.
    also = {
        "inference-free-splade": ["hardware.gradient_checkpointing=true"],
        "splade": ["training.bf16=true"],
        "csr": ["model.csr_train_base=true", "training.bf16=true", "hardware.gradient_checkpointing=true"],
    }
    for architecture in ARCHITECTURES:
        base = (dense if architecture == "csr" else masked)[shape]
        config_of(tmp_path, base, architecture, *PINNED, "training.max_steps=4", *also[architecture])
        shutil.copyfile(tmp_path / "config.yaml", tmp_path / f"{architecture}.yaml")
        loaded = load_config(tmp_path / f"{architecture}.yaml")
        run = Run.create(loaded)
        train(loaded, run, echo=lambda line: None)
        assert run.manifest["status"] == "finished"
        code = run.manifest["base_model"]["code"]
        assert list(code) == [name for name in code_of(shape) if name.startswith("modeling")]
        assert len(next(iter(code.values()))) >= 5
    saved = sorted(folder.rpartition("/")[2] for folder in expected)
    assert saved == [name for name in ("checkpoint-2", "checkpoint-4", "final") for _ in ARCHITECTURES]
    assert reopen_elsewhere(expected, tmp_path) <= 1e-5


@pytest.mark.slow
def test_a_resumed_run_of_a_converted_model_ends_with_the_same_weights(tmp_path, masked):
    config_of(tmp_path, masked["norbert4"], "inference-free-splade", *PINNED, "training.max_steps=4")
    first = run_trainer(tmp_path, "train", "config.yaml")
    assert first.returncode == 0, first.stderr
    assert "code      modeling_gptbert.py: 14 faults mended: soft cap, BOS logit, " in first.stdout
    run = tmp_path / "models/config"
    shutil.move(run / "final", tmp_path / "final")
    shutil.rmtree(run / "checkpoints/checkpoint-4")
    again = run_trainer(tmp_path, "train", "config.yaml", "--resume")
    assert again.returncode == 0, again.stderr
    assert f"resuming from {run.relative_to(tmp_path)}/checkpoints/checkpoint-2" in again.stdout
    assert_same_weights(run / "final", tmp_path / "final")
    found = manifest(tmp_path, "models/config")
    assert found["base_model"]["code"]["modeling_gptbert.py"][0] == "soft cap"


@pytest.mark.slow
def test_a_converted_model_that_gets_worse_ends_with_its_best_checkpoint(tmp_path, masked):
    config_of(tmp_path, masked["norbert4-newer"], "inference-free-splade", *PINNED)
    result = run_trainer(tmp_path, "train", "config.yaml", code=FALLING)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "models/config"
    best = tmp_path / manifest(tmp_path, "models/config")["best_checkpoint"]
    assert best.name == "checkpoint-2"
    shutil.copytree(best, tmp_path / "best", ignore=shutil.ignore_patterns(STATE, PROGRESS))  # the run's own state
    assert_same_weights(run / "final", tmp_path / "best")


def test_a_saved_model_is_a_base_model_itself_and_is_not_converted_again(tmp_path, masked):
    model = build_from(config_of(tmp_path, masked["norbert4"], "splade", *PINNED))
    save_model(model, tmp_path / "saved")
    again = build_from(config_of(tmp_path, tmp_path / "saved", "splade", *PINNED))
    torch.testing.assert_close(dense_vectors(again, DOCUMENTS), dense_vectors(model, DOCUMENTS))
    assert (tmp_path / "saved/modeling_gptbert.py").read_text() == (
        converted_folder(load_config(tmp_path / "config.yaml").config) / "modeling_gptbert.py"
    ).read_text()


# ---------------------------------------------------------------------------------- what every converted model has
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_special_tokens_of_a_converted_model_are_never_active(tmp_path, shape, architecture):
    base = write_norbert(
        tmp_path / "base", shape, bias=3.0
    )  # nearly every word is active, so special tokens would be too
    model = build_from(config_of(tmp_path, base, architecture, *PINNED))
    for route in ("query", "document"):
        vectors = dense_vectors(model, [f"{model.tokenizer.all_special_tokens} mjøsa", DOCUMENTS[0]], route)
        assert (vectors[:, model.tokenizer.all_special_ids] == 0).all()
        assert (vectors > 0).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_word_of_a_query_has_the_dimension_it_has_in_a_document_of_a_converted_model(tmp_path, masked, shape):
    model = build_from(config_of(tmp_path, masked[shape], "inference-free-splade", *PINNED, "model.query_init=ones"))
    first, later = dense_vectors(model, ["sjö", "största sjö"], "query")
    assert first.equal(dense_vectors(model, nfd(["sjö"]), "query")[0])
    assert first.any()
    assert (later[first > 0] > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_longer_than_a_converted_model_can_read_are_refused_and_shorter_ones_cut(tmp_path, masked, shape):
    model = build_from(config_of(tmp_path, masked[shape], "splade", *PINNED, "training.max_seq_length=8"))
    assert model.preprocess([DOCUMENTS[0] * 9])["input_ids"].shape == (1, 8)
    with pytest.raises(ConfigError, match=r"max_seq_length: 65 tokens are more than .* can read \(64\)"):
        build_from(config_of(tmp_path, masked[shape], "splade", *PINNED, "training.max_seq_length=65"))


# ---------------------------------------------------------------------------------- trust
def test_code_of_a_base_model_runs_only_when_the_config_says_so(tmp_path, masked):
    with pytest.raises(ConfigError) as caught:
        build_from(config_of(tmp_path, masked["norbert4"], "splade"))
    message = caught.value.format_message()
    assert "comes with Python code of its own. Read it in " in message
    assert 'SET="model.trust_remote_code=true model.revision=<the commit this folder is a copy of>"' in message


@pytest.mark.parametrize("revision", ["main", "386ba2d", "null"])
def test_trust_needs_a_pinned_commit_for_folders_too(tmp_path, masked, revision):
    with pytest.raises(ConfigError, match=r"'model.revision' must be a full commit hash"):
        config_of(tmp_path, masked["norbert4"], "splade", PINNED[0], f"model.revision={revision}")


def test_a_base_model_without_code_is_never_given_trust(tmp_path):
    model = build_from(config_of(tmp_path, write_bert(tmp_path / "base"), "splade"))
    assert model.trust_remote_code is False
    save_model(model, tmp_path / "saved")
    assert (
        load_model(tmp_path / "saved", load_config(tmp_path / "config.yaml").config, "cpu").trust_remote_code is False
    )
    assert not list((tmp_path / "saved").rglob("*.py"))


def hub_copy(folder, commit):
    """Turn a folder into what `hf download --local-dir` leaves."""
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for file in folder.glob("*.py"):
        data = file.read_bytes()
        git_hash = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (notes / f"{file.name}.metadata").write_text(f"{commit}\n{git_hash}\n1700000000.0\n")


def test_a_downloaded_folder_is_held_to_the_commit_it_was_downloaded_at(tmp_path, norbert4):
    hub_copy(norbert4, COMMIT)
    assert fetch_base_model(config_of(tmp_path, norbert4, "splade", *PINNED)).code["modeling_gptbert.py"]
    with pytest.raises(ConfigError, match=rf"model.revision={COMMIT}"):
        fetch_base_model(config_of(tmp_path, norbert4, "splade"))
    with pytest.raises(ConfigError, match=rf"{'f' * 40} is pinned, but .*norbert4 is a copy of commit {COMMIT}"):
        fetch_base_model(config_of(tmp_path, norbert4, "splade", PINNED[0], f"model.revision={'f' * 40}"))


def test_code_edited_in_a_downloaded_folder_or_in_the_hubs_cache_is_refused(tmp_path, norbert4):
    hub_copy(norbert4, COMMIT)
    code = norbert4 / "configuration_gptbert.py"
    original = code.read_bytes()
    code.write_bytes(original + b"import os\n")
    config = config_of(tmp_path, norbert4, "splade", *PINNED)
    with pytest.raises(ConfigError, match=f"configuration_gptbert.py is not what commit {COMMIT} holds: it was edited"):
        fetch_base_model(config)
    shutil.rmtree(norbert4 / ".cache")
    assert fetch_base_model(config).code  # any other folder is taken at the config's word
    code.write_bytes(original)
    snapshot = hub_snapshot(norbert4, tmp_path / "hub", COMMIT)
    config = config_of(tmp_path, snapshot, "splade", *PINNED)
    assert fetch_base_model(config).code
    link = snapshot / code.name
    blob = link.resolve()
    link.unlink()
    link.write_bytes(original + b"import os\n")  # as an editor does that writes aside and renames
    with pytest.raises(
        ConfigError, match=rf"configuration_gptbert.py is not what commit {COMMIT} holds: it was edited"
    ):
        fetch_base_model(config)
    link.unlink()
    link.symlink_to(blob)
    blob.write_bytes(original + b"import os\n")
    with pytest.raises(
        ConfigError, match=rf"configuration_gptbert.py is not what commit {COMMIT} holds: it was edited"
    ):
        fetch_base_model(config)
    other = config_of(tmp_path, snapshot, "splade", PINNED[0], f"model.revision={'f' * 40}")
    with pytest.raises(ConfigError, match=rf"{'f' * 40} is pinned, but .* is a copy of commit {COMMIT}"):
        fetch_base_model(other)


def hub_snapshot(folder, hub, commit):
    """The same files as the hub's cache keeps them: links to blobs that are named by their git hash."""
    snapshot = hub / "models--ltg--norbert4-base/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for file in folder.iterdir():
        if file.is_file():
            data = file.read_bytes()
            blob = snapshot.parents[1] / "blobs" / hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            blob.write_bytes(data)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_code_of_sentence_transformers_modules_is_held_to_the_same_rules(tmp_path, dense):
    base = shutil.copytree(dense["norbert4"], tmp_path / "dense")
    modules = (base / "modules.json").read_text()
    pooling = re.search(r'"(sentence_transformers[\w.]*Pooling)"', modules)[1]
    (base / "modules.json").write_text(modules.replace(pooling, "other/place--my_pooling.MyPooling"))
    config = config_of(tmp_path, base, "csr", *PINNED)
    with pytest.raises(
        ConfigError, match=r"lacks its code, my_pooling.py \(it is to come from other/place, which nothing"
    ):
        fetch_base_model(config)
    package, _, name = pooling.rpartition(".")
    (base / "my_pooling.py").write_text(
        f"from {package} import {name} as Stock\n\n\nclass MyPooling(Stock):\n    pass\n"
    )
    with pytest.raises(ConfigError, match="comes with Python code of its own"):
        fetch_base_model(config_of(tmp_path, base, "csr"))
    config = config_of(tmp_path, base, "csr", *PINNED)
    found = fetch_base_model(config)
    assert "my_pooling.MyPooling" in (found.folder / "modules.json").read_text()
    assert "--" not in (found.folder / "modules.json").read_text()
    save_model(build_from(config), tmp_path / "saved")
    (tmp_path / "saved/my_pooling.py").unlink()
    with pytest.raises(ConfigError, match=r"saved lacks the code of its model, my_pooling.py"):
        load_model(tmp_path / "saved", config, "cpu")


def test_code_that_would_come_from_another_repository_is_refused_or_taken_from_beside_it(tmp_path, norbert4):
    settings = (norbert4 / "config.json").read_text()
    (norbert4 / "config.json").write_text(settings.replace('": "modeling_', '": "ltg/norbert4-base--modeling_'))
    config = config_of(tmp_path, norbert4, "splade", *PINNED)
    model = build_from(config)
    assert type(model[0].model).__module__.startswith(f"transformers_modules.{converted_folder(config).name}.")
    assert "--" not in (converted_folder(config) / "config.json").read_text()
    (norbert4 / "modeling_gptbert.py").unlink()
    with pytest.raises(ConfigError) as caught:
        fetch_base_model(config)
    assert caught.value.format_message() == (
        f"model.base_model: {norbert4} lacks its code, modeling_gptbert.py (it is to come from ltg/norbert4-base, which "
        "nothing pins). Copy the model into a folder of yours, put the file at its root, and point model.base_model at it"
    )


def test_settings_for_a_version_of_transformers_are_searched_for_code_too(tmp_path):
    # transformers reads config.4.0.0.json in place of a config.json that names it, code of another repository and all
    base, other = write_bert(tmp_path / "bert"), tmp_path / "other"
    other.mkdir()
    code = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import BertConfig\nclass Settings(BertConfig): pass\n"
    )
    (other / "harm.py").write_text(code)
    settings = json.loads((base / "config.json").read_text())
    hidden = settings | {"auto_map": {"AutoConfig": f"{other}--harm.Settings"}}
    (base / "config.4.0.0.json").write_text(json.dumps(hidden))
    (base / "config.json").write_text(json.dumps(settings | {"configuration_files": ["config.4.0.0.json"]}))
    AutoConfig.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "ran").exists()  # the code is one that would run
    with pytest.raises(ConfigError, match=r"lacks its code, harm\.py \(it is to come from .*, which nothing pins"):
        fetch_base_model(config_of(tmp_path, base, "splade", *PINNED))


def test_a_trusted_model_with_the_tokenizer_of_another_repository_is_refused(tmp_path, dense):
    base = shutil.copytree(dense["norbert4"], tmp_path / "dense")
    file = next(base.rglob("sentence_*_config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_name_or_path": "other/words"}))
    with pytest.raises(ConfigError, match="takes its tokenizer from other/words, which nothing pins"):
        fetch_base_model(config_of(tmp_path, base, "csr", *PINNED))
    with pytest.raises(ConfigError, match="takes its tokenizer from other/words, which nothing pins"):
        require_pinned_code("--model", str(base), None)


@pytest.mark.parametrize("settings", ["text", 1, [1], {"auto_map": 1, "types": 1}, {"auto_map": {"AutoModel": [None]}}])
def test_settings_of_any_shape_name_no_code(settings):
    assert [*references_in(settings)] == []


def test_code_is_found_however_deep_its_name_stands():
    classes = {"AutoModel": "a.A", "AutoTokenizer": [None, "b.B"], "AutoImageProcessor": {"torchvision": "c.C"}}
    assert [*references_in({"auto_map": classes})] == ["a.A", "b.B", "c.C"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-7", "no-such-encoding"])
def test_code_that_python_reads_in_another_encoding_than_utf_8_is_refused(tmp_path, norbert4, encoding):
    file = next(norbert4.glob("modeling*.py"))
    file.write_bytes(f"# coding: {encoding}\n# sm\xf8r\n".encode("latin-1") + file.read_bytes())
    with pytest.raises(ConfigError, match=r"the code in .* is not text in UTF-8"):
        fetch_base_model(config_of(tmp_path, norbert4, "splade", *PINNED))


def test_code_of_an_unknown_family_runs_as_it_came_and_the_manifest_says_so(tmp_path, norbert4):
    config = config_of(tmp_path, norbert4, "splade", *PINNED)
    expected = dense_vectors(build_from(config), DOCUMENTS)
    converted = (converted_folder(config) / "modeling_gptbert.py").read_text()
    (norbert4 / "modeling_gptbert.py").unlink()
    (norbert4 / "modeling_other.py").write_text(converted.partition("\n")[2])
    settings = (norbert4 / "config.json").read_text()
    (norbert4 / "config.json").write_text(settings.replace("modeling_gptbert", "modeling_other"))
    base = fetch_base_model(config)
    torch.testing.assert_close(dense_vectors(build_from(config), DOCUMENTS), expected)
    assert base.manifest() == {
        "source": str(norbert4),
        "commit": COMMIT,
        "code": {"configuration_gptbert.py": [], "modeling_other.py": []},
    }


# ---------------------------------------------------------------------------------- the copy in the cache
def test_the_converted_copy_is_made_once_under_the_cache_and_links_to_the_weights(tmp_path, masked):
    config = config_of(tmp_path, masked["norbert4"], "splade", *PINNED)
    folder = converted_folder(config)
    assert folder.parent.parent == type(folder)(HF_HOME)
    assert (folder / "model.safetensors").resolve() == (masked["norbert4"] / "model.safetensors").resolve()
    written = (folder / "modeling_gptbert.py").stat().st_mtime_ns
    assert converted_folder(config) == folder
    assert (folder / "modeling_gptbert.py").stat().st_mtime_ns == written
    assert "30 * torch.sigmoid" in (masked["norbert4"] / "modeling_gptbert.py").read_text()  # the original is as it was


def test_a_converted_copy_that_was_edited_is_refused(tmp_path, norbert4):
    config = config_of(tmp_path, norbert4, "splade", *PINNED)
    code = converted_folder(config) / "modeling_gptbert.py"
    code.write_text(code.read_text().replace("return self.out_proj(", "return 2 * self.out_proj("))
    with pytest.raises(ConfigError, match=r"modeling_gptbert.py was edited by hand. Remove .* to have it made again"):
        fetch_base_model(config)
    shutil.rmtree(code.parent)
    assert converted_folder(config) == code.parent
    settings = code.with_name("config.json")
    settings.write_text(settings.read_text().replace('"modeling_gptbert', '"evil/place--modeling_gptbert'))
    with pytest.raises(ConfigError, match=r"config.json was edited by hand. Remove .* to have it made again"):
        fetch_base_model(config)
    code.unlink()
    with pytest.raises(ConfigError, match=r"edited by hand. Remove .* to have it made again"):
        fetch_base_model(config)


def test_a_download_that_was_completed_later_is_seen(tmp_path, norbert4):
    weights = norbert4 / "model.safetensors"
    weights.rename(tmp_path / "later")
    config = config_of(tmp_path, norbert4, "splade", *PINNED)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_from(config)
    (tmp_path / "later").rename(weights)
    assert (dense_vectors(build_from(config), DOCUMENTS) > 0).any()


def test_processes_that_start_together_make_one_whole_copy(tmp_path, norbert4):
    config = config_of(tmp_path, norbert4, "splade", *PINNED)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        found = set(pool.map(converted_folder, [config] * 4))
    assert len(found) == 1
    assert {file.name for file in next(iter(found)).iterdir()} == {file.name for file in norbert4.iterdir()}
    assert not list(next(iter(found)).parent.glob("tmp*"))


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, norbert4):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"the converted copy of .* cannot be written: .*. Set HF_HOME"):
        fetch_base_model(config_of(tmp_path, norbert4, "splade", *PINNED))


def test_weights_that_lack_part_of_the_model_are_refused(tmp_path, norbert4):
    weights = load_file(norbert4 / "model.safetensors")
    del weights["classifier.emb2vocab.weight"]
    save_file(weights, norbert4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights of GptBertForMaskedLM.*: classifier.emb2vocab.weight"):
        build_from(config_of(tmp_path, norbert4, "splade", *PINNED))


def test_a_dense_model_that_lacks_weights_is_refused(tmp_path, dense):
    base = shutil.copytree(dense["norbert4"], tmp_path / "dense")
    weights = load_file(base / "model.safetensors")
    del weights["encoder.layers.0.attention.qkv.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights of GptBertModel.*: encoder.layers.0.attention.qkv.weight"):
        build_from(config_of(tmp_path, base, "csr", *PINNED))


# ---------------------------------------------------------------------------------- spoilt checkpoints
@pytest.mark.parametrize("architecture", ["inference-free-splade", "splade"])
def test_a_checkpoint_without_its_code_or_with_edited_code_is_refused_with_one_line(tmp_path, masked, architecture):
    config = config_of(tmp_path, masked["norbert4"], architecture, *PINNED)
    save_model(build_from(config), tmp_path / "saved")
    load_model(tmp_path / "saved", config, "cpu")
    code = tmp_path / "saved/modeling_gptbert.py"
    text = code.read_text()
    code.write_text(text.replace("return self.out_proj(", "return 2 * self.out_proj("))
    with pytest.raises(ConfigError, match=f"{code} was edited by hand after its conversion"):
        load_model(tmp_path / "saved", config, "cpu")
    code.unlink()
    with pytest.raises(ConfigError, match=f"{tmp_path}/saved lacks the code of its model, modeling_gptbert.py"):
        load_model(tmp_path / "saved", config, "cpu")


@pytest.mark.slow
def test_resume_stops_at_a_checkpoint_without_its_code_or_with_edited_code(tmp_path, masked):
    config_of(tmp_path, masked["norbert4"], "splade", *PINNED, "training.max_steps=4")
    assert run_trainer(tmp_path, "train", "config.yaml").returncode == 0
    code = tmp_path / "models/config/checkpoints/checkpoint-4/modeling_gptbert.py"
    text = code.read_text()
    for spoil, line in (
        (lambda: code.write_text(text.replace("tril", "triu")), "modeling_gptbert.py was changed since it was written"),
        (code.unlink, "modeling_gptbert.py is missing. Put it back"),
    ):
        spoil()
        stopped = run_trainer(tmp_path, "train", "config.yaml", "--resume")
        assert stopped.returncode == 2
        assert line in stopped.stderr
        assert len(stopped.stderr.strip().splitlines()) == 1


def test_stock_reload_of_a_router_needs_the_code_at_the_root(tmp_path, masked):
    model = build_from(config_of(tmp_path, masked["norbert4"], "inference-free-splade", *PINNED))
    model.save_pretrained(str(tmp_path / "stock"))
    with pytest.raises(OSError, match=r"modeling_gptbert.py|configuration_gptbert.py"):
        SparseEncoder(str(tmp_path / "stock"), trust_remote_code=True, device="cpu")
    save_model(model, tmp_path / "ours")
    SparseEncoder(str(tmp_path / "ours"), trust_remote_code=True, device="cpu")


# ---------------------------------------------------------------------------------- the hub
@pytest.mark.parametrize(
    "failure,line",
    [
        (errors.RevisionNotFoundError, f"the model repository ltg/norbert4-base has no revision {COMMIT}"),
        (errors.RepositoryNotFoundError, "the hub has no model repository ltg/norbert4-base that you may read"),
        (ConnectionError, "cannot download ltg/norbert4-base (the base model): no route to host. Fetch it where"),
    ],
)
def test_a_base_model_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, failure, line):
    def fail(*arguments, **options):
        response = httpx2.Response(404, request=httpx2.Request("GET", "http://hub"))
        raise failure("no route to host") if failure is ConnectionError else failure("gone", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError) as caught:
        fetch_base_model(config_of(tmp_path, "ltg/norbert4-base", "splade", *PINNED))
    assert line in caught.value.format_message()
    assert "\n" not in caught.value.format_message()
