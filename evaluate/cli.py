"""python -m evaluate: run, mteb, bm25, dense, sparsity, hybrid, latency, leakage, compare, report, prove.

Heavy imports are inside the commands, so help and errors are quick.
"""

import os
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.config import ConfigError, find_config, load_config
from trainer.config.words import split_names, split_pairs, split_paths

if TYPE_CHECKING:
    from evaluate.session import Session


# CONFIG or --model, the tasks, and how to encode.
SUBJECT_OPTIONS = (
    click.argument("config", required=False, metavar="[CONFIG]"),
    click.option("--model", help="A model instead of a run: a path, or a name on the hub."),
    click.option("--revision", help="Commit of a model on the hub."),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run code that comes with --model and --dense; from the hub, each at a full commit.",
    ),
    click.option(
        "--long-documents",
        type=click.Choice(["cut", "windows"]),
        help="How documents longer than the model reads are encoded; by default as the run's config says, else cut.",
    ),
    click.option("--tasks", default="", help="Groups, mteb names, folders in BEIR layout; between commas or blanks."),
    click.option("--language", type=click.Choice(["no", "nb", "nn", "da", "sv"]), help="Language of the folders."),
    click.option(
        "--batch-size", default=32, type=click.IntRange(1), show_default=True, help="Texts encoded at a time."
    ),
)


def subject_options(command: Callable) -> Callable:
    """A command with SUBJECT_OPTIONS."""
    return reduce(lambda decorated, option: option(decorated), reversed(SUBJECT_OPTIONS), command)


baseline_option = click.option(
    "--baseline",
    multiple=True,
    callback=lambda context, option, texts: split_paths(texts),
    help="Results to compare with: file or folder; several between blanks.",
)
dense_option = click.option(
    "--dense", help="A dense model to score and to fuse with: a path, or a hub name, org/model@revision."
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    callback=lambda context, option, texts: tuple(pair for text in texts for pair in split_pairs(text)),
    help="Override a key of the configs, as `python -m trainer train` does.",
)
leak_option = click.option(
    "--fail-on-leak", is_flag=True, help="Exit with 1 when training texts are in the evaluation data."
)


def open_session(options: dict[str, Any]) -> "Session":
    """The subject and tasks that a command's options name."""
    set_up_libraries()
    from evaluate.session import Session
    from evaluate.subject import open_subject

    trusted = options["trust_remote_code"]
    subject = open_subject(options["config"], options["model"], options["revision"], trusted, options["long_documents"])
    return Session(subject, options["tasks"], options["language"], options["batch_size"], click.echo, trusted)


def set_up_libraries() -> None:
    """Quiet logs, no telemetry, and tokenizers without threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from trainer.system.libraries import quiet_libraries

    quiet_libraries()


def _is_file(name: str) -> bool:
    return Path(name).is_file()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure a sparse encoder: search quality beside BM25, sparsity, latency, overlap with its training data.

    CONFIG is the name of a config that was trained (its run in models/ is measured), or --model names a model. Results go
    into the run's eval/ folder, the report into report/.
    """


@main.command()
@subject_options
@baseline_option
@dense_option
@leak_option
def run(baseline: tuple[Path, ...], dense: str | None, fail_on_leak: bool, **options: Any) -> None:
    """Everything: scores of the model and of BM25, their fusion, sparsity, latency, overlap, comparison, report."""
    session = open_session(options)
    session.require(baseline, dense)
    session.score()
    session.score_bm25()
    if dense:
        session.attempt(lambda: session.score_dense(dense), "dense")
    session.attempt(lambda: session.fuse(dense), "hybrid")
    session.attempt(session.measure_sparsity, "sparsity")
    session.attempt(session.measure_latency, "latency")
    is_run = session.subject.manifest is not None
    leaks = session.attempt(session.find_leaks, "leakage") if is_run or fail_on_leak else 0
    session.attempt(lambda: session.compare(baseline), "compare")
    session.report()
    session.finish(leaks if fail_on_leak else 0)


@main.command()
@subject_options
def mteb(**options: Any) -> None:
    """Scores of the model on retrieval tasks of mteb and on local folders."""
    session = open_session(options)
    session.score()
    session.finish()


@main.command()
@subject_options
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results when no model is named.")
def bm25(output: Path | None, **options: Any) -> None:
    """Scores of BM25 on the same tasks, with each language's stemmer and stop words."""
    if options["config"] is None and options["model"] is None:
        from evaluate.session import bm25_alone

        set_up_libraries()
        sys.exit(bm25_alone(options["tasks"], options["language"], output, click.echo))
    session = open_session(options)
    session.score_bm25()
    session.finish()


@main.command()
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--parent-of", metavar="CONFIG", help="The dense model that this CSR config starts from.")
@set_option
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with MODEL; from the hub, at a full commit."
)
@click.option("--tasks", default="", help="Groups, mteb names, folders in BEIR layout; between commas or blanks.")
@click.option("--language", type=click.Choice(["no", "nb", "nn", "da", "sv"]), help="Language of the folders.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results.")
def dense(
    model: str | None,
    parent_of: str | None,
    overrides: tuple[str, ...],
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Scores of a dense model on the same tasks: MODEL is a path, or a hub name, org/model@revision."""
    if (model is None) == (parent_of is None):
        raise ConfigError("say which dense model: a path or a hub name, or --parent-of CONFIG; not both")
    set_up_libraries()
    from evaluate.session import dense_alone, parent_alone

    where = (options["tasks"], options["language"], options["output"], click.echo)
    if parent_of is not None:
        sys.exit(parent_alone(load_config(find_config(parent_of), overrides), *where))
    assert model is not None
    sys.exit(dense_alone(model, trust_remote_code, *where))


@main.command()
@subject_options
def sparsity(**options: Any) -> None:
    """Active dims of queries and documents, FLOPS, frequent dims, index size, and what pruning costs."""
    session = open_session(options)
    session.measure_sparsity()
    session.finish()


@main.command()
@subject_options
@dense_option
def hybrid(dense: str | None, **options: Any) -> None:
    """The model fused with BM25, and with a dense model, by reciprocal rank and by weighted scores."""
    session = open_session(options)
    session.require(dense=dense)
    session.score()
    session.score_bm25()
    if dense:
        session.score_dense(dense)
    session.fuse(dense)
    session.finish()


@main.command()
@subject_options
def latency(**options: Any) -> None:
    """Time of encoding and exact search, beside BM25 in the same run."""
    session = open_session(options)
    session.measure_latency()
    session.finish()


@main.command()
@subject_options
@leak_option
def leakage(fail_on_leak: bool, **options: Any) -> None:
    """Training texts that are in the evaluation data, exactly or nearly."""
    session = open_session(options)
    leaks = session.find_leaks()
    session.finish(leaks if fail_on_leak else 0)


@main.command()
@subject_options
@baseline_option
def compare(baseline: tuple[Path, ...], **options: Any) -> None:
    """The model's scores beside BM25's and any other results, with bootstrap intervals."""
    open_session(options).compare(baseline)


@main.command()
@subject_options
def report(**options: Any) -> None:
    """One HTML page and a Markdown summary of all that was measured."""
    open_session(options).report()


@main.command()
@click.option(
    "--only",
    multiple=True,
    metavar="CONFIG",
    callback=lambda context, option, texts: tuple(name for text in texts for name in split_names(text, _is_file)),
    help="Only these configs, between blanks; all eight by default. The baselines are always measured.",
)
@click.option("--tasks", default="", help="Other tasks than the seven Scandinavian ones and NanoBEIR.")
@set_option
@click.option("--dry-run", is_flag=True, help="Print steps, downloads, hours and disk, and stop.")
def prove(only: tuple[str, ...], tasks: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train the eight configs, measure them beside baselines, and write the table of docs/results.md.

    Run it again after a stop: it goes on where it was.
    """
    set_up_libraries()
    from evaluate.prove.dry_run import plan_lines
    from evaluate.prove.plan import make_plan
    from evaluate.prove.prove import prove

    plan = make_plan(only, tasks, overrides, click.echo)
    if dry_run:
        for line in plan_lines(plan):
            click.echo(line)
        return
    sys.exit(prove(plan, click.echo))
