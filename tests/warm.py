"""Command lines in processes of their own that have the libraries imported already: forks of a server that only imports.

A new interpreter spends 6 processor-seconds on imports, and the tests start a hundred.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["trainer.training.train", "trainer.cli", "evaluate.cli", "mteb", "tensorboard", "torch.utils.tensorboard"]


def run_warm(folder: Path, module: str, arguments: tuple[str, ...], code: str, seconds: float):
    """As subprocess.run of `python -m module arguments` in `folder`, `code` run first; raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as temporary:
        output, errors = Path(temporary, "output"), Path(temporary, "errors")
        process = _server().Process(
            target=_run, args=(folder, module, arguments, code, dict(os.environ), output, errors)
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *arguments], seconds, output.read_text(), errors.read_text())
        return subprocess.CompletedProcess(
            [module, *arguments], process.exitcode, output.read_text(), errors.read_text()
        )


def _server():
    """The context whose processes are forks of the server; starts it, with the project in Python's path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _run(folder, module, arguments, code, environment, output, errors):
    """What the fork does."""
    multiprocessing.set_start_method("fork", force=True)  # as a new interpreter has it here: for loader workers
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | {"PYTHONPATH": str(ROOT)})
    for number, file, mode in ((0, os.devnull, "r"), (1, output, "w"), (2, errors, "w")):
        with open(file, mode) as opened:
            os.dup2(opened.fileno(), number)
    sys.argv = [module, *arguments]
    exec(code, {})  # noqa: S102
    with contextlib.suppress(ValueError):  # a stream that the command closed
        runpy.run_module(module, run_name="__main__", alter_sys=True)
