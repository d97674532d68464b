"""Reads YAML 1.2 files into plain values, remembers for every key the file and line it came from, and writes scalars."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from trainer.config.errors import ConfigError

Path_ = tuple[str | int, ...]


class Origin(NamedTuple):
    """Where a value was written: a file's line, or the command line (line 0)."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


Origins = dict[Path_, Origin]

# Far above any real config (the largest shipped one has about 100 nodes); stops "billion laughs" aliases.
MAX_NODES = 10_000
MAX_DEPTH = 20
MAX_BYTES = 1_000_000
TOO_LARGE = "the file is too large or too deeply nested for a config"


class YamlError(ConfigError):
    """What is wrong with a YAML text. `problem` is the message without the place."""

    def __init__(self, source: str, line: int, problem: str) -> None:
        super().__init__(f"{source}:{line}: {problem}")
        self.problem = problem


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML reads YAML 1.1, where `no` is False and `2e-5` is text. This loader has YAML 1.2's core scalars."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}


for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_scalar(text: str, tag: str) -> Any:
    """The value of one YAML 1.2 scalar."""
    match tag.rpartition(":")[2]:
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        case "float":
            return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        case "null":
            return None
        case "str":
            return text
    raise ValueError(f"the tag {tag} is not allowed in a config")


class _Builder:
    """Turns one file's node tree into values and origins, refusing duplicate keys, and trees that grow by aliases."""

    def __init__(self, source: str) -> None:
        self.source, self.nodes = source, 0
        self.origins: Origins = {}

    def fail(self, node: yaml.Node, message: str) -> None:
        raise YamlError(self.source, node.start_mark.line + 1, message)

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            self.fail(node, TOO_LARGE)
        if path:
            self.origins.setdefault(path, Origin(self.source, node.start_mark.line + 1))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return parse_scalar(node.value, node.tag)
        except ValueError as error:
            self.fail(node, str(error))

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or key == "<<":
                self.fail(key_node, "keys must be plain words; merge keys (<<) are not read, use extends: instead")
            dotted = ".".join(map(str, (*path, key)))
            if key in values:
                first = self.origins[(*path, key)].line
                self.fail(key_node, f"duplicate key '{dotted}', first given on line {first}. Remove one of the two.")
            self.origins[(*path, key)] = Origin(self.source, key_node.start_mark.line + 1)
            values[key] = self.build(value_node, (*path, key))
        return values


def _refuse_deep_nesting(text: str, source: str) -> None:
    """PyYAML composes libyaml's events by unlimited recursion: 50,000 brackets would end in a segmentation fault."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError(source, event.start_mark.line + 1, TOO_LARGE)


def parse(text: str, source: str) -> tuple[dict[str, Any], Origins]:
    """Values and origins of one YAML document; raises YamlError with file:line for anything malformed."""
    if len(text) > MAX_BYTES:
        raise YamlError(source, 1, f"the file is larger than {MAX_BYTES // 1000} kB; a config is a few kB")
    try:
        _refuse_deep_nesting(text, source)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise YamlError(source, line, f"not valid YAML: {problem}") from None
    except UnicodeEncodeError:  # a surrogate: what the command line holds where it is not UTF-8
        raise YamlError(source, 1, "not a text in UTF-8") from None
    if node is None:
        return {}, {}
    builder = _Builder(source)
    if not isinstance(node, yaml.MappingNode):
        builder.fail(node, "a config is a mapping of sections (model:, training:, …)")
    return builder.build(node, ()), builder.origins


def parse_value(text: str) -> Any:
    """One value written on the command line, read as YAML would read it in a file. Raises YamlError."""
    values, _ = parse(f"value: {text}", "--set")
    return values["value"]


def scalar(value: Any) -> str:
    """A scalar or list in YAML's flow style that reads back as itself."""
    if isinstance(value, list):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, str) and _is_plain(value):
        return value
    # YAML refuses some characters that are not printable, and takes others (U+0085, U+2028) for line breaks
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(character if character.isprintable() else f"\\U{ord(character):08x}" for character in quoted)


def _is_plain(text: str) -> bool:
    """Whether a text can stand in YAML without quotes, also inside a flow list."""
    if any(c in text for c in "#,[]{}:&*!|>'\"%@`\\") or not text or text != text.strip() or text[0] in "-?~=":
        return False
    if not text.isprintable():
        return False
    return parse_value(text) == text


def merge(base: Any, over: Any, base_origins: Origins, over_origins: Origins, path: Path_ = ()) -> Any:
    """`over` laid over `base`: mappings key by key, everything else replaced. base_origins is updated in place."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            if (*path, key) in over_origins and not (isinstance(value, dict) and isinstance(base.get(key), dict)):
                base_origins[(*path, key)] = over_origins[(*path, key)]
            merged[key] = merge(base.get(key), value, base_origins, over_origins, (*path, key))
        return merged
    stale = [p for p in base_origins if len(p) > len(path) and p[: len(path)] == path]
    for p in stale:
        del base_origins[p]
    base_origins.update({p: origin for p, origin in over_origins.items() if p[: len(path)] == path})
    return over


def _text_of(file: Path) -> str:
    """A file's text; of one that is too large for a config, a little more than is allowed, for parse() to refuse."""
    try:
        with file.open("rb") as data:
            return data.read(4 * MAX_BYTES + 1).decode("utf-8")  # a character has up to 4 bytes
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}:1: not a text file in UTF-8") from None


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have (too long, with a null byte) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_file(file: Path) -> tuple[dict[str, Any], Origins]:
    """Values and origins of one file alone, without those that it extends."""
    return parse(_text_of(file), str(file))


def read_file(file: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Origins]:
    """A file's values with those of the files it extends beneath them.

    `extends:` names one file or a list of them, relative to the file that says it; later ones win over earlier ones,
    and the file itself wins over all.
    """
    own, own_origins = parse_file(file)
    parents = own.pop("extends", [])
    line = own_origins.pop(("extends",), Origin(str(file), 1)).line
    own_origins = {path: origin for path, origin in own_origins.items() if path[0] != "extends"}
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{file}:{line}: 'extends' must be a file name or a list of file names")
    values: dict[str, Any] = {}
    origins: Origins = {}
    for parent in parents:
        parent_file = file.parent / parent
        if not is_file(parent_file):
            raise ConfigError(f"{file}:{line}: 'extends' names {parent}, but there is no file {parent_file}")
        if parent_file.resolve() in (p.resolve() for p in (*chain, file)):
            raise ConfigError(f"{file}:{line}: 'extends' goes in a circle through {parent}")
        parent_values, parent_origins = read_file(parent_file, (*chain, file))
        values = merge(values, parent_values, origins, parent_origins)
    return merge(values, own, origins, own_origins), origins
