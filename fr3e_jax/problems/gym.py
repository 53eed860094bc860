"""Problems of reasoning-gym: made, not downloaded, and different at every index.

A question belongs to training or to evaluation by its own hash, so that no held-out question is trained on,
whatever the indexes, the seed and the parameters.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

from fr3e_jax.config import ConfigError
from fr3e_jax.rewards.gym_facts import REFUSED, GymFacts
from fr3e_jax.types import Problem

LENGTH = 2**20  # training problems
SEED_PLACES = 2 * LENGTH  # of problems made from a seed; those past the training problems stand in for them
SHARE = 8  # one question of so many is held out
TRIES = 64  # problems that are made, at most, for one that is asked for
LISTED = ("acre",)  # data sets that prepare all of their problems at once
BLOCK = 50  # problems that these prepare at a time


def is_held_out(question: str) -> bool:
    """Whether a question is kept for evaluation."""
    # No CRC: it can put all questions that differ in a few digits on one side.
    return hashlib.sha256(question.encode()).digest()[0] % SHARE == 0


def has_answer(entry: dict[str, Any]) -> bool:
    """Whether an answer can be right: verifiers give nothing, or everything, where the answer is empty."""
    return entry["answer"] != ""


def places(index: int) -> Iterator[int]:
    """Yield where to look for a training problem: its index, then random places, always the same."""
    far = random.Random(index)
    return itertools.chain([index], (far.randrange(LENGTH, SEED_PLACES) for _ in range(TRIES)))


def registered(name: str) -> Any:
    """The configuration class of a data set.

    Raises:
      ConfigError: reasoning-gym is not installed, or has no such data set, or it is refused.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError("reasoning-gym is not installed; pip install 'fr3e_jax[gym]'") from None
    if name in REFUSED:
        raise ConfigError(f"gym:{name} is not used: {REFUSED[name]}")
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS.keys() - REFUSED.keys())
        raise ConfigError(f"reasoning-gym has no data set {name!r}; near it: {', '.join(near) or 'none'}")
    return DATASETS[name][1]


class GymTask:
    """The problems of a data set of reasoning-gym."""

    def __init__(self, name: str, parameters: dict[str, Any], seed: int) -> None:
        """Make a problem, so that parameters that do not work are refused at once.

        Args:
          name: of the data set.
          parameters: its settings beside seed and size.
          seed: of the run; all problems are a function of it.

        Raises:
          ConfigError: there is no such data set, or it is refused; the parameters do not work.
        """
        takes = [f.name for f in dataclasses.fields(registered(name)) if f.name not in ("seed", "size")]
        if unknown := sorted(parameters.keys() - set(takes)):
            raise ConfigError(f"gym:{name} has no parameter {unknown[0]}; it takes {', '.join(takes)}")
        from reasoning_gym import create_dataset

        self.name, self.parameters = name, json.dumps(parameters)
        # A generator within may take no seed of 2^32 or more.
        self.seed = random.Random(seed).randrange(2**32 - SEED_PLACES)
        self.make = functools.partial(create_dataset, name, **parameters)
        try:
            self.whole = None if name in LISTED else self.make(seed=self.seed)
            self.entry(0)
        except Exception as error:
            raise ConfigError(
                f"gym:{name} does not work with parameters {parameters} ({' '.join(str(error).split())}); "
                f"it takes {', '.join(takes)}"
            ) from error

    def entry(self, place: int) -> dict[str, Any]:
        """A problem as reasoning-gym has it; a function of the run's seed and the place."""
        with contextlib.redirect_stdout(io.StringIO()):  # a compiler within prints its progress
            if self.whole is not None:
                return self.whole[place]
            block, number = divmod(place, BLOCK)
            return self.make(size=BLOCK, seed=self.seed + block)[number]

    def __len__(self) -> int:
        """Number of training problems; there are far more."""
        return LENGTH

    def __getitem__(self, index: int) -> Problem:
        """A training problem."""
        if not 0 <= index < LENGTH:
            raise IndexError(index)
        for place in places(index):
            entry = self.entry(place)
            if has_answer(entry) and not is_held_out(entry["question"]):
                return self.problem(entry)
        raise ConfigError(
            f"gym:{self.name} has too few different questions to train on; change its parameters"
        )

    def held_out(self, count: int) -> list[Problem]:
        """The first held-out problems that a bounded search finds, all different."""
        unique: dict[str, Problem] = {}
        for place in range(LENGTH, LENGTH + min(LENGTH, TRIES * count)):
            if len(unique) == count:
                break
            entry = self.entry(place)
            if has_answer(entry) and is_held_out(entry["question"]):
                unique.setdefault(entry["question"], self.problem(entry))
        if not unique:
            raise ConfigError(
                f"gym:{self.name} has too few different questions to hold some out; change its parameters, "
                "or set data.held_out_source"
            )
        return list(unique.values())

    def problem(self, entry: dict[str, Any]) -> Problem:
        """An entry of the data set as a problem. Where many answers are right, it may have none."""
        answer = "" if entry["answer"] is None else str(entry["answer"])
        facts = GymFacts(self.name, self.parameters, entry)
        return Problem(entry["question"], answer, "gym", f"gym:{self.name}", facts)
