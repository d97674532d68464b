"""Publishes a finished run: builds the upload folder, opens it as a stranger would, and uploads it in one commit."""

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trainer.config import Config, ConfigError, load_config, one_line, render
from trainer.data.beir import read_search_set
from trainer.data.sources import QUICKSTART
from trainer.encoding.stock import SCRIPT, SIDES, carries_code, encode_both, open_model
from trainer.hub.upload import access_tokens, require_repo_name, require_token, upload
from trainer.models.remote_code import check_code
from trainer.publish.card import build_model_card
from trainer.publish.local_paths import REMOVED, LocalPaths
from trainer.runs.run import Run
from trainer.system.fresh_process import answer_of_a_fresh_process
from trainer.system.progress_bar import going_on, in_columns

# Queries and documents that are encoded again: enough to meet every module, few enough for a large model on a CPU.
SAMPLE = {"query": 24, "document": 32}
# Vectors of one folder, made twice on one machine and device, differ by nothing; another model differs by far more.
TOLERANCE = 1e-5
# What of run.json others may read: how the model came about, without commands, overrides and paths of this machine.
PUBLIC = (
    "name", "started", "git_commit", "lock", "python", "packages", "device", "processes", "seed", "base_model", "datasets",
    "steps", "steps_done", "before", "after", "train_seconds", "total_seconds", "rows_trained", "tokens_trained",
    "samples_per_second", "tokens_per_second", "peak_memory_gib", "best_metric", "warnings",
)  # fmt: skip


def publish(
    run: Run, repo: str, *, public: bool = False, dry_run: bool = False, echo: Callable[[str], None] = print
) -> None:
    """Upload the run's model, card, config and summary to `repo`, once a fresh process has given the same vectors.

    Raises ConfigError for what the user can mend; then nothing was uploaded, or the revision before is in place.
    """
    require_repo_name(repo)
    if not dry_run:
        require_token(repo)
    check_code(run.final)
    texts = sample_texts()
    expected = encode_both(open_model(run.final, carries_code(run.final)), texts)
    with upload_folder(run) as folder:
        build_upload_folder(run, folder, repo, dimensions=expected["document"].shape[1])
        with going_on(in_columns("checking", "the upload folder, in a fresh process")):
            difference = largest_difference(expected, encode_in_a_fresh_process(folder, texts))
        echo(
            f"checked   {len(texts['query'])} queries and {len(texts['document'])} documents, encoded anew in a fresh "
            f"process with stock sentence-transformers: largest difference {difference:.1g}"
        )
        require_no_secrets(folder)
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        for name, size in sizes.items():
            echo(f"file      {size_of(size):>10}  {name}")
        if dry_run:
            total = size_of(sum(sizes.values()))
            echo(f"dry run   {len(files)} files, {total}, would go to {repo}; nothing was uploaded")
            return
        address = upload(files, repo, public=public, message=f"{run.name}: model, card and config", echo=echo)
        echo(f"published {address}")


@contextmanager
def upload_folder(run: Run) -> Iterator[Path]:
    """A folder to make beside final/, gone afterwards. There, large weights can be links instead of copies."""
    try:
        with tempfile.TemporaryDirectory(dir=run.folder, prefix=".upload-") as aside:
            yield Path(aside) / "model"
    except OSError as error:
        raise ConfigError(f"the upload folder cannot be made in {run.folder}: {one_line(error)}") from None


def build_upload_folder(run: Run, folder: Path, repo: str, dimensions: int) -> None:
    """Model, card, config and summary. The library's own card gives way to ours."""
    shutil.copytree(run.final, folder, ignore=shutil.ignore_patterns("README.md", ".*"), copy_function=_link_or_copy)
    paths = LocalPaths(run.config().model_dump())
    card = build_model_card(run, repo, dimensions, paths.keys)
    (folder / "README.md").write_text(paths.in_text(str(card)), encoding="utf-8")
    (folder / "config.yaml").write_text(public_config(run, paths), encoding="utf-8")
    summary = paths.without({key: run.manifest[key] for key in PUBLIC if key in run.manifest})
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def public_config(run: Run, paths: LocalPaths) -> str:
    """The resolved config, without where local files lie and without comments that name them."""
    loaded = load_config(run.folder / "config.yaml")
    values = paths.without(loaded.config.model_dump())
    if (teacher := values["loss"]["teacher"]) is not None:
        for one in (teacher, *(teacher["models"] or {}).values()):
            one["cache"] = None  # where its scores are kept changes nothing
    loaded = type(loaded)(loaded.name, loaded.file, Config.model_validate(values), {})
    head = "# Resolved config of the training run. To train from it with nordsparse: make train CONFIG=config.yaml\n"
    if paths.keys:
        head += f"# {REMOVED} stands for files of the machine it ran on, at {', '.join(paths.keys)}\n"
    return head + render(loaded, origins=False)


def require_no_secrets(folder: Path) -> None:
    """Raise ConfigError when a file holds the value of an access token."""
    secrets = [token.encode() for token in access_tokens()]
    for file in sorted(folder.rglob("*")) if secrets else ():
        if file.is_file() and any(_holds(file, secret) for secret in secrets):
            raise ConfigError(
                f"{file.relative_to(folder)} holds your access token, so nothing was uploaded. Remove it from the run's "
                "config and data names, and make a new token: this one has been written to disk"
            )


def _holds(file: Path, secret: bytes) -> bool:
    if not file.stat().st_size:  # cannot be mapped
        return False
    with file.open("rb") as data, mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(secret) >= 0


def size_of(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def sample_texts() -> dict[str, list[str]]:
    """The same queries and documents every time, from all of the embedded data: bokmål, nynorsk, Danish and Swedish."""
    search = read_search_set(QUICKSTART / "search", "dev", "quickstart")
    texts = {"query": list(search.queries.values()), "document": list(search.corpus.values())}
    return {side: all_of[:: len(all_of) // SAMPLE[side]][: SAMPLE[side]] for side, all_of in texts.items()}


def encode_in_a_fresh_process(folder: Path, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The vectors that stock sentence-transformers gives: [texts, dimensions] of queries and documents."""
    trust = "trust" if carries_code(folder) else "no-code"
    failure = "the upload folder does not open in stock sentence-transformers, so nothing was uploaded"
    with answer_of_a_fresh_process(SCRIPT, folder, texts, trust, failure=failure) as file, np.load(file) as arrays:
        return {side: arrays[side] for side in SIDES}


def largest_difference(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """The largest difference of two sets of vectors. Raises ConfigError when it is more than rounding."""
    largest = 0.0
    for side in SIDES:
        difference = np.abs(expected[side] - found[side]).max(axis=1)
        worst = int(difference.argmax())
        if not difference[worst] <= TOLERANCE:  # also true of NaN
            raise ConfigError(
                f"the upload folder gives another vector than final/ for {side} {worst + 1} of {len(difference)}: it "
                f"differs by {difference[worst]:.3g}. Nothing was uploaded"
            )
        largest = max(largest, float(difference[worst]))
    return largest
