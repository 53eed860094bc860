"""Accepted states on the host: gathering, carrying over, and cutting into minibatches."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int

from fr3e_jax.types import PER_TOKEN, Queries, Rollouts, StateGroups, States


def collect(
    accepted: Bool[np.ndarray, "N J"],
    queries: Queries,
    states: States,
    rollouts: Rollouts,
    advantage: Float32[np.ndarray, "N J rows"],
    trained: Bool[np.ndarray, "N J rows"] | None = None,
    base: Rollouts | None = None,
    drawn_step: Float32[np.ndarray, "N C"] | None = None,
    base_drawn_step: Float32[np.ndarray, "B R"] | None = None,
) -> StateGroups:
    """Take the accepted states out of a round, all of it on the host.

    Args:
      accepted: which states go to the learner.
      queries: the round's queries.
      states: the round's states.
      rollouts: of J x M branches, those of a state side by side.
      advantage: of the M rollouts of a state, and of the segment behind it if there is `base`.
      trained: what is trained on, None: all. The others have length 0.
      base: base trajectories, leaves [B, R, S], whose segments are trained on, each as one more row of its
        state, the last. None: only rollouts are trained on.
      drawn_step: mean of the steps in which the tokens of each rollout were drawn; None: not known.
      base_drawn_step: of each base trajectory.
    """
    n, j = np.nonzero(accepted)
    m = rollouts.length.shape[1] // accepted.shape[1]

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, m, *x.shape[2:])[n, j]

    query, length = states.query[n], grouped(rollouts.length)
    rows = {name: grouped(getattr(rollouts, name)) for name in PER_TOKEN}
    drawn = np.full(rollouts.length.shape, np.nan, np.float32) if drawn_step is None else drawn_step
    drawn = grouped(drawn)
    if base is not None:
        start, end = states.prefix_length[n, j], segment_ends(states, base)[n, j]
        at = start[:, None] + np.arange(rollouts.token.shape[2])
        inside, at = at < end[:, None], np.minimum(at, base.token.shape[2] - 1)
        for name, x in rows.items():
            own = np.take_along_axis(getattr(base, name)[query, states.base[n]], at, axis=1)
            segment = np.where(inside, own, 0).astype(x.dtype)
            rows[name] = np.concatenate([x, segment[:, None]], axis=1)
        known = np.full(base.length.shape, np.nan, np.float32) if base_drawn_step is None else base_drawn_step
        drawn = np.concatenate([drawn, known[query, states.base[n]][:, None]], axis=1)
        length = np.concatenate([length, (end - start)[:, None]], axis=1)
    if trained is not None:
        length = np.where(trained[n, j], length, 0)
    return StateGroups(
        query=queries.token[query],
        query_length=queries.length[query],
        prefix=states.response[n],
        prefix_length=states.prefix_length[n, j],
        length=length.astype(np.int32),
        advantage=advantage[n, j],
        source=np.stack([queries.index[query], states.base[n], j], axis=1).astype(np.int32),
        drawn_step=drawn,
        **rows,
    )


def segment_ends(states: States, base: Rollouts) -> Int[np.ndarray, "N J"]:
    """Find where the segment of each state ends: at the next state that is valid, or with the trajectory.

    Args:
      states: on the host.
      base: base trajectories, leaves [B, R, S].
    """
    whole = base.length[states.query, states.base][:, None]
    position = np.where(states.valid, states.prefix_length, whole)
    # Positions ascend, so that the next one is the least of those behind.
    behind = np.concatenate([position[:, 1:], whole], axis=1)
    return np.minimum.accumulate(behind[:, ::-1], axis=1)[:, ::-1]


def empty_groups(rows: int, max_prompt: int, max_response: int) -> StateGroups:
    """Make groups of 0 states, of the shapes of a run; `rows` of a state, as `rows_of_state` counts them."""
    return StateGroups(
        query=np.zeros((0, max_prompt), np.int32),
        query_length=np.zeros((0,), np.int32),
        prefix=np.zeros((0, max_response), np.int32),
        prefix_length=np.zeros((0,), np.int32),
        token=np.zeros((0, rows, max_response), np.int32),
        logprob=np.zeros((0, rows, max_response), np.float32),
        length=np.zeros((0, rows), np.int32),
        advantage=np.zeros((0, rows), np.float32),
        source=np.zeros((0, 3), np.int32),
        sampled_logprob=np.zeros((0, rows, max_response), np.float32),
        entropy=np.zeros((0, rows, max_response), np.float32),
        drawn_step=np.zeros((0, rows), np.float32),
    )


def count(groups: StateGroups) -> int:
    """Count the states."""
    return int(groups.query_length.shape[0])


def staleness(groups: StateGroups, step: int) -> float | None:
    """Mean number of steps between the draw of a token and its training in `step`; None where not known."""
    if groups.drawn_step is None:
        return None
    known = np.where(np.isnan(groups.drawn_step), 0, groups.length)
    total = float(known.sum())
    return float((known * (step - np.nan_to_num(groups.drawn_step))).sum() / total) if total else None


def concatenate(first: StateGroups, second: StateGroups) -> StateGroups:
    """Put the states of `second` after those of `first`."""
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)


def split(groups: StateGroups, at: int) -> tuple[StateGroups, StateGroups]:
    """Divide into the first `at` states and the others; a group is never cut in two."""
    return jax.tree.map(lambda x: x[:at], groups), jax.tree.map(lambda x: x[at:], groups)


def minibatches(groups: StateGroups, parts: int, rng: np.random.Generator) -> list[StateGroups]:
    """Shuffle the states and cut them into `parts` minibatches; a state's rollouts stay together.

    Where the states do not divide, the first minibatches have one more than the others.
    """
    order = np.array_split(rng.permutation(count(groups)), parts)
    return [jax.tree.map(lambda x, part=part: x[part], groups) for part in order]


LATER_FIELDS = frozenset({"sampled_logprob", "entropy", "drawn_step"})
"""Arrays that the checkpoints of earlier versions do not have."""


def as_dict(groups: StateGroups) -> dict[str, np.ndarray]:
    """Make a dict of field names and arrays for a checkpoint, without fields that are None.

    Arrays are padded by one state, since a checkpoint refuses arrays without elements.
    """
    fields = {f.name: getattr(groups, f.name) for f in dataclasses.fields(groups)}
    return {k: np.pad(v, [(0, 1)] + [(0, 0)] * (v.ndim - 1)) for k, v in fields.items() if v is not None}


def from_dict(fields: dict[str, np.ndarray]) -> StateGroups:
    """Make groups of the dict that `as_dict` made, of an earlier version too.

    That version drew tokens as now, and had no option that looks at their entropies.
    """
    earlier = {
        "sampled_logprob": fields["logprob"],
        "entropy": np.zeros_like(fields["logprob"]),
        "drawn_step": np.full_like(fields["advantage"], np.nan),
    }
    return StateGroups(**{k: np.asarray(v)[:-1] for k, v in {**earlier, **fields}.items()})
