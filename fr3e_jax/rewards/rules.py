"""Scorers by the names that problems give them."""

import functools
import importlib

from fr3e_jax.rewards.verdict import Scorer

INLINE: dict[str, str | Scorer] = {
    "carry_addition": "additions.carry_addition",
    "word_addition": "additions.word_addition",
    "exact": "plain.exact",
    "numeric": "plain.numeric",
    "choice": "plain.choice",
}
"""Those that compare text, in time linear in it: they run where they are asked for. Each is `module.function`
here, or a function."""

ISOLATED: dict[str, str | Scorer] = {
    "math": "mathematics.score",
    "gym": "gym.score",
    "form": "form.score",
}
"""Those that may take long or never end, or come from elsewhere: they run in worker processes."""

OWN = "own:"
"""Before the place of a task of the user's own, whose scorer is isolated too."""


BOUND = ("carry_addition", "word_addition", "gym", "form")
"""Those that judge the answers of one task, or no answers: no source can name them."""


def named_scorers() -> list[str]:
    """The scorers that a source of problems can name."""
    return [name for name in INLINE | ISOLATED if name not in BOUND]


def scorer_of(name: str) -> Scorer:
    """The scorer of a name; its module is imported only now.

    Raises:
      ValueError: there is none of this name.
      ScorerError: a task of the user's own cannot be loaded.
    """
    if name.startswith(OWN):
        return importlib.import_module("fr3e_jax.rewards.own").scorer(name.removeprefix(OWN))
    places = INLINE | ISOLATED
    if name not in places:
        raise ValueError(f"there is no scorer {name!r}; choose one of {', '.join(sorted(places))}")
    place = places[name]
    if not isinstance(place, str):
        return place
    return imported(place)


@functools.cache
def imported(place: str) -> Scorer:
    """The scorer at a place, `module.function` here."""
    module, _, function = place.partition(".")
    return getattr(importlib.import_module(f"fr3e_jax.rewards.{module}"), function)
