"""Verdicts of a user's own task: `score` or `score_group` of the file, or of the installed module, that a run
names.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fr3e_jax.rewards.verdict import Facts, GroupScorer, Scorer, ScorerError, Verdict

GROUP = "fr3e_jax.tasks"
ROW = "row"  # the parameter of score and score_group that takes the whole row of the problem
TOTAL = "score"  # the named part that is the score itself, where there is one
REASON = "reason"  # the named part that is a text: why the score is what it is
ROUNDING = 1e-6  # by which a sum of parts may be outside of [0, 1]
EXPECTED = (
    "return True, False, a number in [0, 1], or named parts such as {'answer': 0.8, 'form': 0.2}, whose sum "
    f"(or whose {TOTAL!r}, where there is one) lies in [0, 1]"
)


@functools.cache
def import_task(place: str) -> ModuleType:
    """The module of a task, imported once per process.

    Args:
      place: a file `*.py`, or the name of an entry point in the group `fr3e_jax.tasks`.

    Raises:
      ImportError: there is no such file or entry point.
      Exception: what the module itself raises.
    """
    if not place.endswith(".py"):
        matching = tuple(importlib.metadata.entry_points(group=GROUP, name=place))
        if not matching:
            raise ImportError(f"no entry point {place} in the group {GROUP}")
        return matching[0].load()
    if not Path(place).is_file():
        raise ImportError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(f"fr3e_own_task_{Path(place).stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As an import does it: dataclasses of the file look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def one_line(error: Exception, file: str | None) -> str:
    """An error of the user's code in one line: its type, its text, and the line of `file` that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def takes_row(function: Callable[..., Any]) -> bool:
    """Whether a function of the user's has a parameter for the row of the problem."""
    return ROW in inspect.signature(function).parameters


def scorer(place: str) -> Scorer:
    """The scorer of the task at a place, whose module is imported now, while no time limit runs.

    Raises:
      ScorerError: it cannot be loaded.
    """
    return functools.partial(score, loaded(place), place)


def group_scorer(place: str) -> GroupScorer:
    """The scorer of whole groups of the task at a place, whose module is imported now.

    Raises:
      ScorerError: it cannot be loaded.
    """
    return functools.partial(score_group, loaded(place), place)


def loaded(place: str) -> ModuleType:
    """The module of a task.

    Raises:
      ScorerError: it cannot be loaded.
    """
    try:
        return import_task(place)
    except Exception as error:
        raise ScorerError(f"{place} cannot be loaded: {one_line(error, place)}") from error


def score(module: ModuleType, place: str, response: str, answer: str, facts: Facts) -> Verdict:
    """Judge a response by the task's own `score`.

    Raises:
      ScorerError: it failed, or returned something else than a score.
    """
    value = called(module, place, "score", response, answer, facts)
    return verdict(value, response, f"{place}: score() returned {value!r:.80} over {response[:80]!r}")


def score_group(
    module: ModuleType, place: str, responses: tuple[str, ...], answer: str, facts: Facts
) -> tuple[Verdict, ...]:
    """Judge the responses to one problem by the task's own `score_group`.

    Raises:
      ScorerError: it failed, or returned something else than a score for each.
    """
    values = called(module, place, "score_group", list(responses), answer, facts)
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        count = f"{values!r:.80}"
    else:
        count = str(len(values))
    if count != str(len(responses)):
        raise ScorerError(
            f"{place}: score_group() returned {count} over {len(responses)} responses; return a list with "
            "one score for each, in their order"
        )
    return tuple(
        verdict(value, response, f"{place}: score_group() returned {value!r:.80} over {response[:80]!r}")
        for value, response in zip(values, responses, strict=True)
    )


def called(
    module: ModuleType, place: str, name: str, responses: str | list[str], answer: str, facts: Facts
) -> Any:
    """Call a function of the user's module on responses.

    Raises:
      ScorerError: it failed.
    """
    function = getattr(module, name)
    row = {ROW: facts} if takes_row(function) else {}
    try:
        return function(responses, answer, **row)
    except (MemoryError, RecursionError):
        raise  # which make an answer wrong, as a time limit does
    except Exception as error:
        why = one_line(error, module.__file__)
        raise ScorerError(f"{place}: {name}() failed over {responses!r:.80}: {why}") from error


def verdict(value: Any, response: str, returned: str) -> Verdict:
    """Make the verdict of a returned value, which is a score or named parts.

    Args:
      value: what the user's function returned for one response.
      response: the text that was judged.
      returned: the beginning of an error, with the value in it.

    Raises:
      ScorerError: it is no score.
    """
    parts: tuple[tuple[str, float], ...] = ()
    reason = ""
    total = finite_number(value)
    if isinstance(value, dict):
        if isinstance(value.get(REASON), str):
            reason, value = value[REASON], {name: part for name, part in value.items() if name != REASON}
        numbers = {name: finite_number(part) for name, part in value.items()}
        if not numbers or any(part is None or not isinstance(name, str) for name, part in numbers.items()):
            raise ScorerError(f"{returned}; {EXPECTED}")
        parts = tuple((name, part) for name, part in numbers.items() if part is not None)
        total = dict(parts).get(TOTAL, math.fsum(part for _, part in parts))
    if total is None or not -ROUNDING <= total <= 1 + ROUNDING:
        raise ScorerError(f"{returned}; {EXPECTED}")
    return Verdict(min(max(total, 0.0), 1.0), response, parts, reason)


def finite_number(value: Any) -> float | None:
    """A finite number as float, of Python's, numpy's or another library's types; None of anything else."""
    if value is None or isinstance(value, str | bytes | dict | Sequence):
        return None
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None
