"""Tables of rules: what an option chooses by name, each with its function and a line of help.

A table is an ordinary dict. One more rule is one more entry, `TABLE["mine"] = Rule(function, "a line")`.
In a library call a function may stand where a rule is named, and in a configuration its place as text,
`module:function` (config/own_functions.py).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from jaxtyping import Shaped

from fr3e_jax.types import AnyArray

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
    """Raised for a rule that does not exist, or whose function returns something else than it must."""


@dataclasses.dataclass(frozen=True)
class Rule(Generic[Function]):
    """An entry of a table: a function, and what `--help` says of it."""

    function: Function
    help: str
    needs: tuple[str, ...] = ()
    """What it looks at beyond what sampling records, of those that have to be asked."""


def function_of(table: Mapping[str, Rule[Function]], rule: str | Function) -> Function:
    """Look a rule up by its name; a function is returned as it is.

    Raises:
      RuleError: the table has no rule of this name.
    """
    if not isinstance(rule, str):
        return rule
    if rule not in table:
        raise RuleError(f"there is no rule {rule!r}; choose one of {', '.join(table)}")
    return table[rule].function


def needs_of(
    table: Mapping[str, Rule[Function]], rule: str | Function, known: Sequence[str]
) -> tuple[str, ...]:
    """List what a rule needs beyond what sampling records; a function in no table has `needs`.

    Args:
      table: of the option.
      rule: a name or a function.
      known: what can be asked for.

    Raises:
      RuleError: there is no such rule, or it needs something that cannot be asked for.
    """
    function = function_of(table, rule)
    entries = [entry.needs for name, entry in table.items() if rule in (name, entry.function)]
    needs = entries[0] if entries else getattr(function, "needs", ())
    named = (needs,) if isinstance(needs, str) else tuple(needs)
    if unknown := [need for need in named if need not in known]:
        raise RuleError(
            f"the rule {name_of(table, rule)} needs {unknown[0]!r}, which is none of {', '.join(known)}"
        )
    return named


def name_of(table: Mapping[str, Rule[Function]], rule: str | Function) -> str:
    """Name a rule; a function that is in no table is named by its module and its own name."""
    if isinstance(rule, str):
        return rule
    named = [name for name, other in table.items() if other.function is rule]
    return named[0] if named else f"{rule.__module__}.{getattr(rule, '__qualname__', type(rule).__name__)}"


def pair_of(result: Any, what: str) -> tuple[Any, Any]:
    """Return what a rule's function returned, if it is a pair.

    Args:
      result: what the function returned.
      what: what it must be, for the message.

    Raises:
      RuleError: it is no tuple of 2.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        raise RuleError(f"{what}; the rule's function gave {type(result).__name__}")
    return result


def of_shape(result: Any, shape: tuple[int, ...], what: str) -> Shaped[AnyArray, "..."]:
    """Return what a rule's function returned, if it is an array of this shape.

    Args:
      result: what the function returned.
      shape: the shape that it must have.
      what: a name for it in the message, with its axes.

    Raises:
      RuleError: it has another shape, or is no array.
    """
    if getattr(result, "shape", None) != shape:
        got = list(result.shape) if hasattr(result, "shape") else type(result).__name__
        raise RuleError(f"{what} must have shape {list(shape)}; the rule's function gave {got}")
    return result
