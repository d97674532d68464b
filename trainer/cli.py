"""python -m trainer: train, check, show. Heavy imports are inside the commands, so help and errors are quick."""

import logging
import os
import signal
import sys
from collections.abc import Callable

import click

from trainer.config import ConfigError, LoadedConfig, find_config, json_schema, load_config, render


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
    loaded = load_config(find_config(config), overrides)
    from trainer.run import Run

    run = Run.open(loaded, name) if resume else Run.create(loaded, name)
    set_up_libraries(verbose)
    again = (
        f"make resume CONFIG={config}" if name is None else f"python -m trainer train {config} --name {name} --resume"
    )
    try:
        _train(loaded, run, resume, again)
    except BaseException as error:
        if run.manifest.get("status") not in ("stopped", "finished"):
            run.update(
                status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=str(error)[:500]
            )
        raise


def _train(loaded: LoadedConfig, run, resume: bool, again: str) -> None:
    """Train, and turn what can go wrong into one line each."""
    from trainer.callbacks import NonFiniteLoss
    from trainer.train import Stopped, is_disk_full, train

    try:
        train(loaded, run, resume=resume, say=click.echo)
    except Stopped as stopped:
        click.echo(f"Stopped at step {stopped.step}; everything up to it is saved. To go on: {again}", err=True)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        click.echo(f"Interrupted. To go on from the last checkpoint: {again}", err=True)
        sys.exit(128 + signal.SIGINT)
    except NonFiniteLoss as error:
        raise ConfigError(
            f"{error}. The last checkpoint is as good as it was. Lower training.learning_rate and go on: {again}"
        ) from None
    except ConfigError:
        raise
    except Exception as error:
        if not is_disk_full(error):
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
def schema() -> None:
    """Print the JSON schema of a config file, as in configs/schema.json."""
    import json

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def set_up_libraries(verbose: bool) -> None:
    """Quiet logs, no telemetry, no tokenizer threads beside the loader's processes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
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
