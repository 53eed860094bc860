"""Command lines as lists of flags: what they name, and the settings of one source among them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

from fr3e_jax.config.files import merged_options, parse_value
from fr3e_jax.config.values import ConfigError, described, kinds_of, unknown_option

Flags = list[str]
CHOSEN = ("model.path", "data.source", "init_path")
"""Options that choose a model or a task; the shipped configuration is for those that are shipped."""


def split_files(argv: Sequence[str]) -> tuple[list[str], Flags]:
    """(The values of `--config`, the other arguments).

    Raises:
      ConfigError: a value is missing.
    """
    files, others, rest = [], [], iter(argv)
    for part in rest:
        flag, equals, value = part.partition("=")
        if flag != "--config":
            others.append(part)
            continue
        value = value if equals else next(rest, "")
        if not value or (not equals and value.startswith("--")):
            raise ConfigError("--config needs the name of a file")
        files.append(value)
    return files, others


def spell_out(config_class: type, argv: Sequence[str]) -> Flags:
    """Flags as they are declared: `--max-steps` as `--max_steps`, and `--switch` without a value as true."""
    names = kinds_of(config_class)
    switches = {f"--{name}" for name, kind in names.items() if kind is bool}
    parts = []
    for part, following in itertools.zip_longest(argv, argv[1:]):
        flag, equals, value = part.partition("=")
        spelled = flag[:2] + flag[2:].replace("-", "_")
        if flag.startswith("--") and spelled[2:].rstrip("+") in names:
            part = spelled + equals + value
        alone = not equals and (following is None or following.startswith("--"))
        parts.append(f"{part}=true" if part in switches and alone else part)
    return parts


def refuse_unknown(config_class: type, flags: Flags) -> None:
    """Refuse flags of options that are not there.

    Raises:
      ConfigError: with the nearest option that is there.
    """
    kinds = kinds_of(config_class)
    sections = {name.rpartition(".")[0] for name in kinds} - {""}
    for part in flags:
        name = part.removeprefix("--").partition("=")[0].removesuffix("+")
        if not part.startswith("--") or name in ("", "help", "print_config") or name in sections:
            continue
        outer = name
        while outer and outer not in kinds:
            outer = outer.rpartition(".")[0]
        entry = entry_class(kinds[outer]) if outer else None
        inner = name.removeprefix(outer).removeprefix(".").partition(".")[0]
        if outer and (not inner or inner == "help" or get_origin(kinds[outer]) is dict):
            continue
        if entry is None:
            raise ConfigError(unknown_option(name, kinds, "--"))
        if inner not in get_type_hints(entry):
            known = [f"{outer}.{other}" for other in get_type_hints(entry)]
            raise ConfigError(unknown_option(name, known, "--"))


def others_chosen(config_class: type, flags: Flags) -> list[str]:
    """The flags that choose another model or task than the shipped ones, with their values."""
    kinds, chosen = kinds_of(config_class), []
    for name in CHOSEN:
        if name in kinds:
            value = value_of(flags, name)
            if value is not None and value != default_of(config_class, name):
                chosen.append(f"--{name} {value}")
    return chosen


def split_sources(config_class: type, flags: Flags, options: dict[str, Any]) -> tuple[Flags, dict[str, Any]]:
    """Take flags of the settings of one source, such as `--data.source.prompt COLUMN`, out of the others.

    Args:
      config_class: dataclass of the command.
      flags: as they are declared.
      options: what files say.

    Returns:
      (the other flags, the options that those say: the source with its settings).

    Raises:
      ConfigError: there are several sources.
    """
    said: dict[str, Any] = {}
    for name, kind in kinds_of(config_class).items():
        entry = entry_class(kind)
        prefix = f"--{name}."
        whole = value_of(flags, name)
        if entry is None or not (
            any(part.startswith(prefix) for part in flags) or (whole or "").startswith(("[", "{"))
        ):
            continue
        section, _, key = name.rpartition(".")
        source: Any = whole if whole is not None else options.get(section, {}).get(key)
        if source is None:
            source = default_of(config_class, name)
        if isinstance(source, str):
            source = parse_value(source) if source.startswith(("[", "{")) else [{"name": source}]
        source = [source] if isinstance(source, dict) else source
        settings, flags = taken(flags, name, prefix)
        if settings and len(source) != 1:
            raise ConfigError(
                f"{name} has {len(source)} sources, and {prefix}{settings[0][0]} does not say which it is "
                "for; set it in a file, within that source"
            )
        for path, value in settings:
            first, _, inner = path.partition(".")
            hint = get_type_hints(entry).get(first)
            parsed = value if described(hint).startswith("text") else parse_value(value)
            source = [source[0] | {first: source[0].get(first, {}) | {inner: parsed} if inner else parsed}]
        said = merged_options(said, {section: {key: source}} if section else {key: source})
    return flags, said


def taken(flags: Flags, name: str, prefix: str) -> tuple[list[tuple[str, str]], Flags]:
    """((setting behind `prefix`, its value) of flags, the flags that are neither these nor `--name`)."""
    settings, others, rest = [], [], iter(flags)
    for part in rest:
        flag, equals, value = part.partition("=")
        if (flag != f"--{name}" and not flag.startswith(prefix)) or flag.endswith(".help"):
            others.append(part)
        else:
            value = value if equals else next(rest, "")
            if flag.startswith(prefix):
                settings.append((flag.removeprefix(prefix), value))
    return settings, others


def value_of(flags: Flags, name: str) -> str | None:
    """The value of an option's last flag; None where there is none."""
    value = None
    for part, following in itertools.zip_longest(flags, flags[1:]):
        if part == f"--{name}":
            value = following
        elif part.startswith(f"--{name}="):
            value = part.partition("=")[2]
    return value


def default_of(config_class: type, name: str) -> Any:
    """The default of an option."""
    first, _, inner = name.partition(".")
    field = next(field for field in dataclasses.fields(config_class) if field.name == first)
    if field.default is not dataclasses.MISSING:
        return field.default
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return getattr(value, inner) if inner else value


def entry_class(kind: Any) -> type | None:
    """The dataclass of the entries of an option that may be a list of mappings; None for other options."""
    entries: list[type] = [get_args(part)[0] for part in get_args(kind) if get_origin(part) is list]
    return next((entry for entry in entries if dataclasses.is_dataclass(entry)), None)


def flat(section: type, options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.option` -> value, of options that are checked."""
    kinds, values = get_type_hints(section), dict[str, Any]()
    for name, value in options.items():
        if dataclasses.is_dataclass(kinds[name]):
            values |= flat(kinds[name], value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            real = float in (kinds[name], *get_args(kinds[name]))
            values[prefix + name] = float(value) if real and type(value) is int else value
    return values
