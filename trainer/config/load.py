"""Loads a config file: `extends`, overrides, types, contradictions; every mistake is one line with file:line.

loaded = load_config(Path("configs/training_config_splade.yaml"), ["training.max_steps=50"])
loaded.config.training.learning_rate
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.checks import find_contradictions
from trainer.config.errors import ConfigError, did_you_mean
from trainer.config.names import dotted, is_local
from trainer.config.pins import FILE_NAME, read_pins
from trainer.config.schema import Config, section_at
from trainer.config.tree import (
    MAX_DEPTH,
    Origin,
    Origins,
    Path_,
    YamlError,
    is_file,
    merge,
    parse_value,
    read_file,
    scalar,
)

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
PREFIX = "training_config_"
TRUST = ("model", "trust_remote_code")


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, its name, and where each value came from."""

    name: str
    file: Path
    config: Config
    origins: Origins

    def where(self, *path: str | int) -> str:
        """'file:line' of a key, or of the nearest section above it that was written down."""
        return str(_origin(path, self.origins, self.file))

    @property
    def pin_command(self) -> str:
        """What to type to pin this config, with the overrides that say which base model it is."""
        is_shipped = self.file.resolve().parent == CONFIG_DIR and self.file.stem.startswith(PREFIX)
        keys = (("model", "base_model"), ("model", "revision"))
        overrides = dict.fromkeys(str(self.origins[key]) for key in keys if key in self.origins)
        given = " ".join(text.removeprefix("--set ") for text in overrides if text.startswith("--set "))
        command = f"make pin CONFIG={self.name if is_shipped else shlex.quote(str(self.file))}"
        return f"{command} SET={shlex.quote(given)}" if given else command


def config_name(file: Path) -> str:
    """The run's name: the file name without its ending and without `training_config_`."""
    return file.stem.removeprefix(PREFIX)


def find_config(name: str) -> Path:
    """The file for what a user typed after CONFIG=: a shipped config's name, or a path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if is_file(path):
            return path
        raise ConfigError(f"there is no config file {path}")
    file = CONFIG_DIR / f"{PREFIX}{name}.yaml"
    if not is_file(file):
        known = [config_name(f) for f in CONFIG_DIR.glob(f"{PREFIX}*.yaml")]
        raise ConfigError(f"there is no config '{name}' in {_short(CONFIG_DIR)}.{did_you_mean(name, known)}")
    return _short(file)


def _short(path: Path) -> Path:
    """The path as the user would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def load_config(file: Path, overrides: Sequence[str] = (), *, pinned: bool = True) -> LoadedConfig:
    """The config in `file`, with `key.path=value` overrides on top. Raises ConfigError, one line, for any mistake.

    pinned: with the commits of the pins.yaml beside it. False is for `make pin`, which reads what was written.
    """
    values, origins = read_file(file)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"--set {override}: write it as section.key=value")
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"--set {override}: no config is so deeply nested")
        try:
            nested: Any = parse_value(text.strip())
        except YamlError as error:
            is_text = error.problem.startswith("not valid YAML")
            hint = f'. Should it be a text, put it in quotes: {key}="…"' if is_text else ""
            raise ConfigError(f"--set {override}: {error.problem}{hint}") from None
        for part in reversed(path):
            nested = {part: nested}
        leaf = Origin(f"--set {override}", 0)
        values = merge(values, nested, origins, dict.fromkeys((path[: i + 1] for i in range(len(path))), leaf))
    _rename_keys_of_older_runs(values, origins)
    config = _validated(values, origins, file)
    if pinned and read_pins(file.parent).apply(config, values, origins):
        config = _validated(values, origins, file)
    loaded = LoadedConfig(config_name(file), file, config, origins)
    for where, message in find_contradictions(config):
        if where == TRUST and not is_local(config.model.base_model):
            if not pinned:
                continue  # make pin finds the commit
            message += f". Write one, or run: {loaded.pin_command}"
        raise ConfigError(f"{loaded.where(*where)}: '{dotted(where)}' {message}")
    _check_siblings(loaded)
    return loaded


def _validated(values: dict[str, Any], origins: Origins, file: Path) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        where, message = _explain(error)
        raise ConfigError(f"{_origin(where, origins, file)}: {message}") from None


def _rename_keys_of_older_runs(values: dict[str, Any], origins: Origins) -> None:
    """loss.regularizer was called loss.penalty. With both, the old one is unknown."""
    loss = values.get("loss")
    if isinstance(loss, dict) and "penalty" in loss and "regularizer" not in loss:
        loss["regularizer"], origins["loss", "regularizer"] = loss.pop("penalty"), origins.pop(("loss", "penalty"))


def _origin(path: Path_, origins: Origins, file: Path) -> Origin:
    """Where a key was written, or the nearest section above it, or the file's first line."""
    for end in range(len(path), 0, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return Origin(str(file), 1)


def _check_siblings(loaded: LoadedConfig) -> None:
    """No two configs in one folder may write to the same run folder or the same hub repository."""
    for sibling in sorted(loaded.file.parent.glob("*.yaml")):
        if sibling.resolve() == loaded.file.resolve() or sibling.name == FILE_NAME:
            continue
        if config_name(sibling) == loaded.name:
            raise ConfigError(
                f"{loaded.file}:1: {sibling.name} has the same name '{loaded.name}', so both would write to "
                f"models/{loaded.name}. Rename one."
            )
        repo = loaded.config.hub.repo
        if not repo:
            continue
        try:
            other, _ = read_file(sibling)
        except ConfigError:
            continue  # a broken sibling is reported when it is itself used
        hub = other.get("hub")
        if isinstance(hub, dict) and hub.get("repo") == repo:
            raise ConfigError(
                f"{loaded.where('hub', 'repo')}: {sibling.name} pushes to the same 'hub.repo' {repo}. Change one."
            )


# ------------------------------------------------------------------------------------------- messages
TYPE_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section (key: value lines)",
    "dict_type": "a section (key: value lines)",
    "model_attributes_type": "a section (key: value lines)",
}


def _explain(error: ValidationError) -> tuple[Path_, str]:
    """The first error of a validation, as the key's path and one line."""
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path: Path_ = first["loc"]
    key, kind, given = f"'{dotted(path)}'", first["type"], first["input"]
    known = _keys_at(path[:-1])
    if kind == "missing" and path[0] == "datasets" and path[2:] == ("source",) and path[1] not in _keys_at(path[:1]):
        hint = did_you_mean(str(path[1]), _keys_at(path[:1]))
        return path[:2], f"'{dotted(path[:2])}' has no 'source', and is not a data set this project knows.{hint}"
    if kind == "extra_forbidden":
        return path, f"unknown key {key}.{did_you_mean(str(path[-1]), known)}"
    if kind == "missing":
        return path, f"missing key {key}: {known[str(path[-1])]}"
    if kind == "literal_error":
        choices = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        hint = did_you_mean(given, choices) if isinstance(given, str) else ""
        return path, f"{key} is {_quote(given)}, but must be one of {', '.join(choices)}.{hint.split(' Known')[0]}"
    if kind in TYPE_WORDS:
        return path, f"{key} must be {TYPE_WORDS[kind]}, not {_quote(given)}"
    return path, f"{key} {first['msg'].replace('Input should be', 'must be')}, not {_quote(given)}"


def _quote(value: Any) -> str:
    """A value as the user wrote it, short enough for one line."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace('"', "'") if isinstance(value, str) else text
    return f"the text {text[:60]}" if isinstance(value, str) else text[:60]


def _keys_at(path: Path_) -> dict[str, str]:
    """The keys of a section, and what each means."""
    section = section_at(path)
    fields = section.model_fields.items() if section else ()
    return {key: " ".join((field.description or "a required section").split()) for key, field in fields}


# ------------------------------------------------------------------------------------------- show
def render(loaded: LoadedConfig, *, origins: bool = True) -> str:
    """The resolved config as YAML that is itself a valid config, each value with its origin as a comment."""
    lines = list(_render(loaded.config.model_dump(mode="json"), (), loaded if origins else None))
    return "\n".join(lines) + "\n"


def _render(values: dict[str, Any], path: Path_, loaded: LoadedConfig | None) -> Iterator[str]:
    for key, value in values.items():
        here = (*path, key)
        indent = "  " * len(path)
        if isinstance(value, dict) and (lines := list(_render(value, here, loaded))):
            yield f"{indent}{scalar(key)}:"
            yield from lines
        elif value is not None:  # a key that is not set has no line: what is not given is not a choice
            # braces for a section in which nothing is set: without them it would read as not set itself
            text = f"{indent}{scalar(key)}: {scalar({} if isinstance(value, dict) else value)}"
            origin = "" if loaded is None else loaded.origins.get(here, "default")
            yield f"{text:<60}  # {origin}" if origin else text


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file for editors: every key optional, since a file may extend another."""
    text = json.dumps(Config.model_json_schema())
    schema = json.loads(text, object_hook=lambda node: {k: v for k, v in node.items() if k != "required"})
    schema["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Config files this one is laid over, relative to it; later ones win.",
    }
    return schema
