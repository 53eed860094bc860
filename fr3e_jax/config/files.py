"""Configurations in YAML files: each mistake has its file and line, and a file may begin from another one.

The key `base` names that other file, relative to the one that it stands in. What a file says itself goes
before what its base says.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fr3e_jax.config.checks import check_mapping
from fr3e_jax.config.renamed import RENAMED, with_new_names
from fr3e_jax.config.sections import PACKAGE
from fr3e_jax.config.values import ConfigError, OptionError, OptionPath, shown_path, shown_value

BASE_KEY = "base"
SHIPPED = PACKAGE / "configs"


@dataclasses.dataclass(frozen=True)
class Written:
    """The options that files set, sections within mappings, and "FILE, line N" of each."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    places: dict[OptionPath, str] = dataclasses.field(default_factory=dict)

    def place(self, path: OptionPath) -> str | None:
        """Where an option, or the innermost thing around it that a file names, is written."""
        inner = (path[:size] for size in range(len(path), 0, -1))
        return next((self.places[part] for part in inner if part in self.places), None)

    def explain(self, error: Exception) -> Exception:
        """An error with the file and line in front that its option is written at; others as they are."""
        place = self.place(error.path) if isinstance(error, OptionError) else None
        return ConfigError(f"{place}: {error}") if place else error


class Loader(yaml.SafeLoader):
    """YAML as the command line reads it: 1e-6 is a number, and a date is text."""


Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$", re.I
    ),
    list("-+0123456789."),
)


def read_files(names: Iterable[str], config_class: type) -> Written:
    """What configuration files say together; a later one goes before an earlier one.

    Args:
      names: paths, or names of shipped files (`configs/NAME.yaml`).
      config_class: dataclass of the command that reads them.

    Raises:
      ConfigError: a file is not there, is empty or is no YAML, or an option is not there or does not take its
        value. One line with file and line.
    """
    written = Written()
    for name in names:
        written = merged(written, read_file(find_config(name), ()))
    try:
        check_mapping(config_class, written.options)
    except OptionError as error:
        raise written.explain(error) from None
    return written


def read_file(path: Path, readers: tuple[Path, ...]) -> Written:
    """What a file says, with what its base says.

    Args:
      path: of the file.
      readers: the files that this one is the base of, the innermost last.

    Raises:
      ConfigError: a file cannot be read, or files are each other's bases.
    """
    own = parse_file(path)
    if BASE_KEY not in own.options:
        return own
    place, base = own.places[BASE_KEY,], own.options.pop(BASE_KEY)
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(f"{place}: {BASE_KEY} is {base!r}, must be the name of a file")
    beside, chain = path.parent / base, (*readers, path)
    try:
        inner = beside if beside.exists() else find_config(base)
    except ConfigError as error:
        raise ConfigError(f"{place}: {BASE_KEY}: {error}") from None
    if inner.resolve() in [reader.resolve() for reader in chain]:
        raise ConfigError(f"{place}: {BASE_KEY} goes in a circle: {' -> '.join(map(str, (*chain, inner)))}")
    return merged(read_file(inner, chain), own)


def merged(under: Written, over: Written) -> Written:
    """What two files say together, section by section; the second one goes before the first."""
    return Written(merged_options(under.options, over.options), under.places | over.places)


def merged_options(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one: mappings within them are merged, and of other values the second's stand."""
    both = {**under, **over}
    for name in under.keys() & over.keys():
        if isinstance(under[name], Mapping) and isinstance(over[name], Mapping):
            both[name] = merged_options(under[name], over[name])
    return both


def parse_file(path: Path) -> Written:
    """What stands in one file.

    Raises:
      ConfigError: it cannot be read, is empty, is no YAML, is no mapping, or sets an option twice.
    """
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path} is empty; give it options, such as `steps: 100`")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} is not a mapping of options to values, such as `steps: 100`")
        places = dict(places_of(node, str(path), ()))
        options = loader.construct_document(node)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no configuration: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: this is no YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    places |= {new: places[old] for old, new in RENAMED.items() if old in places}
    try:
        return Written(with_new_names(options), places)
    except OptionError as error:
        raise Written({}, places).explain(error) from None


def places_of(node: yaml.Node, file: str, path: OptionPath) -> Iterator[tuple[OptionPath, str]]:
    """(path of an option, "FILE, line N"), of all that a node of a file holds.

    Raises:
      ConfigError: an option is set twice.
    """
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield (*path, number), f"{file}, line {entry.start_mark.line + 1}"
            yield from places_of(entry, file, (*path, number))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                again = f"{shown_path((*path, name))} is set a second time, after line {lines[name]}"
                raise ConfigError(f"{file}, line {line}: {again}")
            lines[name] = line
            yield (*path, name), f"{file}, line {line}"
            yield from places_of(value, file, (*path, name))


def find_config(name: str) -> Path:
    """A configuration file as it is named, or the one of that name that is shipped.

    Raises:
      ConfigError: there is none; with the one that may be meant.
    """
    if not name.strip():
        raise ConfigError("the name of a configuration file is empty")
    path, shipped = Path(name), PACKAGE / name
    if path.is_file():
        return path
    if path.exists():
        raise ConfigError(f"--config {name}: this is no file")
    if shipped.is_file():
        return shipped
    names = [f"configs/{file.relative_to(SHIPPED).as_posix()}" for file in sorted(SHIPPED.rglob("*.yaml"))]
    moved = [other for other in names if Path(other).name == path.name]
    near = moved or difflib.get_close_matches(name, names, n=1)
    raise ConfigError(f"there is no file {name}" + (f"; did you mean {near[0]}?" if near else ""))


def parse_value(text: str) -> Any:
    """The value of a flag, read as YAML.

    Raises:
      ConfigError: it is none.
    """
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"{shown_value(text)} is no YAML") from None
