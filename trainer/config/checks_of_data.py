"""Contradictions within the data sets, and between them and the rest of a config."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.names import Contradiction, dotted, exists, is_local, missing_revision
from trainer.config.schema import Config, LocalSource, MiningConfig
from trainer.config.tree import Path_

FAMILIES = ("nli", "scandi_qa", "ddsc", "quickstart")
RESERVED_NAMES = ("quickstart_nli", "quickstart_scandi_qa", "quickstart_ddsc", "quickstart_sister_languages")


def contradictions_of_data(config: Config) -> Iterator[Contradiction]:
    """Of the section `datasets`."""
    datasets = config.datasets
    sets = {name: getattr(datasets, name) for name in FAMILIES} | datasets.local
    if not any(source and source.enabled for source in sets.values()):
        yield ("datasets",), "has no set that is enabled"
    if datasets.queries_per_passage > 1:
        if config.loss.type == "csr":
            yield ("datasets", "queries_per_passage"), "is for SPLADE, not for csr. Remove it."
        elif config.loss.cached:
            yield ("datasets", "queries_per_passage"), "and 'loss.cached' exclude each other. Remove one of them"
    for name, source in datasets.local.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            yield ("datasets", name), "is a name of more than letters, digits and _. Choose another"
        if name in RESERVED_NAMES:
            yield ("datasets", name), "is the name of an embedded set. Choose another"
        if source.enabled:
            yield from _local(("datasets", name), source)
    for name, source in sets.items():
        if source and source.enabled and source.mine:
            yield from _mining(("datasets", name, "mine"), source.mine)
            yield from _mining_rounds(("datasets", name, "mine"), source.mine, config)


def _mining_rounds(path: Path_, mining: MiningConfig, config: Config) -> Iterator[Contradiction]:
    if mining.method != "self":
        for key in ("every", "rounds"):
            if getattr(mining, key) != MiningConfig.model_fields[key].default:
                yield (*path, key), f"has no effect with method {mining.method}. Remove it, or set method: self"
    elif mining.every is None:
        yield (*path, "method"), f"self needs '{dotted((*path, 'every'))}': the steps from one mining to the next"
    elif mining.every % config.training.save_steps:
        steps = config.training.save_steps
        yield (
            (*path, "every"),
            f"({mining.every}) must be a multiple of training.save_steps ({steps}): the checkpoint mines",
        )
    if mining.method == "self" and (config.loss.type == "csr" or config.loss.cached):
        what = "csr" if config.loss.type == "csr" else "loss.cached"
        yield (*path, "method"), f"self is for SPLADE without GradCache, not with {what}. Choose bm25 or model"


def _mining(path: Path_, mining: MiningConfig) -> Iterator[Contradiction]:
    lowest, highest = mining.range
    if highest - lowest < mining.per_query:
        yield (*path, "range"), f"[{lowest}, {highest}] has fewer ranks than per_query ({mining.per_query}) asks for"
    if mining.method != "model":
        for key in ("model", "revision"):
            if getattr(mining, key):
                yield (*path, key), f"has no effect with method {mining.method}. Remove it, or set method: model"
    elif not mining.model:
        yield (*path, "method"), f"model needs '{dotted((*path, 'model'))}'"
    else:
        yield from missing_revision((*path, "model"), mining.model, mining.revision)


def _local(path: Path_, source: LocalSource) -> Iterator[Contradiction]:
    columns = source.columns
    named = [name for _, name in columns if name is not None] if columns else []
    if len(set(named)) < len(named):
        yield (*path, "columns"), "names one column twice"
    if columns and columns.scores and (columns.positive_scores or columns.negative_scores):
        yield (*path, "columns", "scores"), "and 'positive_scores', 'negative_scores' exclude each other"
    if columns and (columns.positive_scores is None) != (columns.negative_scores is None):
        missing = "negative" if columns.positive_scores else "positive"
        yield (*path, "columns", f"{missing}_scores"), "is missing: scores of positives and negatives are compared"
    if not is_local(source.source):
        yield from missing_revision((*path, "source"), source.source, source.revision)
        if columns is None:
            yield (
                (*path, "source"),
                f"is the repository {source.source}, which needs '{dotted((*path, 'columns'))}' "
                "({anchor: …, positive: …, negative: …})",
            )
        return
    without_effect: dict[str, Any] = {"revision": source.revision}
    if not Path(source.source).is_dir():
        without_effect |= {"subset": source.subset, "eval_split": source.eval_split}
    elif exists(f"{source.source}/corpus.jsonl") or exists(f"{source.source}/corpus.jsonl.gz"):
        without_effect |= {"subset": source.subset, "columns": columns}
    for key, value in without_effect.items():
        if value is not None:
            yield (*path, key), f"has no effect on the source {source.source}. Remove it."
