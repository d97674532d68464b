"""`make pin`: looks up a config's commits, shows the code of its base model, asks for trust, and writes pins.yaml."""

import difflib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from trainer.config import FROM_SCRATCH, ConfigError, LoadedConfig, dotted, is_commit, printable
from trainer.config.pins import HubReference, Pin, Pins, hub_references, read_pins, render_pins
from trainer.hub.download import CODE_FILES, Snapshot, fetch, newest_commit
from trainer.hub.own_code import code_hashes, code_references, read_code
from trainer.models.norbert import changes_in, convert_files
from trainer.models.remote_code import require_local_code
from trainer.system.files import write_atomically

Texts = dict[str, str]


@dataclass
class Pinning:
    """One run of `make pin`. `ask` says whether the user trusts the code that was shown last."""

    loaded: LoadedConfig
    ask: Callable[[], bool]
    echo: Callable[[str], None]
    show_code: bool = False
    show_diff: bool = False

    def run(self) -> None:
        """Pin what the config names, and write the lock file if anything changed. The pins of other configs stay."""
        config = self.loaded.config
        lock = read_pins(self.loaded.file.parent)
        pins = dict(lock.pins)
        if not any(reference.is_base_model for reference in hub_references(config)):
            what = "built from scratch" if config.model.base_model == FROM_SCRATCH else "a local folder"
            self.echo(f"model     {config.model.base_model}: {what}, nothing to pin")
        # every commit first: after the question about trust, nothing that could fail comes any more
        commits = {
            reference: self.commit_of(reference, pins.get(reference.key)) for reference in hub_references(config)
        }
        if config.evaluation.nanobeir_datasets != []:
            self.echo("search    NanoBEIR is not pinned: the library reads its newest commit")
        if config.evaluation.mteb_tasks:
            self.echo("tasks     those of make eval have their commits in the package mteb")
        for reference, commit in commits.items():
            pin = self.pin(reference, commit, pins.get(reference.key))
            if not is_commit(reference.revision) or pin.code:
                pins[reference.key] = pin
        self.write(lock, pins)

    def write(self, lock: Pins, pins: dict[tuple[str, str, str], Pin]) -> None:
        """Write the lock file, and say what it holds now. Raises ConfigError when it cannot be written."""
        if pins == lock.pins:
            self.echo(f"lock      {lock.file}: nothing changed")
            return
        try:
            write_atomically(lock.file, render_pins(pins))
        except OSError as error:
            raise ConfigError(f"{lock.file} cannot be written: {error.strerror}") from None
        new = len(pins.keys() - lock.pins)
        changed = sum(pin != lock.pins.get(key, pin) for key, pin in pins.items())
        self.echo(f"lock      {lock.file}: {new} new, {changed} changed, {len(pins) - new - changed} as before")

    def commit_of(self, reference: HubReference, old: Pin | None) -> str:
        """The commit that a revision stands for now, printed."""
        repository, commit, what = reference.repository, reference.revision, _label(reference)
        if is_commit(commit):
            self.echo(f"{what:<9} {repository} at {commit}, as the config says")
            return commit
        commit = newest_commit(repository, commit, kind=reference.kind, why="to pin it", key=dotted(reference.path))
        was = f"{old.commit} → " if old and old.commit != commit else "→ "
        self.echo(f"{what:<9} {repository} {reference.revision} {was}{commit}")
        return commit

    def pin(self, reference: HubReference, commit: str, old: Pin | None) -> Pin:
        """The pin to keep: the old one if nothing changed, or if with_code() keeps it."""
        pin = Pin(commit=commit, date=time.strftime("%Y-%m-%d"))
        if reference.is_base_model or (old and old.code):
            pin = self.with_code(pin, reference, old)
        return old if old and pin.model_copy(update={"date": old.date}) == old else pin

    # --------------------------------------------------------------------------------------- code
    def with_code(self, pin: Pin, reference: HubReference, old: Pin | None) -> Pin:
        """The pin with the hashes of the code, once it was shown, and with the user's answer.

        The old pin if this code is not trusted, and the old pin can be used or has other code at the same commit.
        """
        snapshot = _fetch_code(reference, pin.commit)
        named = code_references(snapshot.folder)
        if not named:
            self.echo("code      none of its own")
            return pin
        require_local_code(snapshot, named)
        pin = pin.model_copy(update={"code": code_hashes(snapshot.folder)})
        texts = _texts(snapshot.folder, pin.code)
        self.describe(pin, reference, snapshot, texts)
        if old is None:
            return pin.model_copy(update={"trusted": self.is_trusted(reference)})
        self.compare(pin, old, reference, texts)
        if old.trusted and (old.commit, old.code) == (pin.commit, pin.code):
            self.echo("trust     as before")
            return old
        trusted = self.is_trusted(reference, is_other_code=old.code != pin.code)
        can_be_used = old.trusted or not old.code
        if trusted or not (can_be_used or old.commit == pin.commit):
            return pin.model_copy(update={"trusted": trusted})
        if (old.commit, old.code) != (pin.commit, pin.code):
            self.echo(f"          the pin stays as it was: {old.commit}")
        return old

    def is_trusted(self, reference: HubReference, is_other_code: bool = False) -> bool:
        """The user's answer, or a line that says that the config has answered, or how to answer."""
        key = ("model", "trust_remote_code")
        if key in self.loaded.origins:
            trusts = self.loaded.config.model.trust_remote_code
            if not trusts or (is_commit(reference.revision) and not is_other_code):
                remedy = "" if trusts else ", which goes before pins.yaml. Remove it to decide here"
                self.echo(f"trust     {self.loaded.where(*key)} says {str(trusts).lower()}{remedy}")
                return False
        trusted = self.ask()
        how = f"not given. To give it: {self.loaded.pin_command} TRUST=1"
        self.echo(f"trust     {'given, for this commit alone' if trusted else how}")
        return trusted

    def describe(self, pin: Pin, reference: HubReference, snapshot: Snapshot, texts: Texts) -> None:
        """Print each file of code with its hash, what the conversion will mend, and where to read it."""
        converted = convert_files({name: text for name, text in texts.items() if "/" not in name}, snapshot.folder)
        for name, digest in pin.code.items():
            self.echo(f"code      {printable(name)}: {len(texts[name].splitlines())} lines, SHA-256 {digest}")
            if mended := changes_in(converted.get(name, ""), snapshot.folder / name):
                self.echo(f"            to be mended: {', '.join(mended)}")
        self.echo(f"read      {constants.ENDPOINT}/{reference.repository}/tree/{pin.commit}")
        self.echo(f"          {snapshot.folder}")
        if self.show_code:
            for name, text in texts.items():
                self.echo(f"--- {printable(name)}")
                self.print_lines(text.splitlines())
        if self.show_diff:
            for name, text in converted.items():
                self.print_lines(_diff(texts[name], text, name, f"{name}, converted"))

    def compare(self, pin: Pin, old: Pin, reference: HubReference, texts: Texts) -> None:
        """Print how the code differs from that of the old pin."""
        if old.code == pin.code:
            if old.commit != pin.commit:
                self.echo("changed   no file of code")
            return
        if old.commit == pin.commit:
            for name in sorted(old.code.keys() | pin.code):
                was, found = (each.code.get(name, "missing")[:16] for each in (old, pin))
                if was != found:
                    self.echo(f"changed   {printable(name)}: SHA-256 {was} → {found}")
            self.echo("          but a commit cannot change: the hub, a mirror or the cache gives something else now")
            return
        try:
            before = _fetch_code(reference, old.commit).folder
        except ConfigError as error:
            self.echo(f"changed   from code that cannot be had any more: {error.format_message()}")
            return
        earlier = _texts(before, code_hashes(before))
        for name in sorted(earlier.keys() | texts):
            was, found = (f"{name} at {commit[:12]}" for commit in (old.commit, pin.commit))
            self.print_lines(_diff(earlier.get(name, ""), texts.get(name, ""), was, found))

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print lines of code that nobody trusts yet: nothing in them reaches the terminal as a command."""
        for line in lines:
            self.echo(printable(line.expandtabs()))


def _label(reference: HubReference) -> str:
    if reference.is_base_model:
        return "model"
    if reference.kind == "dataset":
        return "data"
    return "teacher" if "teacher" in reference.path else "mining"


def _fetch_code(reference: HubReference, commit: str) -> Snapshot:
    why, key = "to show its code", dotted(reference.path)
    return fetch(reference.repository, commit, kind=reference.kind, why=why, key=key, patterns=CODE_FILES)


def _texts(folder: Path, names: Iterable[str]) -> Texts:
    return {name: read_code(folder / name) for name in names}


def _diff(before: str, after: str, before_name: str, after_name: str) -> Iterable[str]:
    return difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="")
