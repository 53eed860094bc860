"""Options that had another name in an earlier version, whose files and command lines are still read."""

from collections.abc import Mapping
from typing import Any

from fr3e_jax.config.values import OptionError, shown_path

RENAMED = {("loss", "policy"): ("loss", "objective")}
"""Earlier name -> the name now, both (section, option)."""


def with_new_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Put options under the names that they have now.

    Args:
      options: section -> option -> value, as a file has it; what is no mapping stays as it is.

    Raises:
      OptionError: an option is set under both names.
    """
    renamed = dict(options)
    for (section, old), (_, new) in RENAMED.items():
        held = renamed.get(section)
        if not isinstance(held, Mapping) or old not in held:
            continue
        if new in held:
            both = f"{shown_path((section, old))} is the earlier name of {shown_path((section, new))}"
            raise OptionError((section, old), f"{both}, and both are set; leave one out")
        renamed[section] = {new if name == old else name: value for name, value in held.items()}
    return renamed


def new_flag(flag: str) -> str:
    """Write a flag, `--section.option` with or without `=VALUE`, with the name that its option has now."""
    name, equals, value = flag.partition("=")
    for old, new in RENAMED.items():
        if name == f"--{shown_path(old)}":
            return f"--{shown_path(new)}{equals}{value}"
    return flag
