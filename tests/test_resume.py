"""What a resumed run does with each key that has changed: it is seen to be applied, or refused with a reason."""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import BaseModel
from safetensors.torch import load_file
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss
from sentence_transformers.sparse_encoder.modules import Router, SparseAutoEncoder
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import TrainerControl, TrainerState

from tests.checkpoints import write_bert
from tests.test_models import build_from, config_of
from tests.test_training import RUN, weights
from trainer.config import Config, ConfigError, LoadedConfig, load_config
from trainer.config.resume import MODEL, ORDER, ROWS, RULES, UNIT, rule_of, why_refused
from trainer.config.schema import DatasetsConfig, LocalSource
from trainer.config.tree import Origin
from trainer.data.batches import MixedBatches
from trainer.data.loading import load_data
from trainer.data.roles import LABEL
from trainer.losses.build import build_csr_loss
from trainer.losses.dims_controller import DimsController
from trainer.losses.regularizers import Step
from trainer.losses.statistics import BatchStatistics
from trainer.models.build import load_model, save_model
from trainer.publish.card import changes_on_the_way
from trainer.runs.checkpoints import seal
from trainer.runs.run import Run
from trainer.training.arguments import build_arguments
from trainer.training.callbacks.active_dims_annealing import ActiveDimsAnnealing
from trainer.training.callbacks.dead_dim_reviver import DeadDimReviver
from trainer.training.callbacks.tensorboard_log import TensorBoardLog
from trainer.training.evaluators import build_evaluator
from trainer.training.prepare import Decisions, tokenise
from trainer.training.progress import Progress
from trainer.training.start_weights import keep_start_weights, mix_in_start_weights
from trainer.training.train import train
from trainer.training.trainer import SparseTrainer


def sections_of(field):
    options = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def keys_of(section=Config, path=()):
    """(path, section) of every key, also of those that hold a section which may be null."""
    fields = section.model_fields.items()
    fields = [*fields, ("mine", None)] if section is DatasetsConfig else fields
    for name, field in fields:
        inner = sections_of(field) if field else [LocalSource]
        if not inner or section is not Config:
            yield (*path, name), section
        for part in inner:
            yield from keys_of(part, (*path, name))


KEYS = dict(keys_of())
APPLIED = [".".join(path) for path in KEYS if why_refused(path, 1, 2) is None]


# ---------------------------------------------------------------------------------- the table
def test_every_section_has_a_rule_and_every_rule_a_key():
    paths = {".".join(path) for path in KEYS}
    assert set(Config.model_fields) <= set(RULES) <= paths | set(Config.model_fields)
    assert len(KEYS) > 150


@pytest.mark.parametrize(
    "key,rule",
    [
        ("model.base_model", MODEL),
        ("model.prompts.query", MODEL),
        ("model.vocabulary", MODEL),
        ("model.from_scratch.hidden_size", MODEL),
        ("loss.teacher.model", None),
        ("loss.regularizer", UNIT),
        ("datasets.nli.revision", ROWS),
        ("datasets.scandi_qa.norquad.max_samples", ROWS),
        ("datasets.mine.columns.anchor", ROWS),
        ("datasets.mine.language", None),
        ("datasets.language", ROWS),
        ("datasets.epoch", ORDER),
    ],
)
def test_a_key_follows_the_rule_of_the_nearest_section(key, rule):
    assert rule_of(tuple(key.split("."))) is rule


def going_on(tmp_path, monkeypatch, path, old, new):
    """go_on_with where one key was `old` and is `new`. Returns what it said, and the run."""

    def loaded(value):
        for key in reversed(path):
            value = {key: value}
        dumps = SimpleNamespace(model_dump=lambda mode="python": value)
        return LoadedConfig("tiny", tmp_path / "tiny.yaml", dumps, {path: Origin("tiny.yaml", 7)})

    monkeypatch.setattr("trainer.runs.run.load_config", lambda file: loaded(old))
    run, said = Run(tmp_path / "tiny"), []
    run.folder.mkdir(exist_ok=True)
    run.go_on_with(loaded(new), [], said.append)
    return said, run


def test_every_key_of_the_table_is_announced_or_refused_with_its_reason(tmp_path, monkeypatch):
    for path in KEYS:
        dotted, rule = ".".join(path), rule_of(path)
        if rule is None or rule.only_null:
            said, run = going_on(tmp_path, monkeypatch, path, 1, 2)
            assert said == [f"changed   {dotted}: 1 → 2"]
            assert run.manifest["changes"] == [{"key": dotted, "from": 1, "to": 2}]
            shutil.rmtree(run.folder)
        if rule is not None:
            values = (None, 2) if rule.only_null else (1, 2)
            for old, new in (values, values[::-1]):
                with pytest.raises(ConfigError) as caught:
                    going_on(tmp_path, monkeypatch, path, old, new)
                line = caught.value.format_message()
                assert line.startswith(f"tiny.yaml:7: '{dotted}' was {old} when ")
                assert f"and is {new} now. A resume cannot change it: {rule.because}. Put it back, or copy" in line
                assert not list((tmp_path / "tiny").iterdir())  # nothing is written, nor announced


def test_what_is_refused_is_refused_before_anything_is_announced(trained):
    overrides = ["training.learning_rate=1e-4", "training.seed=1"]
    loaded, said = load_config(trained / "tiny.yaml", overrides), []
    before = (trained / RUN / "config.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"--set training.seed=1: 'training.seed' was 42 when models/tiny was started"
    ):
        Run.open(loaded).go_on_with(loaded, overrides, said.append)
    assert said == []
    assert (trained / RUN / "config.yaml").read_text() == before


# ---------------------------------------------------------------------------------- one resume that changes everything
CHANGES = {
    "model.use_router": "true",
    "model.dropout": 0.25,
    "model.code_sha256": f"{{modeling.py: {'a' * 64}}}",
    "training.max_steps": 10,
    "training.per_device_train_batch_size": 12,
    "training.per_device_eval_batch_size": 32,
    "training.gradient_accumulation_steps": 2,
    "training.learning_rate": 5e-4,
    "training.query_learning_rate": 3e-3,
    "training.max_seq_length": 16,
    "training.warmup_steps": 4,
    "training.lr_scheduler_type": "cosine",
    "training.weight_decay": 0.5,
    "training.max_grad_norm": 0.5,
    "training.bf16": "true",
    "training.torch_compile": "true",
    "training.eval_steps": 3,
    "training.save_steps": 3,
    "training.save_total_limit": 5,
    "training.load_best_model_at_end": "false",
    "training.logging_steps": 2,
    "loss.document_regularizer_weight": 2e-3,
    "loss.query_regularizer_weight": 1e-4,
    "loss.document_dims_cap": 5,
    "loss.scale": 0.7,
    "loss.cached": "true",
    "loss.mini_batch_size": 4,
    "loss.teacher": "{model: ./teacher, kind: dense, objective: kl, temperature: 2.0, weight: 0.5, score_scale: 3.0}",
    "evaluation.search": "[four]",
    "evaluation.track_sparsity": "false",
    "evaluation.log_decoded_samples": 2,
    "evaluation.mteb_tasks": "[NorQuadRetrieval]",
    "model_card.model_name": "Ny",
    "model_card.language": "[da]",
    "model_card.license": "mit",
    "model_card.tags": "[x]",
    "hardware.device": "auto",
    "hardware.fused_head": "false",
}


def resume(folder, *overrides, patches=()):
    """Go on with the run in this working directory. Returns its trainer, config, lines and manifest."""
    made, said = [], []

    class Kept(SparseTrainer):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    with ExitStack() as stack:
        for target, value in (("trainer.training.train.SparseTrainer", Kept), *patches):
            stack.enter_context(patch(target, value))
        loaded = load_config(folder / "tiny.yaml", overrides)
        run = Run.open(loaded)
        run.go_on_with(loaded, overrides, said.append)
        train(loaded, run, resume=True, echo=said.append)
    return SimpleNamespace(
        trainer=made[0], config=loaded.config, said=said, manifest=run.manifest, run=run, folder=folder
    )


@pytest.fixture(scope="module")
def resumed(trained_once, tmp_path_factory):
    """The tiny run gone on with from step 2 with another value of every key that can be seen on a CPU."""
    from tests.checkpoints import DOCUMENTS, QUERIES

    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    for part in ("checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "final"):
        shutil.rmtree(folder / RUN / part)
    four = folder / "four"
    four.mkdir()
    for name, texts in (("corpus", DOCUMENTS), ("queries.dev", QUERIES)):
        (four / f"{name}.jsonl").write_text(
            "".join(json.dumps({"_id": str(n), "text": t}) + "\n" for n, t in enumerate(texts))
        )
    (four / "qrels.dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{n}\t{n}\t1\n" for n in range(4)))
    asked = []

    def add_teacher_scores(sets, teacher, *_):
        asked.append(teacher)
        subsets = {name: rows for subsets in sets.values() for name, rows in subsets.items()}
        taught = {
            name: rows.add_column(LABEL, [[1.0, 0.0]] * len(rows))
            for name, rows in subsets.items()
            if "negative" in rows.column_names
        }
        return taught, {"model": teacher.model}

    def choose_device(config):
        asked.append(config.hardware.device)
        return "cpu", "as the test says"

    def compile_networks(model, lengths):
        asked.append(lengths)
        return "as the test says"

    patches = [
        (f"trainer.training.prepare.{found.__name__}", found)
        for found in (add_teacher_scores, choose_device, compile_networks)
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        found = resume(folder, *(f"{key}={value}" for key, value in CHANGES.items()), patches=patches)
        found.device, found.teacher, found.lengths = asked
        yield found


def share(step):
    """Of the rate after so many steps: warmed up over 4 steps of 10, then along half a cosine."""
    return step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))


def logged(resumed, key):
    """By step, what was logged since step 2."""
    return {row["step"]: row[key] for row in resumed.trainer.state.log_history if key in row and row["step"] > 2}


def groups_at(resumed, step):
    """The optimizer's groups in a checkpoint."""
    file = resumed.folder / RUN / f"checkpoints/checkpoint-{step}/optimizer.pt"
    return torch.load(file, weights_only=True)["param_groups"]


def rates_are_new(resumed):
    assert logged(resumed, "learning_rate") == pytest.approx({n: 5e-4 * share(n - 1) for n in (4, 6, 8, 10)})
    return True


def untrained_positions_shrink(resumed):
    """Positions that no text reaches have no gradient, so weight decay alone changes them: by 1 - rate × 0.5 per step."""
    before, after = (
        next(value for name, value in weights(folder).items() if name.endswith("position_embeddings.weight"))[40:]
        for folder in (resumed.folder / RUN / "checkpoints/checkpoint-2", resumed.folder / RUN / "final")
    )
    assert before.abs().max() > 0.001
    left = math.prod(1 - 5e-4 * share(step) * 0.5 for step in range(2, 10))
    torch.testing.assert_close(after, before * left, rtol=1e-5, atol=0)
    assert left < 0.9995
    return True


def arguments_of(**keys):
    """What the library's arguments are made with."""
    section, key = next(iter(keys)).split("__")
    config = SimpleNamespace(
        **{name: getattr(BASE, name) for name in Config.model_fields if name != section},
        **{section: getattr(BASE, section).model_copy(update={key: keys[f"{section}__{key}"]})},
    )
    run = SimpleNamespace(checkpoints="checkpoints")
    with patch("trainer.training.arguments.SparseEncoderTrainingArguments", dict):
        return build_arguments(config, run, nn.Linear(1, 1), nn.Linear(1, 1), "cuda", best_metric=None)


BASE = Config.model_validate(
    {
        "model": {"base_model": "from-scratch", "architecture": "inference-free-splade"},
        "training": {},
        "loss": {"type": "splade", "document_regularizer_weight": 1e-3},
        "datasets": {"quickstart": {}},
    }
)


def csr_config(**keys):
    """A code of 4 dims, started at 16 over all of 10 steps."""
    model = {"csr_k": 4, "csr_k_start": 16, "csr_k_share": 1.0, "csr_revive_steps": 3} | keys
    return SimpleNamespace(model=SimpleNamespace(**model))


def k_at_step_5(**keys):
    annealing = ActiveDimsAnnealing(SparseAutoEncoder(8, 64, 4, 8), csr_config(**keys))
    annealing.on_step_begin(None, SimpleNamespace(global_step=5, max_steps=10), None)
    return annealing.autoencoder.k


def revives_at(step, **keys):
    reviver, revived = DeadDimReviver(SparseAutoEncoder(8, 64, 4, 8), None, csr_config(**keys)), []
    reviver.revive = revived.append
    reviver.on_step_end(None, SimpleNamespace(global_step=step, max_steps=100), None, optimizer="optimizer")
    return bool(revived)


def most_queries(resumed, *overrides):
    """Queries that a passage may have in the sets that a resumed run tokenises."""
    config = load_config(resumed.folder / "tiny.yaml", list(overrides)).config
    data = load_data(config)
    tokenise(config, data, resumed.trainer.model, "cpu", Decisions(print), keep=True)
    return {rows.further.most if rows.further else 1 for rows in data.tokens.values()}


def weight_with_target(target):
    """The weight that a controller goes on to, from the checkpoint of one whose target is 20 dims, and met."""
    saved, resumed = DimsController(20), DimsController(target)
    for step in range(1, 60):
        saved.update(Step(rows=8, active_dims=20, penalty=1.0), 1.0, step, 100)
    resumed.load(saved.state())
    return resumed.update(Step(rows=8, active_dims=20, penalty=1.0), 1.0, 60, 100)


def mixed(share):
    """A weight that was 1 before training and is 4 after it."""
    model, run = nn.Linear(1, 1, bias=False), Run(Path("mixed"))
    run.folder.mkdir(exist_ok=True)
    nn.init.constant_(model.weight, 1)
    keep_start_weights(model, run)
    nn.init.constant_(model.weight, 4)
    mix_in_start_weights(model, run, share)
    return model.weight.item()


def csr_loss(**keys):
    loss = {"scale": None, "teacher": None, "beta": 0.1, "gamma": 1.0} | keys
    loss = {"similarity_weight": 0.0, "similarity_temperature": 0.02} | loss
    return build_csr_loss(SimpleNamespace(loss=SimpleNamespace(**loss)), nn.Linear(1, 1), BatchStatistics(), None)


def searches_with(**keys):
    """The evaluator's NanoBEIR searches by repository, where the hub has them."""
    evaluation = BASE.evaluation.model_copy(update=keys)
    config = SimpleNamespace(training=BASE.training, evaluation=evaluation)
    with (
        patch("trainer.training.evaluators.why_unreachable", lambda repository: None),
        patch(
            "trainer.training.evaluators.ScoredNanoBEIR",
            lambda **found: SimpleNamespace(**found, evaluators=[]),
        ),
    ):
        parts = build_evaluator(config, [], print).parts
    return {found.dataset_id.rpartition("-")[2]: found.dataset_names for found in parts.values()}


def languages_of(folder, language):
    rows = [{"anchor": f"hva er {i}", "positive": f"svaret er {i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"source": str(folder / "rows.jsonl"), "language": language}
    config = Config.model_validate(BASE.model_dump() | {"datasets": {"mine": source}})
    return load_data(config).summaries["mine"]


def rows_of_the_rest(resumed):
    """Rows that were trained on since step 2: what went through the model is what was counted in the data's order."""
    drawn = sum(summary["rows_drawn"] for summary in resumed.manifest["datasets"].values())
    before = load_file(resumed.run.checkpoints / "checkpoint-2/progress.safetensors")
    drawn -= sum(int(rows) for name, rows in before.items() if name.startswith("drawn."))
    assert drawn == resumed.trainer.throughput.totals().rows
    return drawn


def ends_with(folder, step):
    """Whether the final model is that of the checkpoint of this step."""
    final, checkpoint = weights(folder / RUN / "final"), weights(folder / RUN / f"checkpoints/checkpoint-{step}")
    return all(torch.equal(value, checkpoint[name]) for name, value in final.items())


def steps_of(folder, **training):
    """Steps of a run with these keys of the section training."""
    config = load_config(folder / "tiny.yaml", [f"training.{key}={value}" for key, value in training.items()]).config
    return Progress(config, load_data(config)).steps


def teacher_key(key, value):
    return lambda resumed: getattr(resumed.teacher, key) == value


# How each key that is applied is seen: in the resumed run, or in what a resumed run makes anew from the config.
SEEN = {
    "model.use_router": lambda resumed: isinstance(resumed.trainer.model[0], Router),
    "model.dropout": lambda resumed: {
        each.p for each in resumed.trainer.model.modules() if isinstance(each, torch.nn.Dropout)} == {0.25},
    "model.code_sha256": lambda resumed: resumed.run.config().model.code_sha256 == {"modeling.py": "a" * 64},
    "model.csr_k_start": lambda _: (k_at_step_5(), k_at_step_5(csr_k_start=36)) == (8, 12),  # √(16 · 4), √(36 · 4)
    "model.csr_k_share": lambda _: k_at_step_5(csr_k_share=0.5) == 4,
    "model.csr_revive_steps": lambda _: (
        revives_at(6), revives_at(5), revives_at(5, csr_revive_steps=5)) == (True, False, True),
    "training.num_train_epochs": lambda resumed: steps_of(resumed.folder, max_steps=-1, num_train_epochs=3) == 3 * 63,
    "training.max_steps": lambda resumed: resumed.trainer.state.global_step == resumed.manifest["steps_done"] == 10,
    "training.per_device_train_batch_size": lambda resumed: 8 * 2 * 11 <= rows_of_the_rest(resumed) <= 8 * 2 * 12,
    "training.gradient_accumulation_steps": lambda resumed: 8 * 2 * 11 <= rows_of_the_rest(resumed) <= 8 * 2 * 12,
    "training.per_device_eval_batch_size": lambda resumed: (
        {part.batch_size for part in resumed.trainer.evaluator.parts.values()} == {32}
        and resumed.trainer.args.per_device_eval_batch_size == 32),
    "training.learning_rate": rates_are_new,
    "training.warmup_steps": rates_are_new,
    "training.lr_scheduler_type": rates_are_new,
    "training.query_learning_rate": lambda resumed: (
        groups_at(resumed, 9)[-1]["lr"] == pytest.approx(3e-3 * share(9))
        and len(groups_at(resumed, 9)[-1]["params"]) == 1),
    "training.weight_decay": untrained_positions_shrink,
    "training.max_seq_length": lambda resumed: (
        {resumed.trainer.data.tokens[half].lengths().max() for half in resumed.trainer.data.train} == {16}
        and load_model(resumed.folder / RUN / "final", resumed.config, "cpu").max_seq_length == 16),
    "training.max_grad_norm": lambda resumed: resumed.trainer.args.max_grad_norm == 0.5,
    "training.bf16": lambda resumed: resumed.trainer.accelerator.mixed_precision == "bf16",
    "training.fp16": lambda _: arguments_of(training__fp16=True)["fp16"],
    "training.torch_compile": lambda resumed: max(resumed.lengths) == 16,
    "training.dataloader_num_workers": lambda _: (
        arguments_of(training__dataloader_num_workers=3)["dataloader_num_workers"] == 3),
    "training.dataloader_pin_memory": lambda _: arguments_of(training__dataloader_pin_memory=True)["dataloader_pin_memory"],
    "training.dataloader_prefetch_factor": lambda _: (
        arguments_of(training__dataloader_prefetch_factor=3)["dataloader_prefetch_factor"] == 3),
    "training.eval_steps": lambda resumed: [*logged(resumed, "eval_search_ndcg@10")] == [3, 6, 9, 10],
    "training.save_steps": lambda resumed: sorted(
        int(path.name.rpartition("-")[2]) for path in resumed.run.checkpoints.iterdir()) == [2, 3, 6, 9, 10],
    "training.save_total_limit": lambda resumed: len([*resumed.run.checkpoints.iterdir()]) == 5,
    "training.load_best_model_at_end": lambda resumed: ends_with(resumed.folder, 10),
    "training.start_share": lambda _: (mixed(0.25), mixed(0.75)) == (3.25, 1.75),  # 4 and 1 are trained and before
    "training.logging_steps": lambda resumed: [*logged(resumed, "loss")] == [4, 6, 8, 10],
    "loss.document_regularizer_weight": lambda resumed: resumed.trainer.loss.document_regularizer_weight == 2e-3,
    "loss.query_regularizer_weight": lambda resumed: resumed.trainer.loss.query_regularizer_weight == 1e-4,
    "loss.target_document_dims": lambda _: weight_with_target(30) < weight_with_target(20) < weight_with_target(10),
    "loss.target_query_dims": lambda _: weight_with_target(30) < weight_with_target(20) < weight_with_target(10),
    "loss.document_dims_cap": lambda resumed: resumed.trainer.loss.document_regularizer.cap == 5,
    "loss.teacher": lambda resumed: 10 in logged(resumed, "distillation_loss"),
    "loss.teacher.model": teacher_key("model", "./teacher"),
    "loss.teacher.revision": teacher_key("revision", None),
    "loss.teacher.kind": teacher_key("kind", "dense"),
    "loss.teacher.cache": teacher_key("cache", None),
    "loss.teacher.objective": teacher_key("objective", "kl"),
    "loss.teacher.weight": teacher_key("weight", 0.5),
    "loss.teacher.score_scale": teacher_key("score_scale", 3.0),
    "loss.teacher.temperature": teacher_key("temperature", 2.0),
    "loss.teacher.batch_size": teacher_key("batch_size", 32),
    **{f"loss.teacher.prompts{key}": teacher_key("prompts", None) for key in ("", ".query", ".document")},
    "loss.teacher.models": teacher_key("models", None),
    "loss.teacher.passages": teacher_key("passages", "row"),
    "loss.teacher.normalize": teacher_key("normalize", None),
    "loss.scale": lambda resumed: resumed.trainer.loss.loss.scale == 0.7,
    "loss.cached": lambda resumed: isinstance(resumed.trainer.loss, CachedSpladeLoss),
    "loss.mini_batch_size": lambda resumed: resumed.trainer.loss.mini_batch_size == 4,
    "loss.beta": lambda _: csr_loss(beta=0.7).beta == csr_loss(beta=0.7).reconstruction_loss.beta == 0.7,
    "loss.gamma": lambda _: csr_loss(gamma=0.7).gamma == 0.7,
    "loss.similarity_weight": lambda _: csr_loss(similarity_weight=0.7).reconstruction_loss.weight == 0.7,
    "loss.similarity_temperature": lambda _: csr_loss(similarity_temperature=0.7).reconstruction_loss.temperature == 0.7,
    "datasets.mine.language": lambda resumed: (
        languages_of(resumed.folder, "nb").languages == {"nb": 18}
        and languages_of(resumed.folder, "da").languages == {"da": 18}
        and languages_of(resumed.folder, "nb").fingerprint == languages_of(resumed.folder, "da").fingerprint),
    "datasets.queries_per_passage": lambda resumed: (
        (most_queries(resumed), most_queries(resumed, "datasets.queries_per_passage=3")) == ({1}, {3})),
    "evaluation.nanobeir_datasets": lambda _: searches_with(nanobeir_datasets=["nq"]) == {"no": ["nq"], "sv": ["nq"]},
    "evaluation.nanobeir_languages": lambda _: searches_with(nanobeir_languages=["sv"]) == {"sv": None},
    "evaluation.search": lambda resumed: 10 in logged(resumed, "eval_four_ndcg@10"),
    "evaluation.mteb_tasks": lambda resumed: resumed.run.config().evaluation.mteb_tasks == ["NorQuadRetrieval"],
    "evaluation.track_sparsity": lambda resumed: not resumed.trainer.loss.loss.statistics.enabled,
    "evaluation.log_decoded_samples": lambda resumed: (
        len(next(found for found in resumed.trainer.callback_handler.callbacks if isinstance(found, TensorBoardLog)).probes)
        == 2),
    "model_card.model_name": lambda resumed: resumed.trainer.model.model_card_data.model_name == "Ny",
    "model_card.language": lambda resumed: resumed.trainer.model.model_card_data.language == ["da"],
    "model_card.license": lambda resumed: resumed.trainer.model.model_card_data.license == "mit",
    "model_card.tags": lambda resumed: "x" in resumed.trainer.model.model_card_data.tags,
    "hardware.device": lambda resumed: resumed.device == "auto",
    "hardware.tf32": lambda _: arguments_of(hardware__tf32=True)["tf32"],
    "hardware.gradient_checkpointing": lambda _: (
        arguments_of(hardware__gradient_checkpointing=True)["activation_checkpointing"]),
    "hardware.fused_head": lambda resumed: any("hardware.fused_head is false" in line for line in resumed.said),
    "hub.push": lambda _: arguments_of(hub__push=True)["push_to_hub"],
    "hub.repo": lambda _: arguments_of(hub__repo="org/new")["hub_model_id"] == "org/new",
    "hub.private": lambda _: arguments_of(hub__private=False)["hub_private_repo"] is False,
}  # fmt: skip


@pytest.mark.parametrize("key", APPLIED)
def test_a_key_that_a_resume_applies_is_seen_to_be_applied(resumed, key):
    assert SEEN[key](resumed)
    if key in CHANGES:
        assert any(line.startswith(f"changed   {key}: ") for line in resumed.said)


def test_every_key_that_is_applied_is_looked_for_somewhere():
    assert sorted(SEEN) == sorted(APPLIED)


# ---------------------------------------------------------------------------------- the best checkpoint
def test_a_score_of_other_searches_is_compared_with_neither_for_the_best_nor_for_the_verdict(resumed):
    scores = logged(resumed, "eval_choosing_ndcg@10")
    assert resumed.manifest["best_metric"]["value"] == max(scores.values())
    assert resumed.trainer.state.best_global_step in scores
    assert resumed.manifest["before"] == {}
    assert "→" not in resumed.said[-1]


def test_the_best_is_the_best_of_the_steps_that_are_saved():
    trainer = SparseTrainer.__new__(SparseTrainer)
    trainer.control, trainer.state = TrainerControl(), TrainerState(global_step=3)
    trainer.args = SimpleNamespace(metric_for_best_model="eval_x", greater_is_better=True, save_strategy="steps")
    assert not trainer._determine_best_metric({"eval_x": 0.9}, None)
    assert trainer.state.best_metric is None
    trainer.control.should_save = True
    assert trainer._determine_best_metric({"eval_x": 0.5}, None)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 3)


@pytest.fixture
def at_four(trained):
    """The tiny run as it was after step 4 of 6, with checkpoint 2 as its best."""
    for part in ("checkpoints/checkpoint-6", "final"):
        shutil.rmtree(trained / RUN / part)
    checkpoint = trained / RUN / "checkpoints/checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    best = {"best_metric": 0.99, "best_global_step": 2, "best_model_checkpoint": f"{RUN}/checkpoints/checkpoint-2"}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | best))
    seal(checkpoint, Run.open(load_config(trained / "tiny.yaml")).id, 4)
    return trained


def test_a_run_cut_to_the_steps_it_has_ends_with_its_best_checkpoint(at_four):
    found = resume(at_four, "training.max_steps=4", "training.learning_rate=1e-5")
    assert "steps     none left after step 4: what decides how to train has no effect any more" in found.said
    assert ends_with(at_four, 2)
    assert not ends_with(at_four, 4)
    assert "→" in found.said[-1]
    rows = {name: summary["rows_drawn"] for name, summary in found.manifest["datasets"].items()}
    assert sum(rows.values()) in range(28, 33)  # four batches of seven or eight


def test_the_best_checkpoint_of_a_copied_run_is_its_own(at_four):
    """A run whose folder was copied or renamed: the state of its trainer names the folder it was written in."""
    checkpoint = at_four / RUN / "checkpoints/checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = "models/first/checkpoints/checkpoint-2"
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    seal(checkpoint, Run.open(load_config(at_four / "tiny.yaml")).id, 4)
    found = resume(at_four, "training.max_steps=4")
    assert ends_with(at_four, 2)
    assert found.manifest["best_checkpoint"] == f"{RUN}/checkpoints/checkpoint-2"


def test_how_often_a_run_is_evaluated_does_not_change_what_it_learns(trained):
    options = ("training.eval_steps=3", "training.save_steps=3", "training.max_steps=6")
    loaded = load_config(trained / "tiny.yaml", options)
    train(loaded, Run.create(loaded, "other"), echo=lambda line: None)
    for part in ("document_0_Transformer", "query_0_SparseStaticEmbedding"):
        one, other = (load_file(trained / name / "checkpoints/checkpoint-6" / part / "model.safetensors")
                      for name in (RUN, "models/other"))  # fmt: skip
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_checkpoint_by_other_searches_is_not_what_a_run_ends_with(at_four, folder):
    found = resume(at_four, "training.max_steps=4", f"evaluation.search=[{folder}]")
    line = next(line for line in found.said if "do not count" in line)
    reason = "they were measured otherwise (evaluation.search, queries that choose, searches)"
    assert line == f"          checkpoints up to step 4 do not count: {reason}"
    assert ends_with(at_four, 4)
    assert found.manifest["best_metric"]["value"] is None


def test_a_run_cut_below_the_steps_it_has_is_one_line(at_four):
    with pytest.raises(ConfigError) as caught:
        resume(at_four, "training.max_steps=3")
    assert caught.value.format_message() == (
        "--set training.max_steps=3: 'training.max_steps' ends the run after step 3, and its checkpoint has trained 4. "
        "Raise it, or set training.max_steps to 4 to end with what there is"
    )


# ---------------------------------------------------------------------------------- what a checkpoint can not do
def test_a_length_that_the_model_cannot_read_is_one_line_when_resumed_too(tmp_path):
    config = config_of(tmp_path, write_bert(tmp_path / "bert"), "inference-free-splade")
    save_model(build_from(config), tmp_path / "saved")
    longer = config_of(tmp_path, tmp_path / "bert", "inference-free-splade", "training.max_seq_length=65")
    with pytest.raises(ConfigError, match=r"training.max_seq_length: 65 tokens are more than .* can read \(64\)"):
        load_model(tmp_path / "saved", longer, "cpu")
    shorter = config_of(tmp_path, tmp_path / "bert", "inference-free-splade", "training.max_seq_length=5")
    model = load_model(tmp_path / "saved", shorter, "cpu")
    for task in ("query", "document"):
        assert model.preprocess(["en to tre fire fem seks sju åtte"], task=task)["input_ids"].shape == (1, 5)


def test_a_run_goes_on_without_fp16_although_its_checkpoint_scales_gradients(tmp_path):
    torch.save({}, tmp_path / "scaler.pt")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(scaler=None))
    SparseTrainer._load_scaler(trainer, str(tmp_path))


# ---------------------------------------------------------------------------------- rows, whatever the batches
def order_of(config, data, epochs=4):
    """The rows of every batch of the first epochs, as (half, row numbers), from the order that training goes through."""
    samplers = [data.batches(half, config) for halves in data.subsets.values() for half in halves]
    halves = [half for each in data.subsets.values() for half in each]
    parts = [Dataset.from_dict({"x": range(len(data.train[half]))}) for half in halves]
    order = MixedBatches(ConcatDataset(parts), samplers, data.mixture(config))
    ends = np.cumsum([len(part) for part in parts])
    found = []
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for rows in order:
            number = int(np.searchsorted(ends, rows[0], side="right"))
            found.append((halves[number], [row - int(ends[number] - len(parts[number])) for row in rows]))
    return found


def progress_of(tiny, *overrides):
    config = load_config(tiny, [*overrides, "training.max_steps=-1", "training.num_train_epochs=2"]).config
    data = load_data(config)
    return Progress(config, data), order_of(config, data)


def totals(data, parts):
    """(drawn, seen) by set of these (half, rows)."""
    found = {}
    for name, halves in data.subsets.items():
        rows = [(half, row) for half, batch in parts for row in batch if half in halves]
        found[name] = (len(rows), len(set(rows)))
    return found


def summaries(data):
    return {name: (summary.rows_drawn, summary.rows_seen) for name, summary in data.summaries.items()}


def test_rows_are_counted_as_they_were_drawn_before_and_after_a_change_of_the_batch_size(tiny, tmp_path):
    one, order = progress_of(tiny)
    assert one.steps == 126  # two epochs of three sets of 21 batches
    for step in (20, 42):  # at two checkpoints
        one.count(step)
    assert summaries(one.data) == totals(one.data, order[:42])
    one.save(tmp_path, {"metric": "a"})
    two, other = progress_of(tiny, "training.per_device_train_batch_size=16", "training.gradient_accumulation_steps=2")
    two.load(tmp_path, 42, print)
    # two thirds of an epoch are done: of the 17 steps that its 33 batches of 16 make now, 11
    assert two.steps_per_epoch == 17
    assert two.place == 11
    assert two.steps == 42 + (2 * 17 - 11)
    assert two.batches_before(42) == 22
    assert not two.is_comparable({"metric": "b"})
    assert two.is_comparable({"metric": "a"})
    two.plan()
    planned = summaries(two.data)
    for step in (43, 50, two.steps):
        two.count(step)
        last = {43: 24, 50: 33 + 4, two.steps: 2 * 33}[step]
        assert two.batches_before(step) == last
        assert summaries(two.data) == totals(two.data, order[:42] + other[22:last])
    for name, (drawn, seen) in summaries(two.data).items():
        assert planned[name] == (pytest.approx(drawn, abs=2), pytest.approx(seen, abs=2))
        assert drawn == pytest.approx(2 * 162, abs=16)  # two epochs, whatever the batches
        assert seen == 162


def test_a_checkpoint_of_an_earlier_version_is_counted_as_of_batches_like_those_now(tiny, tmp_path):
    progress, order = progress_of(tiny)
    said = []
    progress.load(tmp_path, 10, said.append)
    assert "does not say which were drawn" in said[0]
    progress.count(12)
    assert summaries(progress.data) == totals(progress.data, order[:12])


def test_the_batches_after_a_change_are_those_at_the_same_share_of_the_epoch(resumed):
    """Step 2 of 63 in an epoch of batches of 8 is step 1 of 21 with two batches of 12 each."""
    progress = resumed.trainer.progress
    assert progress.steps_per_epoch == 21
    assert (progress.step, progress.place) == (10, 9)


def test_the_card_says_what_changed_on_the_way_and_no_path():
    changes = [
        {"key": "training.learning_rate", "from": 1e-3, "to": 1e-5, "step": 20},
        {"key": "training.lr_scheduler_type", "from": "linear", "to": "constant", "step": 20},
        {"key": "loss.teacher", "from": None, "to": {"model": "/home/kari/model"}, "step": 30},
        {"key": "loss.teacher.model", "from": "org/a", "to": "/home/kari/model", "step": 30},
        {"key": "evaluation.search", "from": [], "to": ["/home/kari/search"], "step": 30},
    ]
    assert changes_on_the_way({"changes": changes}) == (
        "after step 20: training.learning_rate 0.001 → 1e-05; after step 20: training.lr_scheduler_type linear → constant; "
        "after step 30: loss.teacher None → given; after step 30: loss.teacher.model org/a → <local>"
    )


def test_a_change_holds_from_the_step_that_training_went_on_from_though_that_be_an_earlier_one(tmp_path):
    run = Run(tmp_path)
    run.manifest = {"changes": [{"key": "a", "step": 20}, {"key": "b"}]}
    assert [change["step"] for change in run.changes_from(30)] == [20, 30]
    assert [change["step"] for change in run.changes_from(10)] == [10, 10]
    assert run.changes_from(0) == []


def test_the_manifest_says_after_which_step_what_changed(resumed):
    changes = {change["key"]: change for change in resumed.manifest["changes"]}
    assert changes["training.learning_rate"] == {"key": "training.learning_rate", "from": 1e-3, "to": 5e-4, "step": 2}
    assert len(changes) == len(CHANGES)
