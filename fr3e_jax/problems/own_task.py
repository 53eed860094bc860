"""A task of the user's own: two functions in a file, or in an installed module.

`problems(split, **parameters)` returns the problems of `train` or `held_out`: a sequence of dicts with a
`question` and an `answer`, both text. `score(response, answer)` says whether a response is right; it runs in
worker processes, within scoring.time_limit.
"""

import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fr3e_jax.config import ConfigError
from fr3e_jax.rewards.own import GROUP, load, said
from fr3e_jax.rewards.rules import OWN
from fr3e_jax.types import Problem

COMPARED = 4096  # training problems that held-out ones are compared with


def is_own(name: str) -> bool:
    """Whether a source is a task of the user's own."""
    return name.endswith(".py") or name in importlib.metadata.entry_points(group=GROUP).names


def function(module: ModuleType, name: str, call: str, *args: Any, **keywords: Any) -> Callable[..., Any]:
    """A function of the user's module that can be called so.

    Raises:
      ConfigError: there is none, or it takes other arguments.
    """
    where = module.__file__
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{where} has no function {call}; write one")
    try:
        inspect.signature(found).bind(*args, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"{where}: {name}{inspect.signature(found)} cannot be called as {call} with parameters "
            f"{keywords}: {error}"
        ) from None
    return found


class OwnTask:
    """The problems of a user's own task."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        """Load the file or module, and ask it for the training problems.

        Raises:
          ConfigError: it cannot be loaded, lacks a function, does not take the parameters, fails, or has no
            problems.
        """
        self.name, self.parameters = name, parameters
        # Workers may start elsewhere.
        self.place = str(Path(name).absolute()) if name.endswith(".py") else name
        try:
            module = load(self.place)
        except Exception as error:
            raise ConfigError(f"{name} cannot be loaded: {said(error, self.place)}") from error
        self.file = module.__file__
        self.make = function(module, "problems", "problems(split, **parameters)", "train", **parameters)
        function(module, "score", "score(response, answer)", "", "")
        self.train = self.split("train")
        self.problem("train", self.train, 0)

    def split(self, split: str) -> Sequence[dict[str, Any]]:
        """The user's problems of a split.

        Raises:
          ConfigError: there are none.
        """
        try:
            rows = self.make(split, **self.parameters)
        except Exception as error:
            raise ConfigError(f"{self.name}: problems({split!r}) failed: {said(error, self.file)}") from error
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ConfigError(
                f"{self.name}: problems({split!r}) returned a {type(rows).__name__}; return a list"
            )
        if not len(rows):
            raise ConfigError(f"{self.name}: problems({split!r}) returned no problems")
        return rows

    def problem(self, split: str, rows: Sequence[dict[str, Any]], index: int) -> Problem:
        """One of the user's problems.

        Raises:
          ConfigError: it has no question or no answer, or they are not text.
        """
        try:
            row = rows[index]
        except Exception as error:
            raise ConfigError(
                f"{self.name}: problem {index} of {split} cannot be read: {said(error, self.file)}"
            ) from error
        for key in ("question", "answer"):
            if not (isinstance(row, dict) and isinstance(row.get(key), str)):
                raise ConfigError(
                    f"{self.name}: problem {index} of {split} needs {key!r}, a str; it is {row!r:.120}"
                )
        return Problem(row["question"], row["answer"], OWN + self.place, self.name)

    def __len__(self) -> int:
        """Number of training problems."""
        return len(self.train)

    def __getitem__(self, index: int) -> Problem:
        """A training problem."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.problem("train", self.train, index)

    def held_out(self, count: int) -> list[Problem]:
        """The first held-out problems, without those that come again.

        Raises:
          ConfigError: there are none, or one is among the first training problems too.
        """
        rows = self.split("held_out")
        trained = {self[i].question: i for i in range(min(len(self), COMPARED))}
        found: dict[str, Problem] = {}
        for index in range(len(rows)):
            if len(found) == count:
                break
            problem = self.problem("held_out", rows, index)
            if problem.question in trained:
                raise ConfigError(
                    f"{self.name}: problem {index} of held_out is problem {trained[problem.question]} of "
                    f"train too; leave it out of one of them: {problem.question[:80]!r}"
                )
            found.setdefault(problem.question, problem)
        return list(found.values())
