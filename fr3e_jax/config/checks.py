"""Whether values are of the types of their options: for files, flags and Python alike."""

import dataclasses
import numbers
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fr3e_jax.algorithm.rules import Rule, RuleError
from fr3e_jax.config.own_functions import OWN_FUNCTION, with_own
from fr3e_jax.config.values import (
    Limit,
    OptionError,
    OptionPath,
    kinds_of,
    nearest,
    shown_path,
    shown_value,
    tables_of,
    unknown_option,
)


def check_options(section: Any, path: OptionPath = ()) -> None:
    """Refuse a section of a configuration, or a whole one, that holds a value which its option does not take.

    Args:
      section: a dataclass whose fields are options or sections.
      path: where it stands.

    Raises:
      OptionError: with one line that says what to change.
    """
    kinds, tables = get_type_hints(type(section), include_extras=True), tables_of(section)
    for field in dataclasses.fields(section):
        check_option(kinds[field.name], getattr(section, field.name), (*path, field.name), tables)


def check_mapping(section: type, given: Mapping[Any, Any], path: OptionPath = ()) -> None:
    """Refuse a mapping of options to values, as a file has it, as a section of this type.

    Raises:
      OptionError: an option is not there, or does not take its value.
    """
    kinds, tables = get_type_hints(section, include_extras=True), tables_of(section)
    for name, value in given.items():
        inner = (*path, str(name))
        if name not in kinds:
            sections = [part for part, kind in kinds.items() if dataclasses.is_dataclass(kind)]
            known = [*kinds_of(section, path), *sections]  # sections stand at the top alone
            raise OptionError(inner, unknown_option(shown_path(inner), known))
        if dataclasses.is_dataclass(kinds[name]) and not isinstance(value, Mapping):
            refuse_value(inner, value, "must be a section: a mapping of options to values")
        check_option(kinds[name], value, inner, tables)
    for field in dataclasses.fields(section):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if path and needed and field.name not in given:
            raise OptionError(path, f"{shown_path(path)} has no {field.name}")


def check_option(kind: Any, value: Any, path: OptionPath, tables: Mapping[str, Any]) -> None:
    """Refuse a value of an option, or a section, by its type or, of a rule, by its table.

    Raises:
      OptionError: with one line that says what to change.
    """
    table = tables.get(str(path[-1]))
    if table is None:
        check_value(kind, value, path)
    else:
        check_rule(table, value, path)


def check_rule(table: Mapping[str, Rule], value: Any, path: OptionPath) -> None:
    """Refuse what is no name in a table, no function, and not the place of one, `module:function`.

    Raises:
      OptionError: with one line that says what to change.
    """
    option = f"{shown_path(path)} is {value!r}"
    try:
        rule = with_own(table, value)
    except RuleError as error:
        raise OptionError(path, f"{option}: {error}") from None
    if not callable(rule) and not (isinstance(rule, str) and rule in table):
        near = nearest(rule, table) if isinstance(rule, str) else None
        meant = f"did you mean {near}? " if near else ""
        choices = f"choose one of {', '.join(table)}, or a function of your own, {OWN_FUNCTION}"
        raise OptionError(path, f"{option}; {meant}{choices}")


def check_value(kind: Any, value: Any, path: OptionPath) -> None:
    """Refuse a value that is not of a type.

    Args:
      kind: as annotated.
      value: of an option, or of an entry of one that is a list or a mapping.
      path: where it stands.

    Raises:
      OptionError: with one line that says what to change.
    """
    kind, limits = without_limits(kind)
    parts = get_args(kind)
    if is_union(kind):
        fitting = [part for part in parts if takes(part, value)]
        if not fitting:
            refuse_value(path, value, f"must be {described(kind)}")
        check_value(fitting[0], value, path)
    elif not takes(kind, value):
        refuse_value(path, value, f"must be {described(kind)}")
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            check_mapping(kind, value, path)  # type: ignore[arg-type]
        else:
            check_options(value, path)
    elif get_origin(kind) is list:
        for i, entry in enumerate(value):
            check_value(parts[0], entry, (*path, i))
    elif get_origin(kind) is dict:
        for name, entry in value.items():
            check_value(parts[1], entry, (*path, name))
    for limit in limits:
        if refusal := limit.refusal(value):
            refuse_value(path, value, refusal)


def without_limits(kind: Any) -> tuple[Any, Sequence[Limit]]:
    """(A type, the limits that are annotated beside it)."""
    if get_origin(kind) is not Annotated:
        return kind, ()
    base, *limits = get_args(kind)
    return base, limits


def is_union(kind: Any) -> bool:
    """Whether a type is several, such as `str | None`."""
    return get_origin(kind) in (Union, types.UnionType)


def takes(kind: Any, value: Any) -> bool:
    """Whether a value is of a type, whatever its limits, its entries or its own options are."""
    kind, _ = without_limits(kind)
    origin = get_origin(kind) or kind
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is types.NoneType:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real)
    if origin is list:
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping) or (isinstance(kind, type) and isinstance(value, kind))
    return isinstance(value, origin)


def described(kind: Any) -> str:
    """What values of a type are, in words."""
    kind, _ = without_limits(kind)
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if is_union(kind):
        return " or ".join(described(part) for part in parts)
    if get_origin(kind) is list:
        if get_origin(parts[0]) is Literal:
            return f"a list of these: {', '.join(map(str, get_args(parts[0])))}"
        return "a list of mappings" if dataclasses.is_dataclass(parts[0]) else "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {types.NoneType: "null"}
    return words.get(kind, "a mapping")


def refuse_value(path: OptionPath, value: Any, refusal: str) -> None:
    """Refuse a value.

    Raises:
      OptionError: always.
    """
    raise OptionError(path, f"{shown_path(path)} is {shown_value(value)}, {refusal}")
