"""The config: YAML files that extend each other, their schema, and one line with its place for every mistake."""

from trainer.config.errors import ConfigError, did_you_mean, one_line, printable
from trainer.config.load import CONFIG_DIR, LoadedConfig, config_name, find_config, json_schema, load_config, render
from trainer.config.names import dotted, is_commit, is_local
from trainer.config.resume import why_refused
from trainer.config.schema import FROM_SCRATCH, Config, is_revision

__all__ = [
    "CONFIG_DIR",
    "FROM_SCRATCH",
    "Config",
    "ConfigError",
    "LoadedConfig",
    "config_name",
    "did_you_mean",
    "dotted",
    "find_config",
    "is_commit",
    "is_local",
    "is_revision",
    "json_schema",
    "load_config",
    "one_line",
    "printable",
    "render",
    "why_refused",
]
