"""Rounds in which rows move and caches grow, and a record of it."""

import contextlib
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from decoding import FILTERED, GRAPH, MAX_NEW, MAX_PROMPT, PARAMS, SEED_KEY, STEP
from hypothesis import strategies as st
from support import TINY, placement

from fr3e_jax.engine import rollout, seats
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Queries, States


class Moved(NamedTuple):
    """A step of the engine's loop: rows of a part and slots of each, before and after."""

    before: tuple[int, int]
    after: tuple[int, int]
    full: bool

    @property
    def kind(self):
        if self.before == self.after:
            return "stays"
        if self.after[0] == self.before[0]:
            return "grows"
        return "divided anew because full" if self.full else "divided anew"


@contextlib.contextmanager
def small_ladder(slots=9, step_down=0.5, fewest=3):
    """Rows that move at the sizes of tests, and a list of how they did.

    slots: to begin with. Others: what the ladder has as constants.
    """
    moved, following = [], seats.Ladder.next

    def noting(self, running, rows, slots, full):
        after = following(self, running, rows, slots, full)
        moved.append(Moved((rows, slots), after, full))
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seats, "FEWEST_ROWS", fewest)
        patch.setattr(seats, "STEP_DOWN", step_down)
        patch.setattr(rollout, "first_slots", lambda max_new: slots)
        patch.setattr(seats.Ladder, "next", noting)
        yield moved


N, J = 2, 9  # trajectories, and the root with up to 8 positions; one rollout of each
MANY_ENDS = (3, 11, 20)


@functools.cache
def engine_of(ends):
    """With its programs, which have the constants of `small_ladder` in them where it is used with that."""
    return Engine(GRAPH, placement(table=SAMPLING_TABLE), MAX_NEW, ends)


@st.composite
def rounds(draw):
    """Two queries of any length, and how to choose states of two trajectories of either.

    (queries, [(query, base, [where], ...)]), where being of the base trajectory: a part of it, the root,
    position 1, its last token or all of it.
    """
    length = np.array([draw(st.integers(1, MAX_PROMPT)) for _ in range(2)], np.int32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    token = rng.integers(0, TINY.vocab_size, (2, MAX_PROMPT)).astype(np.int32)
    token = np.where(np.arange(MAX_PROMPT) < length[:, None], token, 0)
    index = np.array([draw(st.integers(0, 2**31 - 1)) for _ in range(2)], np.int32)
    where = st.one_of(st.sampled_from(["root", "first", "last", "all"]), st.floats(0, 1))
    many = st.one_of(st.lists(where, max_size=J), st.lists(where, min_size=J, max_size=J))
    chosen = [(draw(st.integers(0, 1)), r, draw(many)) for r in range(N)]
    return Queries(token, length, index), chosen


def states_of(chosen, base):
    """`States` from what `rounds` draws, once the base trajectories are known."""
    prefix_length, valid = np.zeros((N, J), np.int32), np.zeros((N, J), bool)
    query, trajectory = (np.array([choice[i] for choice in chosen], np.int32) for i in range(2))
    for n, (q, r, wheres) in enumerate(chosen):
        length = int(base.length[q, r])
        named = {"root": 0, "first": 1, "last": length - 1, "all": length}
        for j, where in enumerate(wheres):
            prefix_length[n, j] = named[where] if where in named else int(where * length)
            valid[n, j] = True
    return States(query, trajectory, base.token[query, trajectory], prefix_length, valid)


def return_first(e, q):
    """Base trajectories of two queries; their rows do not move, and here their caches do not grow."""
    base, caches, _ = e.first_return(PARAMS, e.placement.place_rows(q), SEED_KEY, STEP, 2, FILTERED)
    return jax.device_get(base), caches
