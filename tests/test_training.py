import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.checkpoints import write_bert, write_dense
from tests.conftest import ROOT, TINY, run_trainer
from tests.test_models import config_of
from trainer.config import load_config
from trainer.data.loading import load_data
from trainer.runs.checkpoints import fault_of, newest_complete, seal
from trainer.runs.run import Run
from trainer.training.train import train

RUN = "models/tiny"
SENTENCES = ["Mjøsa er Norges største innsjø.", "Älgen är skogens konung."]


ODD, EVEN = "13579bdf", "02468ace"


def last_digit(query):
    """Of the SHA-256 of a query's id, whose being even or odd says whether the query chooses or is reported."""
    return hashlib.sha256(query.encode()).hexdigest()[-1]


def manifest(folder, run=RUN):
    return json.loads((folder / run / "run.json").read_text())


def weights(folder):
    """Every tensor of a saved model by file and name."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    assert len(one) > 5
    for name in one:
        assert torch.equal(one[name], two[name]), name


# ---------------------------------------------------------------------------------- a finished run
def test_whoever_the_umask_allows_it_may_read_all_of_a_run(trained):
    """A colleague on the same cluster evaluates the model."""
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in (trained / RUN).rglob("*") if file.is_file() and file.name != ".lock"]
    assert {file.suffix for file in files} >= {".safetensors", ".json", ".yaml", ".parquet"}
    for file in files:
        assert file.stat().st_mode & 0o666 == 0o666 & ~umask, file


def test_a_run_ends_with_a_verdict_of_scores_dims_time_speed_and_memory(trained):
    verdict = (trained / "output.txt").read_text().splitlines()[-1]
    assert verdict.startswith("verdict   nDCG@10 0.")
    for part in ("→", "active dims", "per query", "per document", "samples/s", "peak memory", "GiB"):
        assert part in verdict


def test_the_manifest_says_how_the_model_came_about(trained):
    found = manifest(trained)
    assert found["status"] == "finished"
    assert found["steps"] == found["steps_done"] == 6
    assert found["device"].startswith("cpu")
    assert found["device_reason"] == "hardware.device says so"
    assert found["seed"] == 42
    assert found["command"].startswith("python -m trainer train tiny.yaml")
    assert found["packages"]["sentence-transformers"]
    nli = found["datasets"]["quickstart_nli"]
    assert (nli["rows"], nli["eval_rows"]) == (162, 18)
    # six steps of eight rows over three sets in turn: two batches of each; 162 rows make 21 batches of 7 or 8
    assert nli["rows_seen"] in (14, 15, 16)
    assert len(nli["fingerprint"]) == 32
    assert found["before"]["search_ndcg@10"] > 0
    assert found["samples_per_second"] > 0 < found["tokens_per_second"]
    assert found["peak_memory_gib"] > 0.1


def test_the_scores_in_the_manifest_are_those_of_the_saved_model(trained):
    from tests.oracles import mean_ndcg
    from trainer.data.beir import read_search_set
    from trainer.data.sources import QUICKSTART

    model = SparseEncoder(str(trained / RUN / "final"), device="cpu")
    search = read_search_set(QUICKSTART / "search", "dev", "quickstart")
    odd, even = ({q: j for q, j in search.relevant.items() if last_digit(q) in digits} for digits in (ODD, EVEN))
    queries = model.encode_query(list(search.queries.values()), convert_to_sparse_tensor=False, show_progress_bar=False)
    documents = model.encode_document(
        list(search.corpus.values()), convert_to_sparse_tensor=False, show_progress_bar=False
    )
    passages = list(search.corpus)
    ranked = {
        query: [passages[i] for i in row.topk(10).indices.tolist()]
        for query, row in zip(search.queries, queries @ documents.T, strict=True)
    }
    after = manifest(trained)["after"]
    assert (len(odd), len(even)) == (41, 31)
    assert after["quickstart_ndcg@10"] == pytest.approx(mean_ndcg(ranked, odd), abs=1e-4)
    assert after["choosing_ndcg@10"] == pytest.approx(mean_ndcg(ranked, even), abs=1e-4)
    assert after["search_ndcg@10"] == after["quickstart_ndcg@10"] != after["choosing_ndcg@10"]
    assert after["quickstart_document_active_dims"] == pytest.approx(
        (documents > 0).sum(1).float().mean().item(), abs=1e-3
    )
    assert after["quickstart_query_active_dims"] == pytest.approx((queries > 0).sum(1).float().mean().item(), abs=1e-3)


@pytest.mark.slow
def test_the_resolved_config_in_the_run_folder_can_be_trained_from(trained):
    resolved = load_config(trained / RUN / "config.yaml")
    assert resolved.config == load_config(trained / "tiny.yaml").config
    result = run_trainer(trained, "train", f"{RUN}/config.yaml", "--name", "again")
    assert result.returncode == 0, result.stderr
    assert_same_weights(trained / RUN / "final", trained / "models/again/final")


def test_the_final_model_is_the_best_checkpoint_not_the_last(trained_once):
    state = json.loads((trained_once / RUN / "checkpoints/checkpoint-6/trainer_state.json").read_text())
    name = "eval_choosing_ndcg@10"
    scores = {row["step"]: row[name] for row in state["log_history"] if name in row}
    assert set(scores) == {2, 4, 6}
    best = max(scores.values())
    found = manifest(trained_once)
    assert found["best_metric"] == {"name": name, "value": best}
    assert scores[int(found["best_checkpoint"].rpartition("-")[2])] == best
    final, chosen = weights(trained_once / RUN / "final"), weights(trained_once / found["best_checkpoint"])
    assert all(torch.equal(final[name], chosen[name]) for name in final)


def test_a_run_keeps_every_text_it_was_trained_on_once_per_data_set(trained):
    rows = pq.read_table(trained / RUN / "training_texts.parquet").to_pylist()
    data = load_data(load_config(trained / "tiny.yaml").config)
    assert {row["text"] for row in rows} == {*data.queries(), *data.passages()}
    assert {row["dataset"] for row in rows} == set(data.subsets)
    assert len({(row["dataset"], row["text"]) for row in rows}) == len(rows)


def test_a_checkpoint_that_is_sealed_again_is_complete(tmp_path):
    (tmp_path / "weights").write_text("one")
    seal(tmp_path, "run", 4)
    (tmp_path / "weights").write_text("another")
    assert fault_of(tmp_path, "run") == "weights has 7 bytes instead of 3"
    seal(tmp_path, "run", 4)
    assert fault_of(tmp_path, "run") is None


def test_a_run_killed_before_its_final_model_was_written_is_finished_without_another_step(trained):
    shutil.move(trained / RUN / "final", trained / "expected")
    result = run_trainer(trained, "train", "tiny.yaml", "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_weights(trained / RUN / "final", trained / "expected")
    assert manifest(trained)["steps_done"] == 6
    assert not (trained / RUN / "checkpoints/checkpoint-7").exists()


@pytest.mark.slow
def test_a_model_that_gets_worse_ends_with_its_best_checkpoint(tiny):
    overrides = ["training.learning_rate=0.02", "training.lr_scheduler_type=constant", "training.max_grad_norm=0"]
    arguments = [part for pair in overrides for part in ("--set", pair)]
    result = run_trainer(tiny.parent, "train", "tiny.yaml", *arguments)
    assert result.returncode == 0, result.stderr
    best = manifest(tiny.parent)["best_checkpoint"]
    assert not best.endswith("checkpoint-6")
    final, chosen, last = (
        weights(tiny.parent / part) for part in (f"{RUN}/final", best, f"{RUN}/checkpoints/checkpoint-6")
    )
    assert all(torch.equal(final[name], chosen[name]) for name in final)
    assert not all(torch.equal(final[name], last[name]) for name in final)


STOCK = """
import json, sys
from sentence_transformers import SparseEncoder
model = SparseEncoder(sys.argv[1], device="cpu")
texts = json.loads(sys.argv[2])
encode = dict(convert_to_sparse_tensor=False, show_progress_bar=False)
print(json.dumps([model.encode_query(texts, **encode).tolist(), model.encode_document(texts, **encode).tolist()]))
assert not any(name.split(".")[0] == "trainer" for name in sys.modules)
"""


@pytest.mark.slow
def test_a_saved_model_gives_the_same_vectors_in_a_fresh_process_without_our_code(trained, tmp_path_factory):
    folder = trained / RUN / "final"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, elsewhere / "model")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", STOCK, "model", json.dumps(SENTENCES)],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    queries, documents = json.loads(found.stdout.splitlines()[-1])
    model = SparseEncoder(str(folder), device="cpu")
    encode = {"convert_to_sparse_tensor": False, "show_progress_bar": False}
    torch.testing.assert_close(torch.tensor(queries), model.encode_query(SENTENCES, **encode), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(documents), model.encode_document(SENTENCES, **encode), atol=1e-5, rtol=1e-5
    )


def test_tensorboard_has_every_scalar_and_the_probe_sentences(trained):
    events = EventAccumulator(str(trained / RUN / "logs"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "loss/total",
        "loss/base_loss",
        "loss/document_regularizer_loss",
        "regularizer/document_regularizer_weight",
        "optimizer/learning_rate_model",
        "optimizer/learning_rate_query",
        "sparsity/query/active_dims_mean",
        "sparsity/query/active_dims_p95",
        "sparsity/document/active_dims_mean",
        "sparsity/document/active_dims_p95",
        "sparsity/document/never_active_share",
        "sparsity/flops",
        "speed/samples_per_second",
        "speed/tokens_per_second",
        "speed/padding_share",
        "memory/peak (GiB)",
        "eval/search_ndcg@10",
        "eval/quickstart_ndcg@10",
        "eval/quickstart_nli_loss",
        "eval/quickstart_ddsc-triplets_loss",
    } <= scalars
    assert len(events.Scalars("loss/total")) == 6
    assert not [tag for tag in scalars if tag.startswith("eval/") and tag.endswith(("_runtime", "per_second"))]
    text = events.Tensors(next(tag for tag in events.Tags()["tensors"] if "top terms" in tag))[-1]
    panel = text.tensor_proto.string_val[0].decode()
    assert "Galdhøpiggen" in panel
    assert "Storebæltsbroen" in panel
    assert "Älgjakten" in panel


def test_query_weights_move_at_their_own_rate(trained):
    events = EventAccumulator(str(trained / RUN / "logs"))
    events.Reload()
    model, query = (events.Scalars(f"optimizer/learning_rate_{part}") for part in ("model", "query"))
    assert all(q.value == pytest.approx(10 * m.value) for m, q in zip(model, query, strict=True))


# ---------------------------------------------------------------------------------- other architectures
@pytest.mark.parametrize("architecture", ["splade", "csr"])
def test_every_architecture_trains_saves_and_reloads(tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    base = write_dense(tmp_path / "base") if architecture == "csr" else write_bert(tmp_path / "base")
    config_of(tmp_path, base, architecture)
    result = run_trainer(tmp_path, "train", "config.yaml", "--set", "training.max_steps=2")
    assert result.returncode == 0, result.stderr
    model = SparseEncoder(str(tmp_path / "models/config/final"), device="cpu")
    vectors = model.encode_document(SENTENCES, convert_to_sparse_tensor=False, show_progress_bar=False)
    assert vectors.shape == (2, 64 if architecture == "csr" else len(model.tokenizer))
    assert (vectors > 0).any(1).all()


@pytest.mark.slow
def test_csr_leaves_the_dense_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write_dense(tmp_path / "base")
    config_of(tmp_path, base, "csr")
    assert run_trainer(tmp_path, "train", "config.yaml", "--set", "training.max_steps=2").returncode == 0
    before, after = weights(base), weights(tmp_path / "models/config/final")
    kept = [name for name in before if name in after]
    assert len(kept) > 5
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.slow
def test_cached_loss_gives_the_loss_curve_of_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    curves = []
    # no dropout: its draws differ between one forward pass and several
    for name, *overrides in (["plain"], ["cached", "loss.cached=true", "loss.mini_batch_size=3"]):
        loaded = load_config(tmp_path / "tiny.yaml", ["model.from_scratch.dropout=0.0", *overrides])
        train(loaded, Run.create(loaded, name), echo=lambda line: None)
        events = EventAccumulator(str(tmp_path / f"models/{name}/logs"))
        events.Reload()
        curves.append([event.value for event in events.Scalars("loss/total")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


# ---------------------------------------------------------------------------------- resume
@pytest.mark.slow
def test_a_resumed_run_ends_like_an_uninterrupted_one(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    run = folder / RUN
    for part in ("checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "final"):
        shutil.rmtree(run / part)
    result = run_trainer(folder, "train", "tiny.yaml", "--resume")
    assert result.returncode == 0, result.stderr
    assert "resuming from models/tiny/checkpoints/checkpoint-2" in result.stdout
    assert_same_weights(run / "checkpoints/checkpoint-6", trained / RUN / "checkpoints/checkpoint-6")
    assert_same_weights(run / "final", trained / RUN / "final")


def test_resume_skips_truncated_and_foreign_checkpoints_and_takes_the_next_older(trained):
    run = Run.open(load_config(trained / "tiny.yaml"))
    checkpoints = run.checkpoints
    said = []
    assert newest_complete(checkpoints, run.id, said.append).name == "checkpoint-6"
    os.truncate(checkpoints / "checkpoint-6/optimizer.pt", 100)
    assert newest_complete(checkpoints, run.id, said.append).name == "checkpoint-4"
    assert "checkpoint-6 is skipped: optimizer.pt has 100 bytes instead of" in said[-1]
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-9")
    seal = json.loads((checkpoints / "checkpoint-9/complete.json").read_text())
    (checkpoints / "checkpoint-9/complete.json").write_text(json.dumps(seal | {"run": "another"}))
    assert newest_complete(checkpoints, run.id, said.append).name == "checkpoint-4"
    assert any("checkpoint-9 is skipped: it belongs to another run" in line for line in said)
    (checkpoints / "checkpoint-4/complete.json").unlink()
    assert fault_of(checkpoints / "checkpoint-4", run.id) == "it was not written to its end"
    (checkpoints / "checkpoint-2/document_0_Transformer/model.safetensors").unlink()
    assert newest_complete(checkpoints, run.id, said.append) is None


def test_training_over_an_existing_run_stops_and_says_what_to_type(trained):
    result = run_trainer(trained, "train", "tiny.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: models/tiny exists. To continue it: make resume CONFIG=tiny")
    assert result.stderr.count("\n") == 1
    assert manifest(trained)["status"] == "finished"


def test_resuming_what_was_never_started_says_what_to_type(tiny):
    result = run_trainer(tiny.parent, "train", "tiny.yaml", "--resume")
    assert result.returncode == 2
    assert "holds no run to resume" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_its_step_says_how_to_go_on_and_does(tiny, number, code):
    folder = tiny.parent
    (folder / "tiny.yaml").write_text(
        TINY.replace("max_steps: 6", "max_steps: 400").replace("_steps: 2", "_steps: 200")
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", "tiny.yaml"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    logs = folder / RUN / "logs"
    deadline = time.monotonic() + 120
    while not list(logs.glob("*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(number)
    time.sleep(0.02)  # a shell's group and a program that passes signals on: twice, but one wish
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert "To go on: make resume CONFIG=tiny.yaml" in errors
    found = manifest(folder)
    assert found["status"] == "stopped"
    assert 0 < found["steps_done"] < 400
    assert fault_of(folder / RUN / f"checkpoints/checkpoint-{found['steps_done']}", found["id"]) is None


SIGNAL_IN_EVALUATION = """
import os, signal, time
from trainer.training.evaluators import SearchEvaluator
evaluate, calls = SearchEvaluator.__call__, []
def endless(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 2:  # the first is before training
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(120)
    return evaluate(self, *args, **kwargs)
SearchEvaluator.__call__ = endless
"""


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short_and_saves_a_checkpoint(tiny):
    begin = time.monotonic()
    result = run_python(tiny.parent, SIGNAL_IN_EVALUATION)
    assert time.monotonic() - begin < 110
    assert result.returncode == 143, result.stderr
    assert "Stopped at step 2; everything up to it is saved" in result.stderr
    found = manifest(tiny.parent)
    assert fault_of(tiny.parent / RUN / "checkpoints/checkpoint-2", found["id"]) is None
    resumed = run_trainer(tiny.parent, "train", "tiny.yaml", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert manifest(tiny.parent)["steps_done"] == 6


# ---------------------------------------------------------------------------------- failures
def run_python(folder, code, **kwargs):
    """Train tiny.yaml in a process of its own after running `code`."""
    return run_trainer(folder, "train", "tiny.yaml", code=code, **kwargs)


NAN_AT_STEP_4 = """
from sentence_transformers.sparse_encoder import SparseEncoderTrainer
compute_loss = SparseEncoderTrainer.compute_loss
def poisoned(self, *args, **kwargs):
    loss = compute_loss(self, *args, **kwargs)
    return loss * float("nan") if self.model.training and self.state.global_step == 3 else loss
SparseEncoderTrainer.compute_loss = poisoned
"""


@pytest.mark.slow
def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tiny):
    result = run_python(tiny.parent, NAN_AT_STEP_4)
    assert result.returncode == 2
    assert result.stderr.endswith(
        "Error: the loss became NaN at step 4. The last checkpoint is as good as it was. Go on from it with a rate lower "
        "than 0.001: make resume CONFIG=tiny.yaml SET=training.learning_rate=0.0001\n"
    )
    run = tiny.parent / RUN
    found = manifest(tiny.parent)
    assert found["status"] == "failed"
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert fault_of(run / "checkpoints/checkpoint-2", found["id"]) is None
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights(run / "checkpoints/checkpoint-2").values())


FULL_AT_STEP_4 = """
import os, torch
save = torch.save
def full(value, file, *args, **kwargs):
    if "checkpoint-4" in str(file) and "optimizer" in str(file):
        os.symlink("/dev/full", file)  # every write to it fails as on a full disk
    return save(value, file, *args, **kwargs)
torch.save = full
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_half_written_checkpoint_is_gone(tiny):
    result = run_python(tiny.parent, FULL_AT_STEP_4)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(
        "Error: the disk is full under models/tiny. Free some space, then go on: make resume CONFIG=tiny"
    )
    assert [path.name for path in (tiny.parent / RUN / "checkpoints").iterdir()] == ["checkpoint-2"]
    again = run_trainer(tiny.parent, "train", "tiny.yaml", "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming from models/tiny/checkpoints/checkpoint-2" in again.stdout
    assert manifest(tiny.parent)["status"] == "finished"


def test_a_failure_before_the_first_step_leaves_nothing_in_the_way(tiny):
    text = TINY.replace("  quickstart: {}", "  mine: {source: later.jsonl, eval_rows: 0}").replace("size: 8", "size: 2")
    tiny.write_text(text)
    assert "no file matches later.jsonl" in run_trainer(tiny.parent, "train", "tiny.yaml").stderr
    rows = [{"anchor": f"hva er {i}", "positive": f"svaret er {i}"} for i in range(20)]
    (tiny.parent / "later.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run_trainer(tiny.parent, "train", "tiny.yaml")
    assert result.returncode == 0, result.stderr
    assert "the last step: there is nothing to evaluate with" in result.stdout


def test_a_device_that_is_not_here_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    from trainer.config import ConfigError
    from trainer.system.device import choose_device

    config = load_config(ROOT / "configs/training_config_splade_h100.yaml").config
    with pytest.raises(ConfigError, match=r"hardware.device is cuda, but torch .* finds no such device"):
        choose_device(config)


@pytest.mark.slow
def test_neither_evaluating_nor_saving_takes_time_of_the_steps(tiny, monkeypatch):
    from trainer.training import evaluators
    from trainer.training import trainer as loop

    slept = []

    def slow(function):
        def slower(*args, **kwargs):
            slept.append(0.5)
            time.sleep(slept[-1])
            return function(*args, **kwargs)

        return slower

    monkeypatch.setattr(evaluators.SearchEvaluator, "__call__", slow(evaluators.SearchEvaluator.__call__))
    monkeypatch.setattr(loop, "seal", slow(loop.seal))
    loaded = load_config(tiny, ("training.max_steps=2", "training.eval_steps=1", "training.save_steps=1"))
    start = time.perf_counter()
    train(loaded, Run.create(loaded), echo=lambda line: None)
    seconds, found = time.perf_counter() - start, manifest(tiny.parent)
    assert len(slept) == 4 + 2  # scored before, twice between, and after; two checkpoints
    assert 0 < found["train_seconds"] < found["total_seconds"] - sum(slept)
    assert found["total_seconds"] == pytest.approx(seconds, abs=0.5)
    assert found["rows_trained"] / found["samples_per_second"] == pytest.approx(found["train_seconds"], abs=0.01)


def test_the_verdict_names_no_score_where_nothing_was_searched():
    from trainer.training.train import verdict

    manifest = {"train_seconds": 125.4, "total_seconds": 190.0, "samples_per_second": 12.34, "padding_share": 0.082}
    assert verdict({}, {}, None, manifest | {"peak_memory_gib": 1.25}) == (
        "verdict   2 min 5 s of steps (3 min 10 s in all), 12.3 samples/s, 8% padding, peak memory 1.2 GiB"
    )


def write_rows(folder, text="hva er"):
    rows = [
        {"anchor": f"{text} {i}", "positive": f"svaret er {i}", "negative": f"ikke {i}" if i % 2 else None}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    local = TINY.replace("  quickstart: {}", "  mine: {source: rows.jsonl, eval_rows: 4}")
    (folder / "tiny.yaml").write_text(local)


@pytest.mark.slow
def test_without_a_search_set_the_checkpoint_with_the_lowest_evaluation_loss_wins(tiny):
    write_rows(tiny.parent)
    result = run_trainer(tiny.parent, "train", "tiny.yaml")
    assert result.returncode == 0, result.stderr
    assert "the checkpoint with the lowest evaluation loss: there is no search set" in result.stdout
    state = json.loads((tiny.parent / RUN / "checkpoints/checkpoint-6/trainer_state.json").read_text())
    losses = {}
    for row in state["log_history"]:
        for key, value in row.items():
            if key.startswith("eval_mine"):
                losses.setdefault(row["step"], {})[key] = value
    # two sets of held-out rows, triplets and pairs: the mean by their rows
    data = load_data(load_config(tiny).config)
    rows = {f"eval_{name}_loss": len(dataset) for name, dataset in data.eval.items()}
    means = {step: sum(found[key] * rows[key] for key in rows if key in found) / 4 for step, found in losses.items()}
    best = manifest(tiny.parent)["best_metric"]
    assert best["name"] == "eval_loss"
    assert best["value"] == pytest.approx(min(means.values()), rel=1e-4)


@pytest.mark.slow
def test_accumulation_checkpointing_and_loader_workers_train_too(tiny):
    overrides = ["training.gradient_accumulation_steps=2", "training.dataloader_num_workers=2", "training.max_steps=2"]
    overrides += ["hardware.gradient_checkpointing=true", "training.dataloader_prefetch_factor=2"]
    result = run_trainer(tiny.parent, "train", "tiny.yaml", *(part for pair in overrides for part in ("--set", pair)))
    assert result.returncode == 0, result.stderr
    found = manifest(tiny.parent)
    assert found["steps_done"] == 2
    assert sum(summary["rows_drawn"] for summary in found["datasets"].values()) in range(
        28, 33
    )  # four batches of 7 or 8
    assert found["rows_trained"] in range(28, 33)


# ---------------------------------------------------------------------------------- what a resumed run may change
@pytest.mark.slow
def test_resume_remembers_overrides_takes_over_changed_keys_and_says_so(trained):
    started = run_trainer(trained, "train", "tiny.yaml", "--name", "b", "--set", "training.max_steps=2")
    assert started.returncode == 0, started.stderr
    (trained / "tiny.yaml").write_text(TINY.replace("logging_steps: 1", "logging_steps: 2"))
    resumed = run_trainer(trained, "train", "tiny.yaml", "--name", "b", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "changed   training.logging_steps: 1 → 2" in resumed.stdout
    assert "changed   training.max_steps" not in resumed.stdout
    assert "overrides training.max_steps=2 (given before; they go before the file)" in resumed.stdout
    found = manifest(trained, "models/b")
    assert (found["steps"], found["status"]) == (2, "finished")


def test_resume_refuses_another_model_or_other_rows(tiny):
    folder = tiny.parent
    write_rows(folder)
    assert run_trainer(folder, "train", "tiny.yaml").returncode == 0
    other = run_trainer(folder, "train", "tiny.yaml", "--resume", "--set", "model.query_init=ones")
    assert other.returncode == 2
    assert "'model.query_init' was idf when models/tiny was started, and is ones now" in other.stderr
    write_rows(folder, text="hva var")
    files = [folder / RUN / name for name in ("run.json", "config.yaml")]
    before = [file.read_text() for file in files]
    changed = run_trainer(folder, "train", "tiny.yaml", "--resume", "--set", "training.learning_rate=5")
    assert changed.returncode == 2
    assert "the rows of data set 'mine' have changed since models/tiny was started" in changed.stderr
    assert [file.read_text() for file in files] == before  # a finished run stays one


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 3])
def test_a_resume_across_an_epoch_ends_like_an_uninterrupted_run(tiny, queries):
    folder = tiny.parent
    write_rows(folder)
    epochs = ["--set", "training.num_train_epochs=2", "--set", "training.max_steps=-1"]
    epochs += ["--set", f"datasets.queries_per_passage={queries}"]
    for name in ("whole", "parts"):
        assert run_trainer(folder, "train", "tiny.yaml", "--name", name, *epochs).returncode == 0
    steps = manifest(folder, "models/whole")["steps_done"]
    run = folder / "models/parts"
    kept = steps - 4  # in the first epoch
    for path in run.glob("checkpoints/checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > kept:
            shutil.rmtree(path)
    shutil.rmtree(run / "final")
    result = run_trainer(folder, "train", "tiny.yaml", "--name", "parts", "--resume")
    assert result.returncode == 0, result.stderr
    assert f"resuming from models/parts/checkpoints/checkpoint-{kept}" in result.stdout
    last = f"checkpoints/checkpoint-{steps}"
    assert_same_weights(run / last, folder / "models/whole" / last)
    once, twice = manifest(folder, "models/whole"), manifest(folder, "models/parts")
    assert twice["rows_trained"] > once["rows_trained"]  # what was trained again counts again
    assert twice["train_seconds"] > 0


def test_the_model_card_shows_no_row_of_the_training_data(trained):
    card = (trained / RUN / "final/README.md").read_text()
    assert "loss:SpladeLoss" in card
    rows = [row for dataset in load_data(load_config(trained / "tiny.yaml").config).train.values() for row in dataset]
    assert len(rows) > 400
    assert not [text for row in rows for text in row.values() if text in card]


# ---------------------------------------------------------------------------------- what this machine cannot do
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["training.bf16=true"],
            "training.bf16: on this CPU a matrix product takes 13.2 times as long in bfloat16",
        ),
        (["training.fp16=true"], "training.fp16 is for CUDA"),
        (["hardware.tf32=true", "hardware.device=auto"], "hardware.tf32 is for CUDA"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line(tiny, monkeypatch, overrides, says):
    from trainer.config import ConfigError
    from trainer.system.device import choose_device

    monkeypatch.setattr("trainer.system.device.bfloat16_time", lambda: 13.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        choose_device(load_config(tiny, overrides).config)


def test_bfloat16_is_taken_where_the_cpu_is_no_slower_in_it_and_only_the_first_process_tries(tiny, monkeypatch):
    from trainer.system.device import choose_device

    config = load_config(tiny, ["training.bf16=true"]).config
    monkeypatch.setattr("trainer.system.device.bfloat16_time", lambda: 0.4996)
    says = "hardware.device says so; a matrix product in bfloat16 takes 0.5 times as long as in float32"
    assert choose_device(config) == ("cpu", says)
    monkeypatch.setattr("trainer.system.device.bfloat16_time", lambda: 13.2)
    monkeypatch.setenv("RANK", "1")
    assert choose_device(config) == ("cpu", "hardware.device says so")


@pytest.mark.parametrize(("plain", "half"), [(0.002, 0.01), (0.01, 0.002)])
def test_the_time_of_bfloat16_is_measured(monkeypatch, plain, half):
    from trainer.system.device import bfloat16_time

    monkeypatch.setattr(torch, "mm", lambda a, b: time.sleep(half if a.dtype == torch.bfloat16 else plain))
    assert bfloat16_time.__wrapped__() == pytest.approx(half / plain, rel=0.5)


def test_several_gpus_want_to_be_counted(tiny, monkeypatch):
    from trainer.config import ConfigError
    from trainer.system.device import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = load_config(tiny, ["hardware.device=cuda"]).config
    with pytest.raises(ConfigError, match="8 GPUs"):
        choose_device(config)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert choose_device(config)[0] == "cuda"
