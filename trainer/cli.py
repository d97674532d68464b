"""python -m trainer: train, check, show, publish, export, queries. Heavy imports are inside the commands: help is quick."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trainer.config import ConfigError, find_config, json_schema, load_config, render
from trainer.config.words import split_pairs
from trainer.system.distributed import has_launcher
from trainer.system.libraries import set_up_libraries


def config_options(command: Callable) -> Callable:
    """The argument CONFIG and the option --set."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        callback=lambda context, option, texts: tuple(pair for text in texts for pair in split_pairs(text)),
        help="Override a key: --set training.max_steps=50. Several, between blanks: --set 'a.b=[1, 2] c.d=\"x y\"'",
    )(command)
    return click.argument("config", metavar="CONFIG")(command)


def has_terminal() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty() and sys.stdout.isatty()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """One YAML file to a trained, evaluated, reloadable sparse text encoder.

    CONFIG is the name of a file configs/training_config_<CONFIG>.yaml, or a path to a YAML file.
    """


@main.command()
@config_options
@click.option("--resume", is_flag=True, help="Continue the run from its newest complete checkpoint.")
@click.option("--name", help="Name of the run folder under models/; the config's name by default.")
@click.option(
    "--processes", default=1, type=click.IntRange(min=1), help="Processes that train together here, one per GPU."
)
@click.option("--nodes", default=1, type=click.IntRange(min=1), help="Machines that train together.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where the machines meet: one of them, and a free port of it.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries log.")
def train(
    config: str,
    overrides: tuple[str, ...],
    resume: bool,
    name: str | None,
    processes: int,
    nodes: int,
    rendezvous: str | None,
    verbose: bool,
) -> None:
    """Train CONFIG into models/<name>/."""
    loaded = load_config(find_config(config), overrides)
    if nodes > 1 and rendezvous is None:
        raise ConfigError("--nodes needs --rendezvous HOST:PORT, the same on every machine, where HOST is one of them")
    if nodes * processes > 1 and not has_launcher():
        # read when torch is imported: no stack per closed connection
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from trainer.system.launch import launch

        sys.exit(launch(loaded, name or loaded.name, processes, nodes, rendezvous))
    from trainer.training.command import run_training

    run_training(config, loaded, overrides, name, resume, verbose)


@main.command()
@config_options
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Print the plan of CONFIG without training: model, rates, rows, steps, memory, output."""
    loaded = load_config(find_config(config), overrides)
    set_up_libraries(verbose=False)
    from trainer.training.prepare import Decisions, check

    check(loaded, Decisions(click.echo))


@main.command()
@config_options
@click.option("--plain", is_flag=True, help="Without the comments that say where each value comes from.")
def show(config: str, overrides: tuple[str, ...], plain: bool) -> None:
    """Print the flat config, each value with its origin. The output is itself a valid config."""
    click.echo(render(load_config(find_config(config), overrides), origins=not plain), nl=False)


@main.command()
@config_options
@click.option("--trust", is_flag=True, help="Trust the base model's code, without a question.")
@click.option("--code", is_flag=True, help="Print the code, not only its hashes.")
@click.option("--diff", is_flag=True, help="Print what the conversion changes in the code.")
def pin(config: str, overrides: tuple[str, ...], trust: bool, code: bool, diff: bool) -> None:
    """Look up the commits that CONFIG's branches and tags stand for, show its base model's code, and ask for trust.

    The answer is kept in pins.yaml beside the config. Run it again to move to newer commits; it prints what changed.
    """
    loaded = load_config(find_config(config), overrides, pinned=False)
    set_up_libraries(verbose=False)
    from trainer.models.pin import Pinning

    def ask() -> bool:
        return trust or (has_terminal() and click.confirm("Trust this code?"))

    Pinning(loaded, ask, click.echo, show_code=code, show_diff=diff).run()


@main.command()
@click.argument("config", metavar="CONFIG")
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Model repository on the hub; made if there is none.")
@click.option("--public", is_flag=True, help="Let everyone read it. Private by default.")
@click.option("--dry-run", is_flag=True, help="Build and check the upload, list its files, and stop.")
@click.option("--name", help="Name of the run folder under models/; the config's name by default.")
def publish(config: str, repo: str, public: bool, dry_run: bool, name: str | None) -> None:
    """Upload the trained model of CONFIG, once a fresh process has given the same vectors.

    The access token is taken from HF_TOKEN or from `hf auth login`.
    """
    from trainer.runs.run import Run

    run = Run.finished(name or load_config(find_config(config)).name)
    set_up_libraries(verbose=False)
    from trainer.publish.publish import publish

    publish(run, repo, public=public, dry_run=dry_run, echo=click.echo)


@main.command()
@click.argument("config", metavar="CONFIG")
@click.option(
    "--to", required=True, metavar="ENGINE", help="lucene, opensearch, elasticsearch, qdrant, seismic, parquet or onnx."
)
@click.option("--corpus", type=Path, help="Documents: .jsonl or .parquet with _id, text and perhaps title.")
@click.option("--queries", type=Path, help="Queries to write beside them, in the same form.")
@click.option("--output", type=Path, help="Folder to write to; models/<name>/export/<ENGINE> by default.")
@click.option(
    "--shard", default="1/1", metavar="I/N", show_default=True, help="Encode every N-th document, from the I-th."
)
@click.option(
    "--processes",
    default="1",
    metavar="N",
    show_default=True,
    help="Encode N shards side by side here, each on a GPU of its own as long as they last; all: one per GPU.",
)
@click.option(
    "--scale",
    type=click.IntRange(1),
    help="lucene: weights times this, rounded; by default the first of 100, 200, 500, 1000, … that keeps the order.",
)
@click.option(
    "--long-documents",
    type=click.Choice(["cut", "windows"]),
    help="How documents longer than the model reads are encoded; as the run's config says by default.",
)
@click.option(
    "--upsert", metavar="URL", help="qdrant: upload the points to this server, into a collection named like the run."
)
@click.option("--name", help="Name of the run folder under models/; the config's name by default.")
def export(
    config: str,
    to: str,
    corpus: Path | None,
    queries: Path | None,
    output: Path | None,
    shard: str,
    processes: str,
    scale: int | None,
    long_documents: str | None,
    upsert: str | None,
    name: str | None,
) -> None:
    """Encode documents with the trained model of CONFIG into files that a search engine takes.

    Run it again after a kill: it goes on where it stopped. The files are read back and scored before it ends.
    """
    from trainer.runs.run import Run

    run = Run.finished(name or load_config(find_config(config)).name)
    set_up_libraries(verbose=False)
    from trainer.export.corpus import Shard
    from trainer.export.export import FORMATS
    from trainer.export.processes import count_processes, export_in_processes
    from trainer.export.qdrant import upsert as upload_points
    from trainer.export.request import Request

    request = Request(run, corpus, queries, output, Shard.parse(shard), scale, click.echo, long_documents)
    if upsert and to != "qdrant":
        raise ConfigError(f"--upsert is for qdrant; {to} has its own way to take files. Formats: {', '.join(FORMATS)}")
    export_in_processes(to, request, count_processes(processes, click.echo))
    if upsert:
        upload_points(request.folder(to), upsert, run.name, click.echo)


@main.command()
@click.argument("corpus", metavar="CORPUS")
@click.option("--llm", required=True, metavar="URL", help="An OpenAI-compatible endpoint: http://localhost:11434/v1")
@click.option("--model", required=True, metavar="NAME", help="The model that writes, as the endpoint calls it.")
@click.option("--output", type=Path, help="Folder to write to; models/queries/<name of the corpus> by default.")
@click.option("--prompt", type=Path, help="A prompt of your own in place of trainer/queries/prompt.txt.")
@click.option(
    "--language", metavar="CODE", help="nb, nn, da, sv or no, for all passages; told by their words by default."
)
@click.option("--passages", type=click.IntRange(1), help="Ask about so many, a random sample; about all by default.")
@click.option("--seed", default=42, show_default=True, help="Of the sample, and of what is held out.")
@click.option("--questions", default=3, type=click.IntRange(0), show_default=True, help="Questions for each passage.")
@click.option("--keywords", default=2, type=click.IntRange(0), show_default=True, help="Keyword queries for each.")
@click.option("--shortest", default=10, type=click.IntRange(1), show_default=True, help="Words that a passage needs.")
@click.option(
    "--found-in",
    default=10,
    type=click.IntRange(1),
    show_default=True,
    help="Keep a query if BM25 finds its passage among so many.",
)
@click.option("--dense", metavar="MODEL", help="Or if this dense model does: a folder, or a name on the hub.")
@click.option("--dense-revision", metavar="COMMIT", help="Of the dense model on the hub.")
@click.option(
    "--dev-share", default=0.1, type=click.FloatRange(0, 0.9), show_default=True, help="Share of the passages held out."
)
@click.option("--concurrency", default=4, type=click.IntRange(1, 64), show_default=True, help="Requests at once.")
@click.option("--retries", default=5, type=click.IntRange(0), show_default=True, help="Further tries for a passage.")
@click.option(
    "--timeout", default=300.0, type=click.FloatRange(0.01), show_default=True, help="Seconds to wait for an answer."
)
@click.option("--price-in", type=click.FloatRange(0), help="Price of a million tokens that the model reads.")
@click.option("--price-out", type=click.FloatRange(0), help="Price of a million tokens that it writes.")
@click.option("--spend", type=click.FloatRange(0, min_open=True), metavar="AMOUNT", help="Stop when so much is spent.")
@click.option("--max-tokens-total", type=click.IntRange(1), metavar="N", help="Stop when so many tokens are used.")
def queries(
    corpus: str,
    llm: str,
    model: str,
    price_in: float | None,
    price_out: float | None,
    spend: float | None,
    max_tokens_total: int | None,
    retries: int,
    timeout: float,
    **settings: Any,
) -> None:
    """Have a language model write queries for CORPUS, check each, and write a folder to train on.

    CORPUS is a .jsonl or .parquet file or a folder in BEIR layout. A key is taken from LLM_API_KEY or OPENAI_API_KEY.
    Run it again after a kill: it asks about no passage twice.
    """
    set_up_libraries(verbose=False)
    from trainer.queries.ask import Limits
    from trainer.queries.command import make_queries
    from trainer.queries.endpoint import Patience
    from trainer.queries.request import Request

    limits = Limits(price_in, price_out, spend, max_tokens_total)
    patience = Patience(timeout, retries)
    make_queries(
        Request(Path(corpus), llm, model, click.echo, limits=limits, patience=patience, **settings),
    )


@main.command()
def schema() -> None:
    """Print the JSON schema of a config file, as in configs/schema.json."""
    import json

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
