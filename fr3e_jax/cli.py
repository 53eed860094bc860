"""The command lines: dataclasses parsed from YAML and flags, and mistakes told in one line."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import jsonargparse

from fr3e_jax.config.checks import check_mapping, check_options, described
from fr3e_jax.config.files import Written, merged_options, read_files
from fr3e_jax.config.flags import (
    files_that_apply,
    flat,
    refuse_unknown,
    spell_out,
    split_files,
    split_sources,
)
from fr3e_jax.config.own_functions import OWN_FUNCTION
from fr3e_jax.config.values import kinds_of, shown_value, tables_of
from fr3e_jax.parallel.devices import leave_out_absent_tpu
from fr3e_jax.parallel.memory import out_of_memory
from fr3e_jax.parallel.waiting import blocks_of

ConfigT = TypeVar("ConfigT")
READ: list[Written] = []
"""What the files of this process's command say, for the file and line of a mistake that is found later."""
OWN_FILE = "configs/own_task.yaml"
SMALLER = {
    "train": "rollout.queries, explore.rollouts, rollout.max_response, evaluate.rows or "
    "optimizer.micro_tokens; `python -m fr3e_jax.plan` says what fits a slice of TPUs",
    "sft": "batch, or the sizes of the model",
    "evaluate": "rows, max_response or scoring.workers",
    "generate": "n or max_new_tokens",
    "export": "max_file_gb, or take more devices (--mesh.fsdp)",
    "study": "jobs, or rollout.queries and explore.rollouts in the study",
    "plan": "rollout.queries, explore.rollouts or optimizer.micro_tokens",
    "view": "the number of runs; with --serve one question at a time is read",
    "bench": "repeats, or the number of measurements (--only)",
}
"""What to lower where the memory does not suffice, for each command."""


class Formatter(jsonargparse.DefaultHelpFormatter):
    """Help in which a type stands with its limits, as in `int, at least 1`."""

    def _expand_help(self, action: Any) -> str:
        return re.sub(r"Annotated\[(\w+), ([^\]]*)\]", r"\1, \2", super()._expand_help(action))


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
        formatter_class=Formatter,
    )
    if files:
        parser.add_argument("--config", action="config", help="YAML file; flags override it.")
    parser.add_class_arguments(config_class)
    lines = dict(rule_lines(config_class))
    for action in parser._actions:
        if action.dest in lines:
            action.help = f"{action.help} {lines[action.dest]}".replace("%", "%%")
    return parser


def rule_lines(config_class: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(option as on the command line, its table's names with their help), of options that have a table."""
    for name, table in tables_of(config_class).items():
        rules = [f"`{name_of_rule}`, {rule.help}" for name_of_rule, rule in table.items()]
        yield prefix + name, "; ".join(rules) + f"; or a function of your own, `{OWN_FUNCTION}`."
    for name, kind in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from rule_lines(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def parse(
    config_class: type[ConfigT],
    command: str,
    default: str | None,
    argv: Sequence[str] | None = None,
    announce: Callable[[str], None] = print,
) -> tuple[ConfigT, str]:
    """Parse the command line of a command; a mistake in it is one line and exit code 2.

    Every command begins here, so that none starts the library of a TPU that is not there. Flags override
    files, and a later file overrides an earlier one.

    Args:
      config_class: frozen dataclass of the command.
      command: name of the module that is run.
      default: configuration file of the shipped model and task, which applies where neither `--config` nor
        another model or task is named; None for a command that takes no files.
      argv: arguments; the process's by default.
      announce: is given a line that says which files apply, of a command that takes files.

    Returns:
      (the configuration, the stem of the last configuration file, or `run` where there is none).
    """
    leave_out_absent_tpu()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        files, flags = split_files(given) if default is not None else ([], given)
        flags = spell_out(config_class, flags)
        refuse_unknown(config_class, flags)
        applied = ""
        if default is not None:
            own_file = "" if command == "sft" else OWN_FILE
            files, applied = files_that_apply(config_class, default, own_file, files, flags)
        written = read_files(files, config_class)
        READ[:] = [written]
        flags, sources = split_sources(config_class, flags, written.options)
        check_mapping(config_class, sources)
        parser = make_parser(config_class, command, files=default is not None)
        if default is not None:
            what = f"{parser.description} Of the defaults below: {applied}."
            parser.description = what.replace("%", "%%")
        parser.set_defaults(flat(config_class, merged_options(written.options, sources)))
        values = parser.instantiate(parser.parse_args(flags))
        config = config_class(**{name: getattr(values, name) for name in get_type_hints(config_class)})
        check_options(config)
    except jsonargparse.ArgumentError as error:
        fail(command, plain_error(kinds_of(config_class), str(error)))
    except ValueError as error:
        fail(command, error)
    if default is not None:
        announce(f"fr3e_jax.{command}: {applied}")
    return config, Path(files[-1]).stem if files else "run"


def plain_error(kinds: dict[str, Any], message: str) -> str:
    """What the parser says of a flag, in one line for people.

    Args:
      kinds: option as on the command line -> its type.
      message: of the parser.
    """
    lines = [line.strip() for line in message.splitlines()]
    name = next(iter(re.findall(r'^Parser key "([^"]+)"', message)), None)
    if name is None:
        missing = re.sub(r"^argument (--\S+): expected one argument$", r"\1 needs a value", lines[0])
        alone = r"'\1' stands behind no option: options are written --key VALUE, lists --key '[A, B]'"
        return re.sub(r"^unrecognized arguments: (.*)$", alone, missing)
    value = next(iter(re.findall(r"(?:Got|Given) value: (.*)$", message)), None)
    if name in kinds and value is not None:
        return f"{name} is {shown_value(value)}, must be {described(kinds[name])}"
    return f"{name}: {' '.join(lines[1:])}" if name in kinds else f"{name} is a section: set its options"


def fail(command: str, error: Exception | str, code: int = 2) -> NoReturn:
    """End a command with one line on stderr; exit code 2 says that the user's settings are at fault."""
    message = " ".join(str(error).split())
    print(f"fr3e_jax.{command}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def warn(command: str, message: str) -> None:
    """A line on stderr of a command that goes on."""
    print(f"fr3e_jax.{command}: {message}", file=sys.stderr)


@contextlib.contextmanager
def ending_in_one_line(
    command: str,
    mistakes: tuple[type[Exception], ...],
    failures: tuple[type[Exception], ...] = (),
    interrupted: str = "interrupted",
) -> Iterator[None]:
    """End a command whose work fails with one line on stderr and the exit code for it.

    Args:
      command: name of the module that is run.
      mistakes: exceptions that the user's settings are the cause of; exit code 2.
      failures: exceptions of a run that could not go on; exit code 1, as where the memory does not suffice.
      interrupted: what is said after Ctrl-C; exit code 130.
    """
    try:
        yield
    except mistakes as error:
        fail(command, READ[0].explain(error) if READ else error)
    except failures as error:
        fail(command, error, 1)
    except KeyboardInterrupt:
        fail(command, interrupted, 130)
    except (MemoryError, RuntimeError) as error:
        if (shortage := out_of_memory(error)) is None:
            raise
        during = f" at {blocks[-1]!r}" if (blocks := blocks_of(error)) else ""
        fail(command, f"the memory does not suffice ({shortage}){during}; lower {SMALLER[command]}", 1)
