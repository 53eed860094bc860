"""A task of the user's own: functions in a file, or in an installed module.

`problems(split, **parameters)` returns the problems of `train` or `held_out`: a sequence of rows, which are
dicts with a `question` and an `answer`, both text, and whatever else the task's other functions need.
`score(response, answer)` judges a response, and `score_group(responses, answer)` all responses of a group at
once. Both run in worker processes, within scoring.time_limit, and are given the problem's row if they have a
parameter `row`. `solution(row)` writes a worked solution for `sft`; if it has a parameter `random`, it is
given a random.Random. `decisions(row, response)` lists the offsets of the characters at which a response
decides its verdict, for the metrics `decisions/`.
"""

import functools
import importlib.metadata
import inspect
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fr3e_jax.config import PACKAGE, ConfigError
from fr3e_jax.rewards.own import GROUP, ROW, import_task, one_line, takes_row
from fr3e_jax.rewards.rules import OWN, OWN_GROUP
from fr3e_jax.types import Problem

COMPARED = 4096  # training problems that held-out ones are compared with
RANDOM = "random"  # the parameter of solution that takes a generator of random numbers
SOLUTION_FUNCTION = "solution"


def is_own(name: str) -> bool:
    """Whether a source is a task of the user's own."""
    return name.endswith(".py") or name in importlib.metadata.entry_points(group=GROUP).names


def place_of(name: str) -> str:
    """Where a task is: the absolute path of its file, since workers may start elsewhere; or its entry point.

    A file that is not there may be one that is shipped, such as examples/roman.py.
    """
    if not name.endswith(".py"):
        return name
    shipped = PACKAGE / name
    return str(shipped if not Path(name).exists() and shipped.is_file() else Path(name).absolute())


def function(module: ModuleType, name: str, call: str, *args: Any, **keywords: Any) -> Callable[..., Any]:
    """A function of the user's module that can be called with these arguments.

    Args:
      module: the user's.
      name: of the function.
      call: how it is called, for messages.
      args, keywords: its arguments.

    Raises:
      ConfigError: there is none, or it takes other arguments.
    """
    where = module.__file__
    called = getattr(module, name, None)
    if not callable(called):
        raise ConfigError(f"{where} has no function {call}; write one")
    if takes_row(called) and name != SOLUTION_FUNCTION:
        keywords = {ROW: {}, **keywords}
    try:
        inspect.signature(called).bind(*args, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"{where}: {name}{inspect.signature(called)} cannot be called as {call} with parameters "
            f"{keywords}: {error}"
        ) from None
    return called


def module_of(name: str) -> ModuleType:
    """Import the file or module of a user's own.

    Raises:
      ConfigError: it cannot be imported.
    """
    place = place_of(name)
    try:
        return import_task(place)
    except Exception as error:
        raise ConfigError(f"{name} cannot be loaded: {one_line(error, place)}") from error


def own_scorer(name: str) -> tuple[str, bool]:
    """The scorer that a file or module of the user's own has.

    Returns:
      (its name, whether it sees the row of a problem).

    Raises:
      ConfigError: it cannot be imported, or has neither `score` nor `score_group`.
    """
    module, place = module_of(name), place_of(name)
    if hasattr(module, "score_group"):
        judge = function(module, "score_group", "score_group(responses, answer)", [""], "")
        return OWN_GROUP + place, takes_row(judge)
    judge = function(module, "score", "score(response, answer)", "", "")
    return OWN + place, takes_row(judge)


class OwnTask:
    """The problems of a user's own task."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        """Import the file or module, and ask it for the training problems.

        Raises:
          ConfigError: it cannot be imported, lacks a function, does not take the parameters, fails, or has no
            problems.
        """
        self.name, self.parameters = name, parameters
        self.place = place_of(name)
        self.module = module_of(name)
        self.file = self.module.__file__
        self.make = function(self.module, "problems", "problems(split, **parameters)", "train", **parameters)
        self.scorer, self.judged_by_row = own_scorer(name)
        self.train = self.split("train")
        first = self.problem("train", self.train, 0)
        try:
            pickle.dumps(first.facts)
        except Exception as error:
            raise ConfigError(
                f"{name}: problem 0 of train cannot be sent to a worker process, where score() is to see its "
                f"row ({one_line(error, None)}); put text, numbers, lists and dicts into rows"
            ) from error

    def split(self, split: str) -> Sequence[dict[str, Any]]:
        """The user's problems of a split.

        Raises:
          ConfigError: there are none.
        """
        try:
            rows = self.make(split, **self.parameters)
        except Exception as error:
            raise ConfigError(
                f"{self.name}: problems({split!r}) failed: {one_line(error, self.file)}"
            ) from error
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ConfigError(
                f"{self.name}: problems({split!r}) returned a {type(rows).__name__}; return a list"
            )
        if not len(rows):
            raise ConfigError(f"{self.name}: problems({split!r}) returned no problems")
        return rows

    def row(self, split: str, rows: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
        """One row of the user's, with a question and an answer.

        Raises:
          ConfigError: it cannot be had, has no question or no answer, or they are not text.
        """
        try:
            row = rows[index]
        except Exception as error:
            raise ConfigError(
                f"{self.name}: problem {index} of {split} cannot be read: {one_line(error, self.file)}"
            ) from error
        for key in ("question", "answer"):
            if not (isinstance(row, dict) and isinstance(row.get(key), str)):
                raise ConfigError(
                    f"{self.name}: problem {index} of {split} needs {key!r}, a str; it is {row!r:.120}"
                )
        return row

    def problem(self, split: str, rows: Sequence[dict[str, Any]], index: int) -> Problem:
        """One of the user's problems.

        Raises:
          ConfigError: as `row`.
        """
        row, decisions = self.row(split, rows, index), getattr(self.module, "decisions", None)
        return Problem(
            row["question"],
            row["answer"],
            self.scorer,
            self.name,
            facts=row if self.judged_by_row else None,
            place=f"{self.name}, problem {index} of {split}",
            decisions=None if decisions is None else functools.partial(decisions, row),
        )

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
        unique: dict[str, Problem] = {}
        for index in range(len(rows)):
            if len(unique) == count:
                break
            problem = self.problem("held_out", rows, index)
            if problem.question in trained:
                raise ConfigError(
                    f"{self.name}: problem {index} of held_out is problem {trained[problem.question]} of "
                    f"train too; leave it out of one of them: {problem.question[:80]!r}"
                )
            unique.setdefault(problem.question, problem)
        return list(unique.values())

    def solution(self, index: int, seed: int) -> str:
        """A worked solution of a training problem, by `solution()` or the column of that name.

        Args:
          index: of the problem.
          seed: of the random numbers that `solution` may ask for.

        Raises:
          ConfigError: there is none, or it is no text; `solution` failed.
        """
        row = self.row("train", self.train, index)
        where = f"{self.name}: the solution of problem {index} of train"
        if not hasattr(self.module, SOLUTION_FUNCTION):
            if SOLUTION_FUNCTION not in row:
                raise ConfigError(
                    f"{self.name} has no worked solutions: write a function solution(row) that returns a "
                    f"text, or give rows a {SOLUTION_FUNCTION!r}"
                )
            written = row[SOLUTION_FUNCTION]
        else:
            write = function(self.module, SOLUTION_FUNCTION, "solution(row)", row, **self.random(seed))
            keywords = self.random(seed)
            try:
                written = write(row, **keywords)
            except Exception as error:
                raise ConfigError(f"{where} failed: {one_line(error, self.file)}") from error
        if not isinstance(written, str) or not written:
            raise ConfigError(f"{where} is {written!r:.80}; it must be a text")
        return written

    def random(self, seed: int) -> dict[str, random.Random]:
        """A generator of random numbers for `solution`, where it has a parameter for one."""
        wanted = RANDOM in inspect.signature(self.module.solution).parameters
        return {RANDOM: random.Random(seed)} if wanted else {}
