"""Tables of rules: what an option chooses by name, each with its function and a line of help.

A table is an ordinary dict. One more rule is one more entry, `TABLE["mine"] = Rule(function, "a line")`.
In a library call a function may stand where a rule is named.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from jax import Array

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    Chosen: TypeAlias = str | Function
    """The name of a rule, or its function."""
else:

    class Chosen:
        """The same, of which command lines and files see the name alone: they can bring no function."""

        def __class_getitem__(cls, function):
            return str


class RuleError(ValueError):
    """A rule that is not there, or whose function gives something else than it must."""


@dataclasses.dataclass(frozen=True)
class Rule(Generic[Function]):
    """A function, and what `--help` says of it."""

    function: Function
    help: str


def function_of(table: Mapping[str, Rule[Function]], rule: str | Function) -> Function:
    """The function of a name; a function is itself.

    Raises:
      RuleError: there is none of this name.
    """
    if not isinstance(rule, str):
        return rule
    if rule not in table:
        raise RuleError(f"there is no rule {rule!r}; choose one of {', '.join(table)}")
    return table[rule].function


def name_of(table: Mapping[str, Rule[Function]], rule: str | Function) -> str:
    """The name of a rule; of a function in no table, its module and its own name."""
    if isinstance(rule, str):
        return rule
    named = [name for name, other in table.items() if other.function is rule]
    return named[0] if named else f"{rule.__module__}.{getattr(rule, '__qualname__', type(rule).__name__)}"


def of_shape(found: Array, shape: tuple[int, ...], what: str) -> Array:
    """What a rule gave, which must have this shape.

    Args:
      found: the array.
      shape: that it must have.
      what: what it is, with its axes.

    Raises:
      RuleError: it has another.
    """
    if getattr(found, "shape", None) != shape:
        got = list(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise RuleError(f"{what} must have shape {list(shape)}; the rule's function gave {got}")
    return found
