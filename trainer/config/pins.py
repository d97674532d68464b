"""pins.yaml, the lock file of a folder of configs: the commits of its branches and tags, and whose code is trusted.

`make pin` writes it. load_config() puts its commits in the place of branches and tags, so every command sees them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from trainer.config.errors import ConfigError
from trainer.config.names import dotted, is_commit, is_local
from trainer.config.schema import Config, Revision, Section, Sha256
from trainer.config.tree import Origin, Origins, Path_, YamlError, is_file, parse_file, scalar

FILE_NAME = "pins.yaml"
HEAD = """\
# The commits that the branches and tags in this folder's configs stand for. `make pin CONFIG=…` writes this file and, run
# again, moves it to newer commits. Every command that reads a config reads it too.
# code: the SHA-256 of each of a base model's Python files; others are refused. trusted: true lets them run, at this commit.
"""


class HubReference(NamedTuple):
    """A repository of the hub, and the key of the config that names it."""

    path: Path_
    kind: Literal["model", "dataset"]
    repository: str
    revision: str

    @property
    def is_base_model(self) -> bool:
        """Whether this is the model that is trained, the only one whose own code may run."""
        return self.path == ("model", "base_model")

    @property
    def key(self) -> tuple[str, str, str]:
        """What a pin is found by."""
        return self.kind, self.repository, self.revision


def hub_references(section: BaseModel, path: Path_ = ()) -> Iterator[HubReference]:
    """Every repository of the hub that the enabled parts of a config name with a revision."""
    if not getattr(section, "enabled", True):
        return
    values = dict(section)
    revision = values.get("revision")
    for key, kind in (("base_model", "model"), ("model", "model"), ("source", "dataset")):
        repository = values.get(key)
        if revision and isinstance(repository, str) and not is_local(repository):
            yield HubReference((*path, key), kind, repository, revision)  # type: ignore[arg-type]
    for key, value in values.items():
        if isinstance(value, BaseModel):
            yield from hub_references(value, (*path, key))


class Pin(Section):
    """What one revision of a repository stands for."""

    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    date: str
    """The day on which it was pinned."""
    code: dict[str, Sha256] = Field(default_factory=dict)
    """Of a base model: the SHA-256 of each Python file."""
    trusted: bool = False
    """Whether the user trusts this code."""


class _Content(Section):
    models: dict[str, dict[Revision, Pin]] = Field(default_factory=dict)
    datasets: dict[str, dict[Revision, Pin]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Pins:
    """The pins of one lock file, by kind, repository and revision."""

    file: Path
    pins: dict[tuple[str, str, str], Pin]
    origins: Origins

    def apply(self, config: Config, values: dict[str, Any], origins: Origins) -> bool:
        """Write the commits into the values of a config, and what is known of the base model's code. Whether any were.

        config: these values, as they were read. What the config itself says of its code goes before the lock file.
        """
        applied = False
        for reference in hub_references(config):
            pin = self.pins.get(reference.key)
            if pin is None:
                continue
            keys: dict[str, Any] = {"revision": pin.commit}
            if reference.is_base_model:
                trusts = config.model.trust_remote_code
                if trusts and pin.code and not pin.trusted and not is_commit(reference.revision):
                    continue  # a branch has no commit until its code is trusted: the config's contradiction says so
                if pin.code or trusts:
                    keys["code_sha256"] = pin.code
                if pin.code and pin.trusted:
                    keys["trust_remote_code"] = True
            self._write(reference, keys, values, origins)
            applied = True
        return applied

    def _write(self, reference: HubReference, keys: dict[str, Any], values: Any, origins: Origins) -> None:
        """Write these keys into the section that names the repository, unless the config has them."""
        *section, _ = reference.path
        for key in section:
            values = values[key]
        entry = (f"{reference.kind}s", reference.repository, reference.revision)
        written_as = {"revision": "commit", "code_sha256": "code", "trust_remote_code": "trusted"}
        for key, value in keys.items():
            path = (*section, key)
            if (path in origins and key != "revision") or values.get(key) == value:
                continue
            values[key] = value
            origins[path] = self.origins.get((*entry, written_as[key]), Origin(str(self.file), 1))
            for name in value if key == "code_sha256" else ():
                origins[(*path, name)] = self.origins[(*entry, "code", name)]


def read_pins(folder: Path) -> Pins:
    """The lock file of a folder of configs; no pins without one. Raises ConfigError when it cannot be understood."""
    file = folder / FILE_NAME
    if not is_file(file):
        return Pins(file, {}, {})
    remedy = "Put it right, or remove the file and pin anew"
    try:
        values, origins = parse_file(file)
        content = _Content.model_validate(values)
    except YamlError as error:
        raise ConfigError(f"{error.format_message().rstrip('.')}. {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = first["loc"]
        written = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in origins), ())
        where = origins.get(written, Origin(str(file), 1))
        raise ConfigError(f"{where}: '{dotted(path)}': {first['msg'][0].lower()}{first['msg'][1:]}. {remedy}") from None
    pins = {
        (kind, repository, revision): pin
        for kind, repositories in (("model", content.models), ("dataset", content.datasets))
        for repository, revisions in repositories.items()
        for revision, pin in revisions.items()
    }
    return Pins(file, pins, origins)


def render_pins(pins: dict[tuple[str, str, str], Pin]) -> str:
    """The text of a lock file: sorted, so that the same pins give the same text."""
    lines = []
    before: tuple[str, ...] = ()
    for key in sorted(pins, key=lambda key: (key[0] != "model", *key[1:])):
        kind, repository, revision = key
        lines += [f"\n{kind}s:"] * (before[:1] != key[:1])
        lines += [f"  {scalar(repository)}:"] * (before[:2] != key[:2])
        pin = pins[key]
        lines += [f"    {scalar(revision)}:", f"      commit: {scalar(pin.commit)}", f"      date: {scalar(pin.date)}"]
        if pin.code:
            lines += [f"      trusted: {scalar(pin.trusted)}", "      code:"]
            lines += [f"        {scalar(name)}: {scalar(digest)}" for name, digest in sorted(pin.code.items())]
        before = key
    return HEAD + "\n".join(lines) + "\n"
