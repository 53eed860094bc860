"""The command lines: dataclasses parsed from YAML and flags, and mistakes told in one line."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar, get_type_hints

import jsonargparse

from fr3e_jax.config import PACKAGE, ConfigError, check_options, tables_of
from fr3e_jax.parallel.devices import leave_out_absent_tpu

ConfigT = TypeVar("ConfigT")


def make_parser(config_class: type, command: str, files: bool) -> jsonargparse.ArgumentParser:
    """The parser of a command: every field of the dataclass as `--section.key`.

    Args:
      config_class: frozen dataclass of the command.
      command: name of the module that is run.
      files: whether it takes YAML files.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    needed = "".join(
        f" --{field.name} {field.name.upper()}"
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    )
    options = (
        " [--config FILE.yaml] [--key VALUE | --section.key VALUE ...]" if files else " [--key VALUE ...]"
    )
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m fr3e_jax.{command}",
        usage=f"%(prog)s{needed}{options}",
        description=config_class.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    if files:
        parser.add_argument("--config", action="config", help="YAML file; flags after it override it.")
    parser.add_class_arguments(config_class)
    lines = dict(rule_lines(config_class))
    for action in parser._actions:
        if action.dest in lines:
            action.help = f"{action.help} {lines[action.dest]}".replace("%", "%%")
    return parser


def rule_lines(config_class: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(setting as on the command line, its table's names with their help), of those that have a table."""
    for name, table in tables_of(config_class).items():
        rules = [f"`{rule}`, {told.help}" for rule, told in table.items()]
        yield prefix + name, "; ".join(rules) + "."
    for name, kind in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from rule_lines(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def parse(
    config_class: type[ConfigT], command: str, default: str | None, argv: Sequence[str] | None = None
) -> tuple[ConfigT, str]:
    """Parse the command line of a command; a mistake in it is one line and exit code 2.

    Every command begins here, so that none starts the library of a TPU that is not there.

    Args:
      config_class: frozen dataclass of the command.
      command: name of the module that is run.
      default: config file without `--config`; None for a command that takes no files.
      argv: arguments; the process's by default.

    Returns:
      (the configuration, the stem of the config file).
    """
    leave_out_absent_tpu()
    argv = spell_out(config_class, list(sys.argv[1:] if argv is None else argv))
    flags = [i for i, a in enumerate(argv) if a == "--config" or a.startswith("--config=")]
    if default is not None and not flags:
        argv, flags = ["--config", str(PACKAGE / default), *argv], [0]
    name = "run"
    for i in flags:
        flag, equals, value = argv[i].partition("=")
        if equals:
            argv[i] = flag + equals + find_config(value)
        elif i + 1 < len(argv):
            value = argv[i + 1]
            argv[i + 1] = find_config(value)
        name = Path(value).stem
    parser = make_parser(config_class, command, files=default is not None)
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except TypeError:  # from a section that is given as a number, which the parser lets through
        fail(command, "a section of the configuration is not a mapping of options to values")
    except (jsonargparse.ArgumentError, ValueError) as error:
        fail(command, error)
    fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    config = config_class(**fields)
    try:
        check_options(config)
    except ConfigError as error:
        fail(command, error)
    return config, name


def spell_out(config_class: type, argv: list[str]) -> list[str]:
    """`--flag` of a setting that is true or false, without a value, as `--flag=true`."""
    switches = {f"--{name}" for name in booleans(config_class)}
    return [
        f"{part}=true" if part in switches and (following is None or following.startswith("--")) else part
        for part, following in itertools.zip_longest(argv, argv[1:])
    ]


def booleans(config_class: type, prefix: str = "") -> Iterator[str]:
    """Names of the settings that are true or false, as on the command line."""
    for name, kind in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from booleans(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif kind is bool:
            yield prefix + name


def find_config(path: str) -> str:
    """A config file as given, or the one of that name that is shipped (`configs/NAME.yaml`)."""
    shipped = PACKAGE / path
    return str(shipped) if not Path(path).exists() and shipped.exists() else path


def fail(command: str, error: Exception | str, code: int = 2) -> NoReturn:
    """End a command with one line on stderr; exit code 2 says that the user's settings are at fault."""
    message = " ".join(str(error).split())
    print(f"fr3e_jax.{command}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def warn(command: str, message: str) -> None:
    """A line on stderr of a command that goes on."""
    print(f"fr3e_jax.{command}: {message}", file=sys.stderr)
