"""Functions of the user's own where a rule is named, as text: `module:function`.

Such text comes from the user's own command line or configuration file, and from nowhere else: what a run
directory or a checkpoint holds is compared as text, and never imported.
"""

import contextlib
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fr3e_jax.algorithm.rules import Rule, RuleError

OWN_FUNCTION = "module:function"


def with_own(table: Mapping[str, Rule], rule: Any) -> Any:
    """Replace `module:function` by that function; names in the table and functions stay as they are.

    Raises:
      RuleError: it cannot be imported, or is no function.
    """
    return load_function(rule) if isinstance(rule, str) and rule not in table and ":" in rule else rule


def load_function(text: str) -> Callable[..., Any]:
    """Import a function by its module and its name within it, from Python's path or the current directory.

    Args:
      text: `module:function`, or `package.module:name.of.it`.

    Raises:
      RuleError: there is no such module, importing it fails, or it has no such function.
    """
    module_name, _, name = text.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise RuleError(f"this is not {OWN_FUNCTION}: the names of a module and of a function in it")
    with current_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise RuleError(f"{module_name} cannot be imported: {error}") from error
            raise RuleError(
                f"there is no module {error.name}, neither in {os.getcwd()} nor on PYTHONPATH"
            ) from None
        except Exception as error:
            raise RuleError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        function = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        near = difflib.get_close_matches(name, vars(module), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise RuleError(f"{module_name} has no function {name}{meant}") from None
    if not callable(function):
        raise RuleError(f"{name} of {module_name} is no function but {type(function).__name__}")
    return function


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Look modules up in the current directory too, after all other places; `python -m` looks there first."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
