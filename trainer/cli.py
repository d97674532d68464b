"""python -m trainer: train, check, show, publish, export. Heavy imports are inside the commands: help is quick."""

import contextlib
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from trainer.config import ConfigError, LoadedConfig, find_config, json_schema, load_config, render
from trainer.config.words import split_pairs

if TYPE_CHECKING:
    from trainer.runs.run import Run


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
    from trainer.system.distributed import end_with_launcher

    file = find_config(config)
    loaded = load_config(file, overrides)
    if nodes > 1 and rendezvous is None:
        raise ConfigError("--nodes needs --rendezvous HOST:PORT, the same on every machine, where HOST is one of them")
    if nodes * processes > 1:
        _launch(loaded, name, processes, nodes, rendezvous)
    end_with_launcher()
    again = _how_to_go_on(config, name)
    with _one_of_several(again), _alone_in(name or loaded.name, resume):
        loaded, run = _open_run(file, loaded, name, overrides, resume)
        set_up_libraries(verbose, loaded.config.training.dataloader_num_workers)
        _train(loaded, run, resume, again)


def _alone_in(name: str, resume: bool) -> contextlib.AbstractContextManager[None]:
    """The lock of the run folder; several processes of one training are one owner, and the first holds it."""
    from trainer.runs.lock import only_one_in
    from trainer.runs.run import MODELS
    from trainer.system.distributed import is_first

    there_is_nothing_to_resume = resume and not (MODELS / name).is_dir()
    if there_is_nothing_to_resume or not is_first():
        return contextlib.nullcontext()
    return only_one_in(MODELS / name, click.echo)


def _how_to_go_on(config: str, name: str | None) -> str:
    """The command that resumes this run, as it was started."""
    from trainer.system.distributed import processes, processes_here

    together = {"processes": processes_here(), "nodes": processes() // processes_here()}
    together = {key: str(number) for key, number in together.items() if number > 1}
    containers_here = os.environ.get("NORDSPARSE_NODES_HERE")  # docker/run knows where those meet
    if "nodes" in together and not containers_here:
        together["rendezvous"] = os.environ.get("NORDSPARSE_RENDEZVOUS", "HOST:PORT")
    if name is None:
        variables = {"processes": "PROCS", "nodes": "NODES", "rendezvous": "RENDEZVOUS"}
        return " ".join([f"make resume CONFIG={config}", *(f"{variables[key]}={n}" for key, n in together.items())])
    options = [f"--{key} {value}" for key, value in together.items()]
    return " ".join([f"python -m trainer train {config} --name {name} --resume", *options])


# How long a process waits to be ended, by the launcher or for want of one, before it says what may have been said already.
SAME_ERROR_SECONDS = 2.0


@contextlib.contextmanager
def _one_of_several(again: str) -> Iterator[None]:
    """End quietly when another process of the training has gone: it has said why, unless it was killed."""
    from trainer.system.distributed import is_first, launcher_has_ended, lost_another

    try:
        yield
    except ConfigError:
        if not is_first():  # the first may have found the same, and then ends all
            time.sleep(SAME_ERROR_SECONDS)
        raise
    except RuntimeError as error:
        if not lost_another(error):
            raise
        if launcher_has_ended():  # the other one saw that first
            time.sleep(SAME_ERROR_SECONDS)
        if is_first():
            click.echo(
                f"Error: another process of this training ended. Nothing saved is lost. To go on: {again}", err=True
            )
        sys.exit(1)


def _launch(loaded: LoadedConfig, name: str | None, processes: int, nodes: int, rendezvous: str | None) -> None:
    """Start this command in several processes, and exit as they do."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: no stack per closed connection
    from trainer.system.device import choose_device
    from trainer.system.launch import launch

    os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"] = str(processes * nodes), str(processes)
    os.environ["NORDSPARSE_LAUNCHER"] = str(os.getpid())
    os.environ["NORDSPARSE_COMMAND"] = shlex.join(sys.argv[1:])
    os.environ["NORDSPARSE_RENDEZVOUS"] = rendezvous or ""
    choose_device(loaded.config)  # what this machine cannot do is said once, not by every process
    with_value = ("--processes", "--nodes", "--rendezvous")
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument in with_value:
            next(arguments)
        elif not argument.startswith(tuple(f"{option}=" for option in with_value)):
            kept.append(argument)
    sys.exit(launch(kept, name or loaded.name, processes, nodes, rendezvous))


def _open_run(
    file: Path, loaded: LoadedConfig, name: str | None, overrides: tuple[str, ...], resume: bool
) -> tuple[LoadedConfig, "Run"]:
    """The run folder, and the config with the overrides the run was started with.

    Of several processes the first makes or opens it, and the others follow.
    """
    from trainer.runs.run import Run
    from trainer.system.distributed import from_first, is_first, processes

    if processes() > 1:
        from trainer.system.device import choose_device
        from trainer.system.distributed import connect

        connect(choose_device(loaded.config)[0])
    run = None
    if is_first() and resume:
        run = Run.open(loaded, name)
        if earlier := run.manifest.get("overrides"):
            click.echo(f"overrides {' '.join(earlier)} (given before; they go before the file)")
            overrides = (*earlier, *overrides)
        loaded = load_config(file, overrides)
        run.go_on_with(loaded, overrides, click.echo)
    elif is_first():
        run = Run.create(loaded, name, overrides)
    manifest, overrides = from_first((run.manifest if run else None, overrides))
    if run is None:
        loaded = load_config(file, overrides)
        run = Run.follow(loaded, name, manifest)
    return loaded, run


def _train(loaded: LoadedConfig, run: "Run", resume: bool, again: str) -> None:
    """Train; note how it ended in the manifest, and turn what can go wrong into one line each."""
    from trainer.system.distributed import is_first, wait
    from trainer.training.callbacks.non_finite_loss import NonFiniteLoss
    from trainer.training.train import Stopped, is_disk_full, lost_loader_worker, train

    def ended(status: str, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # a full disk: the error itself matters more than the note of it
            run.update(status=status, error=str(error)[:500])

    def interrupt(interrupted: BaseException) -> NoReturn:
        ended("interrupted", interrupted)
        if is_first():
            click.echo(f"Interrupted; nothing saved is lost. To go on: {again}", err=True)
        sys.exit(128 + getattr(interrupted, "number", signal.SIGINT))

    try:
        train(loaded, run, resume=resume, say=click.echo)
    except Stopped as stopped:
        ended("stopped", stopped)
        if is_first():
            click.echo(f"Stopped at step {stopped.step}; everything up to it is saved. To go on: {again}", err=True)
        wait()  # a launcher stops all processes when one ends
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt as interrupted:
        interrupt(interrupted)
    except NonFiniteLoss as error:
        ended("failed", error)
        rate = loaded.config.training.learning_rate
        option = "SET=" if again.startswith("make") else "--set "
        raise ConfigError(
            f"{error}. The last checkpoint is as good as it was. Go on from it with a rate lower than {rate:g}: "
            f"{again} {option}training.learning_rate={rate / 10:g}"
        ) from None
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what broke while the interrupt was on its way out
            interrupt(error.__context__)
        if not (isinstance(error, ConfigError) and run.take_back()):
            ended("failed", error)
        if lost_loader_worker(error):
            raise ConfigError(
                "a loader worker was ended by the system: by hand, or because memory ran out (then lower "
                f"training.dataloader_num_workers). Nothing saved is lost. To go on: {again}"
            ) from None
        if isinstance(error, ConfigError) or not is_disk_full(error, run.folder):
            raise
        raise ConfigError(f"the disk is full under {run.folder}. Free some space, then go on: {again}") from None


@main.command()
@config_options
def check(config: str, overrides: tuple[str, ...]) -> None:
    """Print the plan of CONFIG without training: model, rates, rows, steps, memory, output."""
    loaded = load_config(find_config(config), overrides)
    set_up_libraries(verbose=False)
    from trainer.training.plan import plan

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
    from trainer.runs.run import Run

    run = Run.finished(name or load_config(find_config(config)).name)
    set_up_libraries(verbose=False)
    from trainer.publish.publish import publish

    publish(run, repo, public=public, dry_run=dry_run, say=click.echo)


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
    from trainer.export.export import FORMATS, export
    from trainer.export.processes import count_processes, run_shards
    from trainer.export.qdrant import upsert as upload_points
    from trainer.export.request import Request

    request = Request(run, corpus, queries, output, Shard.parse(shard), scale, click.echo)
    if upsert and to != "qdrant":
        raise ConfigError(f"--upsert is for qdrant; {to} has its own way to take files. Formats: {', '.join(FORMATS)}")
    count = count_processes(processes, click.echo)
    if count > 1:
        if corpus is None or request.shard.of > 1:
            raise ConfigError("--processes takes the corpus apart itself: it needs --corpus, and goes without --shard")
        run_shards(_again(click.get_current_context()), count, click.echo)
    else:
        export(to, request)
    if upsert:
        upload_points(request.folder(to), upsert, run.name, click.echo)


def _again(context: click.Context) -> list[str]:
    """The arguments of this export for one of its shards."""
    options = {name: value for name, value in context.params.items() if value is not None}
    without = ("config", "shard", "processes", "upsert")
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if name not in without]
    return ["export", options["config"], *(text for pair in pairs for text in pair)]


@main.command()
def schema() -> None:
    """Print the JSON schema of a config file, as in configs/schema.json."""
    import json

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _expect_lost_workers() -> None:
    """No stack for a killed loader worker where Python cannot raise it.

    torch raises it in a signal handler, wherever the program happens to be; in the middle of a fork Python can only print
    it. The loader raises it again at its next batch, and then it is one line.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        from trainer.training.train import lost_loader_worker

        if not lost_loader_worker(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook


def set_up_libraries(verbose: bool, loader_workers: int = 0) -> None:
    """Quiet logs, no telemetry, and no memory for matrix shapes that do not come again."""
    # oneDNN keeps a kernel for each of the last 1,024 shapes, and torch's own layer above it as much again: texts of all
    # lengths fill both, in the quickstart with 390 MB, and leave as much unused between them. Read at the first product.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")
    if loader_workers:  # a worker forked from a process whose tokenizer used threads would wait for them for ever
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _expect_lost_workers()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        return
    import datasets
    import huggingface_hub
    import transformers

    logging.basicConfig(level=logging.ERROR)
    huggingface_hub.logging.set_verbosity_error()  # else every failed attempt to reach the hub is told twice
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries to each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
