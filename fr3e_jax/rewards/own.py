"""Verdicts of a user's own task: the `score` of the file, or of the installed module, that a run names."""

import functools
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from fr3e_jax.rewards.verdict import Scorer, ScorerError, Verdict

GROUP = "fr3e_jax.tasks"


@functools.cache
def load(place: str) -> ModuleType:
    """The module of a task, once per process.

    Args:
      place: a file `*.py`, or the name of an entry point in the group `fr3e_jax.tasks`.

    Raises:
      ImportError: there is no such file or entry point.
      Exception: what the module itself raises.
    """
    if not place.endswith(".py"):
        found = tuple(importlib.metadata.entry_points(group=GROUP, name=place))
        if not found:
            raise ImportError(f"no entry point {place} in the group {GROUP}")
        return found[0].load()
    if not Path(place).is_file():
        raise ImportError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(f"fr3e_own_task_{Path(place).stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As an import does it: dataclasses of the file look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def said(error: Exception, file: str | None) -> str:
    """An error of the user's code in one line: its type, its text, and the line of `file` that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def scorer(place: str) -> Scorer:
    """The scorer of the task at a place, whose module is loaded now, while no time limit runs.

    Raises:
      ScorerError: it cannot be loaded.
    """
    try:
        load(place)
    except Exception as error:
        raise ScorerError(f"{place} cannot be loaded: {said(error, place)}") from error
    return functools.partial(score, place)


def score(place: str, response: str, answer: str, facts: Any) -> Verdict:
    """What the task's own `score` says.

    Raises:
      ScorerError: it failed, or said neither yes nor no.
    """
    module = load(place)
    try:
        right = module.score(response, answer)
        decided = right in (0, 1)
    except (MemoryError, RecursionError):
        raise  # which make an answer wrong, as a time limit does
    except Exception as error:
        why = said(error, module.__file__)
        raise ScorerError(f"{place}: score() failed over {response[:80]!r}: {why}") from error
    if not decided:
        raise ScorerError(
            f"{place}: score() returned {right!r:.80} over {response[:80]!r}, must be True or False"
        )
    return Verdict(bool(right), response)
