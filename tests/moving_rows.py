"""Rounds in which rows move and wait for memory, and a record of it."""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from decoding import FILTERED, GRAPH, MAX_NEW, MAX_PROMPT, PARAMS, SEED_KEY, STEP
from hypothesis import strategies as st
from support import TINY, placement

from fr3e_jax.engine.budget import least_bytes, page_bytes
from fr3e_jax.engine.pages import PageSizes
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.schedule import Schedule
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Queries, States

SMALL_PAGES = PageSizes(rows=2, slots=4, spans=(1, 2), context=16, fixed=3)


class Done(NamedTuple):
    """What was done before the legs of a decoding: rows of pages copied, blocks set aside and taken up."""

    copied: int
    aside: int
    back: int


@contextlib.contextmanager
def noted():
    """Note what is done while rows are decoded: a list of `Done`, one a leg."""
    done, following = [], Schedule.next

    def noting(self):
        turn = following(self)
        done.append(Done(turn.copies.shape[1], len(turn.aside), len(turn.back)))
        return turn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "next", noting)
        yield done


def total(done):
    """`Done` over all legs."""
    return Done(*map(sum, zip(*done, strict=True)))


def with_pages(engine, shape, slots, more):
    """The engine with memory for so many pages more than one block may need.

    Args:
      shape: N trajectories and C branches of each. slots: of what the branches of a trajectory share.
    """
    room = engine.room_for(TINY, shape, slots, np.float32)
    least = least_bytes(TINY, engine.placement, room, slots, np.float32)
    one = page_bytes(TINY, engine.placement, room, np.float32)
    return dataclasses.replace(engine, cache_bytes=least + more * one)


N, J = 2, 9  # trajectories, and the root with up to 8 positions; one rollout of each
MANY_ENDS = (3, 11, 20)


@functools.cache
def engine_of(ends):
    """In blocks and pages that are small enough for rows to move."""
    return Engine(GRAPH, placement(table=SAMPLING_TABLE), MAX_NEW, ends, sizes=SMALL_PAGES)


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
    """Base trajectories of two queries."""
    return jax.device_get(e.sample(PARAMS, e.placement.place_rows(q), SEED_KEY, STEP, 2, FILTERED)[0])
