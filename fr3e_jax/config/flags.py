"""Command lines as lists of flags: what they name, and the settings of one source among them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

from fr3e_jax.config.checks import described
from fr3e_jax.config.files import merged_options, parse_value
from fr3e_jax.config.renamed import new_flag
from fr3e_jax.config.values import ConfigError, kinds_of, unknown_option

Flags = list[str]
CHOSEN = ("model.path", "init_path")
"""Options that choose a model: the shipped configuration is for the shipped one, whatever it is asked."""
CHOSEN_FOR_NEW = ("data.source",)
"""Options that choose a model too, where the command makes a new one for them."""
BRACKETS = ("[", "{")


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
        part = new_flag(part)
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


def files_that_apply(
    config_class: type, default: str, own_file: str, files: list[str], flags: Flags
) -> tuple[list[str], str]:
    """The files that apply, and a sentence about them.

    Args:
      config_class: dataclass of the command.
      default: configuration file of the shipped model and task.
      own_file: configuration file to begin one's own from; empty where there is none.
      files: those that are named. flags: as they are declared.
    """
    if files:
        over = any(flag not in ("--help", "-h") for flag in flags)
        return files, f"{', then '.join(files)} applies" + (", and the flags over it" if over else "")
    others, kinds = [], kinds_of(config_class)
    for name in CHOSEN if "model.path" in kinds else (*CHOSEN, *CHOSEN_FOR_NEW):
        value = value_of(flags, name) if name in kinds else None
        if value is not None and value != default_of(config_class, name):
            others.append(f"--{name} {value}")
    if not others:
        return [default], f"{default} applies, since neither --config nor another model is given"
    why = f"no file applies, since {default} is not for {', '.join(others)}: the defaults and the flags do"
    return [], why + (f". {own_file} is a beginning for a file of your own" if own_file else "")


def split_sources(config_class: type, flags: Flags, options: dict[str, Any]) -> tuple[Flags, dict[str, Any]]:
    """Take flags of the settings of one source, such as `--data.source.prompt COLUMN`, out of the others.

    Args:
      config_class: dataclass of the command.
      flags: as they are declared.
      options: what files say.

    Returns:
      (the other flags, the option that those set: a list of sources with their settings).

    Raises:
      ConfigError: there are several sources.
    """
    sources: dict[str, Any] = {}
    for name, kind in kinds_of(config_class).items():
        entry, prefix, given = entry_class(kind), f"--{name}.", value_of(flags, name) or ""
        if entry is None or not (
            given.startswith(BRACKETS) or any(flag.startswith(prefix) for flag in flags)
        ):
            continue
        section, _, key = name.rpartition(".")
        value = given or options.get(section, {}).get(key) or default_of(config_class, name)
        entries = entries_of(value)
        settings, flags = taken(flags, name, prefix)
        if settings and len(entries) != 1:
            raise ConfigError(
                f"{name} has {len(entries)} sources, and {prefix}{settings[0][0]} does not say which it is "
                "for; set it in a file, within that source"
            )
        for setting, text in settings:
            entries = [with_setting(entry, entries[0], setting, text)]
        sources = merged_options(sources, {section: {key: entries}} if section else {key: entries})
    return flags, sources


def entries_of(value: Any) -> list[Any]:
    """A source, or a list of them, as a list of mappings.

    Args:
      value: a name, a mapping, a list, or the text of one of the latter two.
    """
    if isinstance(value, str):
        value = parse_value(value) if value.startswith(BRACKETS) else {"name": value}
    return value if isinstance(value, list) else [value]


def with_setting(entry_class: type, entry: Any, setting: str, text: str) -> Any:
    """A source with one setting more.

    Args:
      entry_class: dataclass of sources.
      entry: the source, a mapping; something else stays as it is, and is refused later.
      setting: `option`, or `option.key` of one that is a mapping.
      text: its value, as in a flag.
    """
    if not isinstance(entry, dict):
        return entry
    option, _, key = setting.partition(".")
    value = text if described(get_type_hints(entry_class)[option]).startswith("text") else parse_value(text)
    held = entry.get(option)
    if key:
        value = {**(held if isinstance(held, dict) else {}), key: value}
    return entry | {option: value}


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
    """The value that an option of a command has where neither file nor flag sets it."""
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
