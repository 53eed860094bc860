"""Scorers by the names that problems give them."""

import functools
import importlib

from fr3e_jax.rewards.verdict import GroupScorer, Scorer

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
"""Begins the name of the scorer of a user's own task, before its place. It runs in worker processes too."""

OWN_GROUP = "own_group:"
"""Begins the name of a scorer of the user's that judges all answers of a group at once."""


BOUND = ("carry_addition", "word_addition", "gym", "form")
"""Those that judge the answers of one task, or no answers: no source can name them."""


def named_scorers() -> list[str]:
    """The scorers that a source of problems can name."""
    return [name for name in INLINE | ISOLATED if name not in BOUND]


def judges_groups(name: str) -> bool:
    """Whether the scorer of a name is a `GroupScorer`."""
    return name.startswith(OWN_GROUP)


def scorer_of(name: str) -> Scorer | GroupScorer:
    """The scorer of a name; its module is imported only now.

    Raises:
      ValueError: there is none of this name.
      ScorerError: a task of the user's own cannot be loaded.
    """
    if name.startswith((OWN, OWN_GROUP)):
        own = importlib.import_module("fr3e_jax.rewards.own")
        kind, _, place = name.partition(":")
        return own.group_scorer(place) if f"{kind}:" == OWN_GROUP else own.scorer(place)
    places = INLINE | ISOLATED
    if name not in places:
        raise ValueError(f"there is no scorer {name!r}; choose one of {', '.join(sorted(places))}")
    scorer = places[name]
    return imported(scorer) if isinstance(scorer, str) else scorer


@functools.cache
def imported(place: str) -> Scorer:
    """The scorer at a place, `module.function` here."""
    module, _, function = place.partition(".")
    return getattr(importlib.import_module(f"fr3e_jax.rewards.{module}"), function)
