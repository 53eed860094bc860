"""The types of options: each says which values it takes. `checks` holds values against them.

A type is an annotation of Python with its limits beside it, as in `Annotated[int, Bounds(least=1)]`. A value
stays a plain number or text, wherever it comes from: a file, a flag, or a call in Python.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_type_hints

from fr3e_jax.algorithm.rules import Rule, function_of
from fr3e_jax.config.own_functions import with_own

OptionPath = tuple[str | int, ...]
"""Where an option stands: the names of its sections and its own, and numbers from 0 within lists."""
SectionT = TypeVar("SectionT")
LONGEST_SHOWN = 100  # characters of a value in a message


class ConfigError(ValueError):
    """An impossible combination of settings; the message says what to change."""


class OptionError(ConfigError):
    """A value that its option does not take, or an option that is not there.

    path: where it stands, so that a file and a line can be named beside it.
    """

    def __init__(self, path: OptionPath, message: str) -> None:
        super().__init__(message)
        self.path = path


class Limit(Protocol):
    """What a type asks of its values beyond being a number or text."""

    def refusal(self, value: Any) -> str | None:
        """What is wrong with a value, as in "must be at least 1"; None if it is right."""


@dataclasses.dataclass(frozen=True, repr=False)
class Bounds:
    """The limits of a number, which may not be infinite either.

    least, most: included. above, below: excluded. besides: a value that is taken too. why: for the message.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    besides: float | None = None
    why: str = ""

    def __repr__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        shown = [f"{name} {limit:,}" for name, limit in limits.items() if math.isfinite(limit)]
        either = "" if self.besides is None else f", or {self.besides}"
        return (" and ".join(shown) or "finite") + either

    def refusal(self, value: float) -> str | None:
        """What is wrong with a number; None if it lies within the bounds."""
        inside = self.least <= value <= self.most and self.above < value < self.below
        if (inside and math.isfinite(value)) or value == self.besides:
            return None
        return f"must be {self!r}" + (f" ({self.why})" if self.why else "")


@dataclasses.dataclass(frozen=True, repr=False)
class NotEmpty:
    """Text of which something is left when spaces are taken away."""

    def __repr__(self) -> str:
        return "not empty"

    def refusal(self, value: str) -> str | None:
        """What is wrong with a text."""
        return None if value.strip() else "must not be empty"


@dataclasses.dataclass(frozen=True, repr=False)
class Expression:
    """Text that is a regular expression of Python."""

    def __repr__(self) -> str:
        return "a regular expression"

    def refusal(self, value: str) -> str | None:
        """What is wrong with a text."""
        try:
            re.compile(value)
        except re.error as error:
            return f"which is no regular expression: {error}"
        return None


Count = Annotated[int, Bounds(least=1)]
"""A number of things, of which there is one at least."""
NonNegativeInt = Annotated[int, Bounds(least=0)]
"""A number of things, of which there may be none."""
Size = Annotated[int, Bounds(least=1, most=2**20)]
"""The size of an axis of an array."""
RowCount = Annotated[int, Bounds(least=1, most=2**16)]
"""RowCount that are decoded at a time, or queries of a round."""
QueryCount = RowCount | Literal["auto"]
"""Queries of a round: a number, or what a run finds to suffice."""
CacheSize = Annotated[float, Bounds(above=0)] | Literal["auto"]
"""GB of KV caches on a device: a number, or what the device has left."""
Samples = Annotated[int, Bounds(least=1, most=2**12)]
"""Answers that are sampled of one question or state."""
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]
"""What a random key is made of."""
PositiveNumber = Annotated[float, Bounds(above=0)]
NonNegativeNumber = Annotated[float, Bounds(least=0)]
UnitInterval = Annotated[float, Bounds(least=0, most=1)]
"""A share of something, nothing and all included."""
Share = Annotated[float, Bounds(above=0, most=1, why="it is a share")]
"""A share of something that is not nothing."""
Decay = Annotated[float, Bounds(least=0, below=1)]
"""A decay rate of a moving average."""
TopK = Annotated[int, Bounds(least=0, why="0 draws from all tokens")]
TopP = Annotated[float, Bounds(above=0, most=1, why="1 draws from all tokens")]
MeshAxis = Annotated[int, Bounds(least=1, besides=-1, why="-1 takes all devices that are left")]
Name = Annotated[str, NotEmpty()]
"""A path, or the name of something."""


def tables_of(section: Any) -> dict[str, Mapping[str, Rule]]:
    """Field name -> table, of the fields of a dataclass whose values are the names in one.

    `--help` shows each name with its line. In a library call a function may stand there as well.
    """
    tables = {field.name: field.metadata.get("table") for field in dataclasses.fields(section)}
    return {name: table for name, table in tables.items() if table is not None}


def with_functions(section: SectionT) -> SectionT:
    """A section with the functions of its rules in place of their names, or of `module:function`.

    What is compiled for it is compiled for the functions: a name may get another one.

    Raises:
      RuleError: there is no rule of a name, or no such function.
    """
    functions = {
        name: function_of(table, with_own(table, getattr(section, name)))
        for name, table in tables_of(section).items()
    }
    return dataclasses.replace(section, **functions)  # type: ignore[type-var]


def shown_value(value: Any) -> str:
    """A value for people: one line, not too long, texts in quotes."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


def shown_path(path: OptionPath) -> str:
    """Where an option stands, for people: `section.option`, or `data.source[1].scorer` within a list."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def kinds_of(section: type, path: OptionPath = ()) -> dict[str, Any]:
    """`section.option` -> its type without limits, of all options of a section and of the sections in it."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        inner = (*path, name)
        kinds |= kinds_of(kind, inner) if dataclasses.is_dataclass(kind) else {shown_path(inner): kind}  # type: ignore[arg-type]
    return kinds


def unknown_option(name: str, names: Iterable[str], dashes: str = "") -> str:
    """What is said of an option that is not there, with the nearest one that is.

    Args:
      name: as it was given. names: of those that are there.
      dashes: in front of both, `--` of flags.
    """
    near = nearest(name, names)
    hint = f"did you mean {dashes}{near}?" if near else ""
    if not near and dashes:
        hint = "--help lists those that are there"
    return f"there is no option {dashes}{name}" + (f"; {hint}" if hint else "")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that a mistaken one is most like; None if it is like none.

    The option's own name counts most, so that one in the wrong section, or in none, is found.
    """
    section, _, own = name.rpartition(".")

    def likeness(other: str) -> float:
        other_section, _, other_own = other.rpartition(".")
        ratio = difflib.SequenceMatcher(None, own, other_own).ratio()
        one_begins_the_other = other_own.startswith(own) or own.startswith(f"{other_own}_")
        if len(own) > 2 and one_begins_the_other:
            ratio = max(ratio, 0.8)
        return ratio + 0.1 * (section == other_section) if ratio > 0.7 else 0.0

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) else None
