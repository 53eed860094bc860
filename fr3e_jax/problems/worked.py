"""Worked solutions, which `sft` teaches: of carry_addition, of files with a column for them, and of tasks of
the user's own.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from fr3e_jax.config import ConfigError, DataConfig
from fr3e_jax.pretrained.text import CHAT_TEMPLATES, Text
from fr3e_jax.problems.additions import CarryAddition, make_addition
from fr3e_jax.problems.corpus import chosen_tasks
from fr3e_jax.problems.overlap import normalised
from fr3e_jax.problems.own_task import OwnTask
from fr3e_jax.problems.sources import FileTask
from fr3e_jax.types import Problem

MOST_LOOKED_AT = 20_000  # problems of a task whose characters a new tokenizer gets


class Worked(Protocol):
    """Training problems with worked solutions."""

    def __len__(self) -> int:
        """Number of problems."""

    def worked(self, index: int, rng: np.random.Generator) -> tuple[Problem, str]:
        """A problem, and a solution that may be drawn at random."""

    def texts(self) -> Iterable[str]:
        """Texts that have every character of the problems, held-out ones too, and of the solutions."""


@dataclasses.dataclass(frozen=True)
class WorkedAddition:
    """Additions with the written carries of `CarryAddition.solution`."""

    task: CarryAddition

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.task)

    def worked(self, index: int, rng: np.random.Generator) -> tuple[Problem, str]:
        """A problem, and a solution that forgets carries at random."""
        problem = self.task[index]
        return problem, self.task.solution(problem, rng)

    def texts(self) -> Iterable[str]:
        """The alphabet of additions."""
        return [self.task.alphabet]


@dataclasses.dataclass(frozen=True)
class WorkedFile:
    """Rows of a file that have a solution.

    held_out: problems that are not taught.
    """

    problems: Sequence[Problem]
    held_out: Sequence[Problem]

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.problems)

    def worked(self, index: int, rng: np.random.Generator) -> tuple[Problem, str]:
        """A problem, and the solution of its row."""
        return self.problems[index], self.problems[index].solution

    def texts(self) -> Iterable[str]:
        """Questions and turns before them, answers, solutions."""
        for problem in (*self.problems, *self.held_out):
            yield from (*(text for _, text in problem.before), problem.question, problem.answer)
            yield problem.solution


@dataclasses.dataclass(frozen=True)
class WorkedOwn:
    """A user's own task with a `solution`.

    held_out: problems that are not taught.
    """

    task: OwnTask
    held_out: Sequence[Problem]

    def __len__(self) -> int:
        """Number of problems."""
        return len(self.task)

    def worked(self, index: int, rng: np.random.Generator) -> tuple[Problem, str]:
        """A problem, and what `solution` writes for it."""
        return self.task[index], self.task.solution(index, int(rng.integers(2**32)))

    def texts(self) -> Iterable[str]:
        """Questions, answers and solutions of the first problems, questions and answers of held-out ones."""
        for index in range(min(len(self), MOST_LOOKED_AT)):
            problem = self.task[index]
            yield from (problem.question, problem.answer, self.task.solution(index, index))
        for problem in self.held_out:
            yield from (problem.question, problem.answer)


@dataclasses.dataclass(frozen=True)
class WorkedProblems:
    """The worked problems of all sources of a configuration, each with its share."""

    sources: tuple[Worked, ...]
    weights: tuple[float, ...]

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[Problem, str]]:
        """Draw problems with their solutions, a function of the generator's state."""
        if len(self.sources) == 1:
            (source,) = self.sources
            return [source.worked(int(index), rng) for index in rng.integers(len(source), size=count)]
        share = np.array(self.weights) / sum(self.weights)
        chosen = rng.choice(len(self.sources), size=count, p=share).tolist()
        return [self.sources[i].worked(int(rng.integers(len(self.sources[i]))), rng) for i in chosen]

    def alphabet(self, template: str) -> str:
        """Every character that a model of these problems has to read or write, each once.

        Args:
          template: what the model sees of a question.

        Raises:
          ConfigError: the template is of a chat, for which a new model has no tokens.
        """
        if template in CHAT_TEMPLATES:
            raise ConfigError(
                f"data.template {template} is for models with a chat template, which a new one has not; use "
                "plain, a text of your own with {question} in it, or set init_path"
            )
        around = Text(None, (), template).rendered("")
        texts = (text for source in self.sources for text in source.texts())
        # In the order in which they come, which is the alphabet's own for additions.
        return "".join(dict.fromkeys(itertools.chain.from_iterable((*texts, around))))


def worked_problems(data: DataConfig, seed: int, dropped_carry: float) -> WorkedProblems:
    """The problems that a model is warmed up on: those that `train` draws from, held-out ones left out.

    Args:
      data: sources and held-out problems, as for `train`.
      seed: of the run.
      dropped_carry: the bad habit of carry_addition's solutions.

    Raises:
      ConfigError: a source cannot be had, or has no worked solutions.
    """
    chosen = chosen_tasks(data, seed, solutions=True)
    asked = {normalised(problem.asked) for problem in chosen.held_out}
    sources: list[Worked] = []
    for source, task in zip(chosen.sources, chosen.tasks, strict=True):
        if isinstance(task, CarryAddition):
            addition = make_addition(source.name, data, dropped_carry)
            assert isinstance(addition, CarryAddition)
            sources.append(WorkedAddition(addition))
        elif isinstance(task, FileTask):
            apart = [problem for problem in task.problems if normalised(problem.asked) not in asked]
            if not apart:
                raise ConfigError(f"{source.name}: no problem is left to teach; lower data.held_out")
            sources.append(WorkedFile(apart, chosen.held_out))
        elif isinstance(task, OwnTask):
            task.solution(0, 0)  # a task without solutions is refused here
            sources.append(WorkedOwn(task, chosen.held_out))
        else:
            raise ConfigError(
                f"{source.name} has no worked solutions; use carry_addition, a file with a column of "
                "solutions (data.source.solution), or a task of your own with solution()"
            )
    return WorkedProblems(tuple(sources), tuple(source.weight for source in chosen.sources))
