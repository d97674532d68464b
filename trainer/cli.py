"""python -m trainer: train, check, show, publish, export. Heavy imports are inside the commands: help is quick."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.config import ConfigError, LoadedConfig, find_config, json_schema, load_config, render

if TYPE_CHECKING:
    from trainer.run import Run


def config_options(command: Callable) -> Callable:
    """The argument CONFIG and the option --set."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set training.max_steps=50"
    )(command)
    return click.argument("config", metavar="CONFIG")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """One YAML file to a trained, evaluated, reloadable sparse text encoder.

    CONFIG is the name of a file configs/training_config_<CONFIG>.yaml, or a path to a YAML file.
    """


@main.command()
@config_options
@click.option("--resume", is_flag=True, help="Continue the run from its newest complete checkpoint.")
@click.option("--name", help="Name of the run folder under models/; the config's name by default.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries log.")
def train(config: str, overrides: tuple[str, ...], resume: bool, name: str | None, verbose: bool) -> None:
    """Train CONFIG into models/<name>/."""
    file = find_config(config)
    loaded = load_config(file, overrides)
    from trainer.run import Run

    if resume:
        run = Run.open(loaded, name)
        overrides = (*run.manifest.get("overrides", ()), *overrides)
        loaded = load_config(file, overrides)
        run.go_on_with(loaded, overrides, click.echo)
    else:
        run = Run.create(loaded, name, overrides)
    set_up_libraries(verbose, loaded.config.training.dataloader_num_workers)
    again = (
        f"make resume CONFIG={config}" if name is None else f"python -m trainer train {config} --name {name} --resume"
    )
    _train(loaded, run, resume, again)


def _train(loaded: LoadedConfig, run: "Run", resume: bool, again: str) -> None:
    """Train; note how it ended in the manifest, and turn what can go wrong into one line each."""
    from trainer.callbacks import NonFiniteLoss
    from trainer.train import Stopped, is_disk_full, train

    def ended(status: str, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # a full disk: the error itself matters more than the note of it
            run.update(status=status, error=str(error)[:500])

    try:
        train(loaded, run, resume=resume, say=click.echo)
    except Stopped as stopped:
        ended("stopped", stopped)
        click.echo(f"Stopped at step {stopped.step}; everything up to it is saved. To go on: {again}", err=True)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt as interrupted:
        ended("interrupted", interrupted)
        click.echo(f"Interrupted; nothing saved is lost. To go on: {again}", err=True)
        sys.exit(128 + getattr(interrupted, "number", signal.SIGINT))
    except NonFiniteLoss as error:
        ended("failed", error)
        raise ConfigError(
            f"{error}. The last checkpoint is as good as it was. "
            f"Set a lower training.learning_rate in {loaded.file}, then go on: {again}"
        ) from None
    except Exception as error:
        ended("failed", error)
        if isinstance(error, ConfigError) or not is_disk_full(error, run.folder):
            raise
        raise ConfigError(f"the disk is full under {run.folder}. Free some space, then go on: {again}") from None


@main.command()
@config_options
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Print the plan of CONFIG without training: model, rates, rows, steps, memory, output."""
    loaded = load_config(find_config(config), overrides)
    set_up_libraries(verbose=False)
    from trainer.plan import plan

    for line in plan(loaded):
        click.echo(line)


@main.command()
@config_options
@click.option("--plain", is_flag=True, help="Without the comments that say where each value comes from.")
def show(config: str, overrides: tuple[str, ...], plain: bool) -> None:
    """Print the flat config, each value with its origin. The output is itself a valid config."""
    click.echo(render(load_config(find_config(config), overrides), origins=not plain), nl=False)


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
    from trainer.run import Run

    run = Run.finished(name or load_config(find_config(config)).name)
    set_up_libraries(verbose=False)
    from trainer.publish import publish

    publish(run, repo, public=public, dry_run=dry_run, say=click.echo)


@main.command()
@click.argument("config", metavar="CONFIG")
@click.option("--to", required=True, metavar="ENGINE", help="lucene, opensearch, elasticsearch, qdrant or onnx.")
@click.option("--corpus", type=Path, help="Documents: .jsonl or .parquet with _id, text and perhaps title.")
@click.option("--queries", type=Path, help="Queries to write beside them, in the same form.")
@click.option("--output", type=Path, help="Folder to write to; models/<name>/export/<ENGINE> by default.")
@click.option(
    "--shard", default="1/1", metavar="I/N", show_default=True, help="Encode every N-th document, from the I-th."
)
@click.option(
    "--scale", default=100, show_default=True, type=click.IntRange(1), help="lucene: weights times this, rounded."
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
    scale: int,
    upsert: str | None,
    name: str | None,
) -> None:
    """Encode documents with the trained model of CONFIG into files that a search engine takes.

    Run it again after a kill: it goes on where it stopped. The files are read back and scored before it ends.
    """
    from trainer.run import Run

    run = Run.finished(name or load_config(find_config(config)).name)
    set_up_libraries(verbose=False)
    from trainer.export import FORMATS, export
    from trainer.export.corpus import Shard
    from trainer.export.qdrant import upsert as upload_points
    from trainer.export.request import Request

    request = Request(run, corpus, queries, output, Shard.parse(shard), scale, click.echo)
    if upsert and to != "qdrant":
        raise ConfigError(f"--upsert is for qdrant; {to} has its own way to take files. Formats: {', '.join(FORMATS)}")
    export(to, request)
    if upsert:
        upload_points(request.folder(to), upsert, run.name, click.echo)


@main.command()
def schema() -> None:
    """Print the JSON schema of a config file, as in configs/schema.json."""
    import json

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def set_up_libraries(verbose: bool, loader_workers: int = 0) -> None:
    """Quiet logs and no telemetry."""
    if loader_workers:  # a worker forked from a process whose tokenizer used threads would wait for them for ever
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        return
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    logging.basicConfig(level=logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
