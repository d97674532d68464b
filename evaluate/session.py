"""One evaluation: a subject, its tasks, and the parts in the order in which they build on each other."""

import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sentence_transformers import SparseEncoder

from evaluate.bm25 import BM25
from evaluate.compare import baseline_name, compare, compare_lines
from evaluate.dense import dense_name, load_dense, split_dense
from evaluate.hybrid import hybrid, hybrid_lines
from evaluate.latency import latency_lines, measure_latency
from evaluate.leakage import find_leaks, leakage_lines
from evaluate.passage_vectors import PassageVectors
from evaluate.report import write_report
from evaluate.sample import Sample, sample_texts
from evaluate.scores import score_system
from evaluate.search import SparseSearch
from evaluate.sparsity import measure_sparsity, sparsity_lines
from evaluate.subject import Subject, fingerprint_of
from evaluate.tasks import load, select_tasks, task_names
from evaluate.terms import terms_lines, top_terms
from evaluate.trust import require_trust
from trainer.config import ConfigError, LoadedConfig
from trainer.data.bm25 import K1, B
from trainer.encoding.encode import document_modules
from trainer.encoding.windows import reads_in_windows
from trainer.models.build import fetch_base_model
from trainer.runs.results import EvalFolder, read_system
from trainer.runs.run import Run
from trainer.runs.score_table import is_current
from trainer.system.progress_bar import in_columns

BM25_NAME = "bm25"
BM25_FINGERPRINT = f"bm25s {version('bm25s')}, Lucene, k1 {K1}, b {B}, stop words"
# Names that a model may not have: they stand for something else among the systems and fusions.
RESERVED = (BM25_NAME, "rrf", "weighted", "data")


class Session:
    """Runs the parts, prints their results, and stores them in the subject's eval folder."""

    def __init__(
        self,
        subject: Subject,
        tasks: str,
        language: str | None,
        batch_size: int,
        echo: Callable[[str], None],
        trust_dense: bool = False,
    ) -> None:
        self.subject, self.language, self.batch_size, self.echo = subject, language, batch_size, echo
        self.trust_dense = trust_dense
        self.folder = subject.results
        configured = subject.config.evaluation.mteb_tasks if subject.config else ["scandinavian"]
        self.task_names = task_names(tasks) or configured
        self.any_failed = False
        if subject.name in RESERVED:
            raise ConfigError(f"'{subject.name}' is the name of something else in the results. Rename the folder")

    @cached_property
    def model(self) -> SparseEncoder:
        """The encoder, loaded when it is first needed."""
        model = self.subject.load()
        if reads_in_windows(model):
            text = f"longer than {document_modules(model)[0].max_seq_length} tokens are read in overlapping windows"
            self.echo(in_columns("documents", text, 12))
        return model

    @cached_property
    def passage_vectors(self) -> PassageVectors:
        """Encodes passages, once for all parts."""
        return PassageVectors(self.model, self.batch_size)

    def tasks(self) -> list[Any]:
        """The tasks anew: mteb drops a task's data when it has run."""
        return select_tasks(self.task_names, self.language)

    def loaded_tasks(self) -> list[Any]:
        """The tasks whose data can be had. Raises ConfigError when there is none."""
        loaded, failed = self._loaded
        if not loaded:
            raise ConfigError(next(iter(failed.values())))
        return loaded

    @cached_property
    def _loaded(self) -> tuple[list[Any], dict[str, str]]:
        """The tasks whose data can be had, and why not that of the others, which count as failed."""
        loaded, failed = [], {}
        for task in self.tasks():
            try:
                load(task)
                loaded.append(task)
            except ConfigError as error:
                failed[task.metadata.name] = error.format_message()
                self.echo(in_columns("data", f"{task.metadata.name}: FAILED ({failed[task.metadata.name]})", 12))
        self._record_failures("data", [task.metadata.name for task in loaded], failed)
        return loaded, failed

    # --------------------------------------------------------------------------------------- scores
    def score(self) -> None:
        """The model."""
        name = self.subject.name
        self._score(name, lambda: SparseSearch(self.passage_vectors, name), self.subject.fingerprint)

    def score_bm25(self) -> None:
        """The lexical baseline."""
        self._score(BM25_NAME, BM25, BM25_FINGERPRINT)

    def score_dense(self, source: str) -> None:
        """A dense model, by its own similarity, or else by cosine."""
        name, revision = split_dense(source)
        self._score(dense_name(source), lambda: load_dense(source, self.trust_dense), fingerprint_of(name, revision))

    def require(self, baselines: tuple[Path, ...] = (), dense: str | None = None) -> None:
        """Raise ConfigError for what would otherwise fail after hours of scoring."""
        for path in baselines:
            read_system(path)
        if dense:
            if dense_name(dense) in (self.subject.name, *RESERVED):
                raise ConfigError(f"--dense {dense}: there are results of '{dense_name(dense)}'. Rename the folder")
            require_trust(*split_dense(dense), self.trust_dense)
            fingerprint_of(*split_dense(dense))
        self.folder.write_part("failed", self.folder.read_part("failed") or {})

    def attempt(self, part: Callable[[], Any], name: str) -> Any:
        """Run one part of several; the reason why it fails is printed and counts as a failure, and the others go on."""
        try:
            return part()
        except ConfigError as error:
            self.echo(in_columns(name, f"not done: {error.format_message()}", 12))
            self.any_failed = True
            return None

    def _score(self, name: str, make_search: Callable[[], Any], fingerprint: str) -> None:
        tasks = self.tasks()
        failed = score_system(name, make_search, fingerprint, tasks, self.folder, self.echo)
        self._record_failures(name, [task.metadata.name for task in tasks], failed)

    def _record_failures(self, name: str, tried: list[str], failed: dict[str, str]) -> None:
        """Store the reasons of the tasks that failed, in place of earlier ones of the tried tasks."""
        known = self.folder.read_part("failed") or {}
        known[name] = {task: why for task, why in known.get(name, {}).items() if task not in tried} | failed
        self.folder.write_part("failed", {system: rows for system, rows in known.items() if rows})
        self.any_failed |= bool(failed)

    def fuse(self, dense: str | None) -> None:
        """The model with BM25, and with the dense model if there is one."""
        pairs = []
        for other in (BM25_NAME, *([dense_name(dense)] if dense else [])):
            done = [task.metadata.name for task in self.tasks() if self._has_run(task, self.subject.name, other)]
            if done:
                pairs.append(hybrid(self.folder, self.subject.name, other, done))
        self._store("hybrid", pairs, (line for values in pairs for line in hybrid_lines(values)))

    def _has_run(self, task: Any, *systems: str) -> bool:
        return all(self.folder.ranking_file(system, task.metadata.name).is_file() for system in systems)

    # --------------------------------------------------------------------------------------- the model itself
    @cached_property
    def sample(self) -> Sample:
        """The texts that sparsity and latency are measured on."""
        return sample_texts(self.loaded_tasks(), self.subject.manifest or {})

    def measure_sparsity(self) -> None:
        """Active dims on the tasks' own queries and passages."""
        texts = self.sample
        values = measure_sparsity(self.passage_vectors, texts.queries, texts.passages, texts.relevant, texts.part_of)
        self._store("sparsity", values | self._made_with, sparsity_lines(values))
        terms = top_terms(self.model)
        self._store("terms", terms, terms_lines(terms))

    def measure_latency(self) -> None:
        """Time and memory, beside BM25."""
        texts = self.sample
        queries, passages = list(texts.queries.values()), list(texts.passages.values())
        values = measure_latency(self.passage_vectors, queries, passages, texts.language)
        self._store("latency", values, latency_lines(values))

    @property
    def _made_with(self) -> dict[str, Any]:
        """Which model a part was measured of: a model card leaves out what was measured of another."""
        return {"made_with": {"system": self.subject.fingerprint}}

    def find_leaks(self) -> int:
        """Training texts in the evaluation data; their number."""
        if self.subject.manifest is None:
            raise ConfigError(f"{self.subject.model} is no run of this project: what it was trained on is not known")
        values = find_leaks(Run(self.subject.folder).training_texts, self.loaded_tasks()) | self._made_with
        self._store("leakage", values, (in_columns("leakage", line, 12) for line in leakage_lines(values)))
        return values["leaks"]

    # --------------------------------------------------------------------------------------- together
    def compare(self, baselines: tuple[Path, ...]) -> None:
        """The model's scores beside all others in the folder and the baselines."""
        systems = self.folder.systems()
        own = systems.get(self.subject.name, {})
        systems = {name: scores for name, scores in systems.items() if scores.keys() & own.keys()}
        for path in baselines:
            name = baseline_name(path)
            if name in systems:
                raise ConfigError(f"--baseline {path}: there is a system '{name}' already. Rename the file or folder")
            systems[name] = self.folder.reported(read_system(path), {self.subject.name: own})
        values = compare(self.subject.name, systems)
        self._store("compare", values, compare_lines(values))

    def report(self) -> None:
        """The page and the summary. An earlier comparison, perhaps with baselines, stays as long as it fits the scores."""
        comparison, systems = self.folder.read_part("compare"), self.folder.systems()
        if self.subject.name in systems and (comparison is None or not is_current(comparison, systems)):
            self.compare(())
        page = write_report(self.subject)
        self.echo(f"report      {page} and {page.with_name('summary.md')}")

    def _store(self, part: str, values: Any, lines: Any) -> None:
        for line in lines:
            self.echo(line)
        self.folder.write_part(part, values)

    def finish(self, leaks: int = 0) -> None:
        """End with exit status 1 when a task failed, or when texts leaked that must not."""
        if self.any_failed or leaks:
            sys.exit(1)


def bm25_alone(names: str, language: str | None, output: Path | None, echo: Callable[[str], None]) -> bool:
    """BM25 without any model; the exit status: 1 when a task failed."""
    return _alone(BM25_NAME, BM25, BM25_FINGERPRINT, select_tasks(task_names(names), language), output, echo)


def dense_alone(
    source: str, trust: bool, names: str, language: str | None, output: Path | None, echo: Callable[[str], None]
) -> bool:
    """A dense model, by its own similarity, or else by cosine; the exit status: 1 when a task failed."""
    tasks, fingerprint = select_tasks(task_names(names), language), fingerprint_of(*split_dense(source))
    return _alone(dense_name(source), lambda: load_dense(source, trust), fingerprint, tasks, output, echo)


def parent_alone(
    loaded: LoadedConfig, names: str, language: str | None, output: Path | None, echo: Callable[[str], None]
) -> bool:
    """The dense model that a CSR config starts from, its code converted as for training; the exit status."""
    config = loaded.config
    base = fetch_base_model(config, loaded.pin_command)
    if base is None or config.loss.has_regularizers:
        raise ConfigError(f"model.base_model: {config.model.base_model} is no dense model that CSR makes sparse")
    tasks, folder = select_tasks(task_names(names), language), str(base.folder)
    load, name = (lambda: load_dense(folder, config.model.trust_remote_code)), dense_name(base.source)
    return _alone(name, load, fingerprint_of(folder, None), tasks, output, echo)


def _alone(
    name: str,
    make_search: Callable[[], Any],
    fingerprint: str,
    tasks: list[Any],
    output: Path | None,
    echo: Callable[[str], None],
) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return bool(score_system(name, make_search, fingerprint, tasks, EvalFolder(output or Path(folder)), echo))
