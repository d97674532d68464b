"""The model card of a finished run: what its run folder says, in words and in the hub's metadata."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from trainer.config import FROM_SCRATCH, Config, is_local
from trainer.models.prompts import quoted
from trainer.publish.local_paths import LocalPaths
from trainer.runs.choice import REPORTED, SCORE, choosers_of
from trainer.runs.results import MAIN_METRIC, EvalFolder, Measured, System, read_measured
from trainer.runs.run import Run
from trainer.runs.score_table import build_table, is_current
from trainer.system.durations import duration

TEMPLATE = Path(__file__).with_name("card.jinja")
UNKNOWN_LICENCE = "not known here: see its page"
LICENCES = {
    "ltg/norquad": "CC0-1.0",
    "ltg/noropenbookqa": "MIT",
    "alexandrainst/scandi-qa": "CC-BY-SA-4.0",
    "NbAiLab/norwegian-paws-x": "CC-BY-4.0",
    **{f"ltg/norbert4-{size}": "Apache-2.0" for size in ("xsmall", "small", "base", "large", "xlarge")},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "inference-free-splade": {
        "name": "inference-free SPLADE",
        "tags": ["splade", "inference-free", "asymmetric"],
        "what": "a query is its own words, each with a trained weight; only documents go through a transformer.",
        "routes": ": the two differ, and a query needs a tokenizer and a table, no neural network",
        "words": True,
        "limit": "A query word weighs the same in every query, and queries are not expanded: synonyms are found only if "
        "the documents' vectors hold them.",
    },
    "splade": {
        "name": "SPLADE",
        "tags": ["splade"],
        "what": "queries and documents both go through a transformer, which also adds words they do not contain.",
        "routes": ", which here are the same network",
        "words": True,
        "limit": "Every query costs a pass through the transformer.",
    },
    "csr": {
        "name": "CSR",
        "tags": ["csr"],
        "what": "a sparse autoencoder on top of a dense encoder.",
        "routes": ", which here are the same network",
        "words": False,
        "limit": "Its dimensions are not words, so they cannot be read or combined with a keyword index.",
    },
}


def build_model_card(run: Run, repo: str, dimensions: int, removed: Sequence[str] = ()) -> ModelCard:
    """The card for a repository. removed: keys of the config whose values named local files."""
    config, measured = run.config(), read_measured(run)
    compare = EvalFolder(run.folder / "eval").read_part("compare")
    manifest = run.manifest
    base = manifest.get("base_model", {}).get("source", FROM_SCRATCH)
    title = config.model_card.model_name or repo.rpartition("/")[2]
    return ModelCard.from_template(
        build_metadata(run, config, measured, title),
        template_path=str(TEMPLATE),
        title=title,
        repo=repo,
        dimensions=f"{dimensions:,}",
        config=config,
        architecture=ARCHITECTURES[config.model.architecture],
        packages=manifest["packages"],
        code=manifest.get("base_model", {}).get("code") or {},
        base_model=_base_model(manifest),
        prompts=_cell(quoted(manifest.get("prompts", {}))),
        base_licence="none needed" if base == FROM_SCRATCH else LICENCES.get(base, UNKNOWN_LICENCE),
        active_dims=active_dims(manifest, measured),
        data=[_data_row(summary) for summary in manifest.get("datasets", {}).values()],
        settings=settings_of(config, manifest),
        warnings=[_cell(warning["message"]) for warning in manifest.get("warnings", [])],
        evaluation=evaluation_table(run.name, measured, compare),
        scores_in_training=_scores_in_training(manifest),
        choosers=_cell("; ".join(choosers_of(manifest))),
        leakage=measured.parts.get("leakage"),
        cell=_cell,
        commit=manifest.get("git_commit") or "unknown",
        lock=manifest.get("lock"),
        removed=removed,
        limitations=limitations(config, manifest, measured),
    )


# ------------------------------------------------------------------------------------------- metadata
def build_metadata(run: Run, config: Config, measured: Measured, title: str) -> ModelCardData:
    """The YAML block: what the hub shows, filters by, and lists among the results."""
    card, manifest = config.model_card, run.manifest
    base = manifest.get("base_model", {}).get("source", FROM_SCRATCH)
    sources = chain.from_iterable(summary.get("revisions", {}) for summary in manifest.get("datasets", {}).values())
    architecture = ARCHITECTURES[config.model.architecture]["tags"]
    return ModelCardData(
        language=card.language,
        license=card.license,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "sparse-encoder", "sparse", *architecture, *card.tags],
        base_model=None if base == FROM_SCRATCH or is_local(base) else base,
        datasets=sorted({source for source in sources if not is_local(source)}) or None,
        model_name=title,
        eval_results=eval_results(measured.systems.get(run.name, {})) or None,
    )


def eval_results(own: System) -> list[EvalResult]:
    """The run's own scores, one per task, split and subset."""
    return [
        EvalResult(
            task_type="Retrieval",
            dataset_type=score.task,
            dataset_name=score.task,
            dataset_config=part.partition("/")[2],
            dataset_split=part.partition("/")[0],
            metric_type=MAIN_METRIC,
            metric_name="nDCG@10",
            metric_value=round(value, 5),
        )
        for score in own.values()
        for part, (value, _) in score.parts.items()
    ]


# ------------------------------------------------------------------------------------------- parts of the text
def _base_model(manifest: dict[str, Any]) -> str:
    base = manifest.get("base_model", {})
    source = base.get("source", FROM_SCRATCH)
    if source == FROM_SCRATCH:
        return "none: built from scratch from the training texts"
    if is_local(source):
        return "a local folder"
    return f"[{source}](https://huggingface.co/{source}) at `{base.get('commit') or 'an unknown commit'}`"


def _data_row(summary: dict[str, Any]) -> dict[str, str]:
    name, revisions = summary["name"], summary.get("revisions", {})
    sources = [
        "local files" if is_local(source) else f"`{_cell(source)}`" + (f" at `{commit[:12]}`" if commit else "")
        for source, commit in revisions.items()
    ]
    licences = [LICENCES.get(source, UNKNOWN_LICENCE) for source in revisions]
    if not revisions and name.startswith("quickstart_"):
        sources, licences = ["embedded in nordsparse"], ["Apache-2.0"]
    languages = ", ".join(f"{language} {count:,}" for language, count in summary.get("languages", {}).items())
    return {
        "name": _cell(name),
        "sources": ", ".join(sources) or "local files",
        "licence": ", ".join(licences) or UNKNOWN_LICENCE,
        "rows": f"{summary['rows']:,}" + (f" ({languages})" if languages else ""),
        "seen": f"{summary['rows_seen']:,} ({summary['rows_drawn']:,} drawn)",
    }


def active_dims(manifest: dict[str, Any], measured: Measured) -> dict[str, str]:
    """Mean active dims per query and document, from the evaluation or else from the searches of training."""
    found = {}
    routes, after = measured.parts.get("sparsity", {}).get("routes", {}), manifest.get("after", {})
    for side in ("query", "document"):
        in_training = [value for key, value in after.items() if key.endswith(f"_{side}_active_dims")]
        if side in routes:
            dims, texts = routes[side]["active_dims"], routes[side]["texts"]
            found[side] = f"{dims['mean']:.0f} (p95 {dims['p95']:.0f}) in {texts:,} texts of the evaluation"
        elif in_training:
            found[side] = f"{fmean(in_training):.0f} in the searches of training"
    return found


def settings_of(config: Config, manifest: dict[str, Any]) -> dict[str, str]:
    """What a reader compares two trainings by."""
    training, loss = config.training, config.loss
    rates = f"{training.learning_rate:g}"
    if training.query_learning_rate:
        rates += f", query weights {training.query_learning_rate:g}"
    weights = {"documents": loss.document_regularizer_weight, "queries": loss.query_regularizer_weight}
    targets = manifest.get("sparsity", {})
    in_all = f" of steps, {duration(manifest['total_seconds'])} in all" if "total_seconds" in manifest else ""
    found = {
        "steps": f"{manifest.get('steps_done', 0):,}, {manifest.get('rows_trained', 0):,} rows",
        "batch": f"{training.per_device_train_batch_size} × {training.gradient_accumulation_steps} rows"
        + (f" × {manifest['processes']} processes" if manifest.get("processes", 1) > 1 else ""),
        "learning rate": f"{rates}; {training.lr_scheduler_type}, warm-up {training.warmup_steps:g}",
        "loss": loss.type,
        "sparsity": "; ".join(
            f"{route} driven to {found['target_dims']} active dims, ended at {found['active_dims']:g} with weight "
            f"{found['weight']:g}" + ", before its weights were mixed" * bool(training.mixture)
            for route, found in targets.items()
        ),
        "final weights": training.mixture or "",
        "regularizer": loss.regularizer if loss.has_regularizers and loss.regularizer != "flops" else "",
        "regulariser weights": ", ".join(f"{side} {value:g}" for side, value in weights.items() if value is not None),
        "changed on the way": changes_on_the_way(manifest),
        "data order": config.datasets.sampling_strategy.replace("_", " "),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "float32",
        "seed": str(manifest.get("seed")),
        "hardware": manifest.get("device", "unknown"),
        "time": duration(manifest["train_seconds"]) + in_all if "train_seconds" in manifest else "",
        "speed": f"{manifest['samples_per_second']:.1f} rows/s" if "samples_per_second" in manifest else "",
        "peak memory": f"{manifest['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in manifest else "",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("packages", {}).items()),
    }
    return {name: value for name, value in found.items() if value}


def changes_on_the_way(manifest: dict[str, Any]) -> str:
    """What resumes changed of how the run trained, and after which step: the other settings are those of its end.

    How its weights are mixed when it has ended is no matter of how it trained.
    """
    return "; ".join(
        f"after step {change['step']}: {change['key']} "
        + " → ".join(_public(change["key"], change[end]) for end in ("from", "to"))
        for change in manifest.get("changes", [])
        if change["key"].startswith(("training.", "loss.", "processes")) and change["key"] != "training.start_share"
    )


def _public(key: str, value: Any) -> str:
    """A changed key's value, without the path of a file; a section only as being there."""
    return "given" if isinstance(value, dict) else _cell(LocalPaths().without(value, tuple(key.split("."))))


def evaluation_table(name: str, measured: Measured, compare: dict[str, Any] | None) -> dict[str, Any]:
    """Systems, a row per task, their mean, and what has to be known beside them; a comparison while it fits the scores."""
    if measured.missing:
        return {"rows": [], "missing": measured.missing}
    compare = compare if compare and is_current(compare, measured.systems) else None
    table, own = build_table(name, measured.systems, compare), measured.systems[name]
    scores = {task: table.scores[task] for task in own}
    systems = [system for system in table.systems if any(system in row for row in scores.values())]
    rows = [[_cell(task), *(_score(row.get(system)) for system in systems)] for task, row in scores.items()]
    if len(scores) > 1:
        complete = [system for system in systems if all(system in row for row in scores.values())]
        means = {system: fmean(row[system] for row in scores.values()) for system in complete}
        rows.append(["mean", *(_score(means.get(system)) for system in systems)])
    versions = sorted({score.mteb_version for score in own.values() if score.mteb_version})
    return {
        "systems": ["this model" if system == name else _cell(system) for system in systems],
        "rows": rows,
        "versions": f" (mteb {', '.join(versions)})" if versions else "",
        "notes": [*(f"{_cell(note)}." for note in table.notes), *_differences(compare)],
    }


def _differences(compare: dict[str, Any] | None) -> list[str]:
    lines = []
    for other, found in (compare or {"against": {}})["against"].items():
        intervals = [
            f"{task} {row['delta']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            for task, row in found["tasks"].items()
            if row.get("low") is not None
        ]
        if intervals:
            lines.append(f"Against {_cell(other)}, with 95 % bootstrap intervals: {_cell('; '.join(intervals))}.")
    return lines


def _scores_in_training(manifest: dict[str, Any]) -> str:
    before, after = manifest.get("before") or {}, manifest.get("after") or {}
    names = [key for key in after if key.endswith("_ndcg@10") and key in before and key not in (REPORTED, SCORE)]
    return "; ".join(
        f"{_cell(key.removesuffix('_ndcg@10'))}: nDCG@10 {before[key]:.3f} → {after[key]:.3f}" for key in names
    )


def limitations(config: Config, manifest: dict[str, Any], measured: Measured) -> list[str]:
    """What follows from how the model was made and measured."""
    training = config.training
    found = [
        f"Made for {', '.join(config.model_card.language)}; other languages were not looked at.",
        f"A text is read up to {training.max_seq_length} tokens; the rest is cut off"
        + (
            ", unless a long document is read in windows as above." if config.model.long_documents == "windows" else "."
        ),
        ARCHITECTURES[config.model.architecture]["limit"],
    ]
    if manifest.get("base_model", {}).get("source") == FROM_SCRATCH:
        rows = sum(summary["rows"] for summary in manifest.get("datasets", {}).values())
        found.append(f"Built from scratch on {rows:,} rows: it knows little but the words in them.")
    if not measured.systems:
        found.append("How well it searches has not been measured on any benchmark.")
    leaking = [
        task
        for task, values in measured.parts.get("leakage", {}).get("tasks", {}).items()
        if any(values[f"{kind}_{side}"] for kind in ("exact", "near") for side in ("queries", "passages"))
    ]
    if leaking:
        found.append(f"Part of {_cell(', '.join(leaking))} was trained on, so its scores there are too good.")
    return found


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    """A text that stays within its table cell."""
    return " ".join(str(text).split()).replace("|", "&#124;")
