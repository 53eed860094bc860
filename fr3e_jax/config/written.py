"""A configuration as text."""

import dataclasses
from typing import Any

import yaml

from fr3e_jax.algorithm.rules import name_of
from fr3e_jax.config.sections import Config
from fr3e_jax.config.values import tables_of


def as_written(section: Any) -> dict[str, Any]:
    """A configuration as dicts, with the names of its rules in place of functions."""
    tables, written = tables_of(section), dataclasses.asdict(section)
    for name in written:
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            written[name] = as_written(value)
        elif name in tables:
            written[name] = name_of(tables[name], value)
    return written


def dump(config: Config) -> str:
    """The configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(as_written(config), sort_keys=False)
