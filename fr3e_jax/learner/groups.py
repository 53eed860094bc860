"""Accepted states on the host: gathering, carrying over, and cutting into minibatches."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float32

from fr3e_jax.types import Queries, Rollouts, StateGroups, States


def collect(
    accepted: Bool[np.ndarray, "N J"],
    queries: Queries,
    states: States,
    rollouts: Rollouts,
    advantage: Float32[np.ndarray, "N J M"],
    counted: Bool[np.ndarray, "N J M"] | None = None,
) -> StateGroups:
    """Take the accepted states out of a round, all of it on the host.

    Args:
      accepted: which states go to the learner.
      queries: the round's queries.
      states: the round's states.
      rollouts: of J x M branches, those of a state side by side.
      advantage: modulated.
      counted: which rollouts count, None: all. The others have length 0: nothing of them is trained on.
    """
    n, j = np.nonzero(accepted)
    m = advantage.shape[2]

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, m, *x.shape[2:])[n, j]

    query, length = states.query[n], grouped(rollouts.length)
    if counted is not None:
        length = np.where(counted[n, j], length, 0).astype(np.int32)
    return StateGroups(
        query=queries.token[query],
        query_length=queries.length[query],
        prefix=states.response[n],
        prefix_length=states.prefix_length[n, j],
        token=grouped(rollouts.token),
        logprob=grouped(rollouts.logprob),
        length=length,
        advantage=advantage[n, j],
        source=np.stack([queries.index[query], states.base[n], j], axis=1).astype(np.int32),
        sampled_logprob=grouped(rollouts.sampled_logprob),
        entropy=grouped(rollouts.entropy),
    )


def empty_groups(rollouts: int, max_prompt: int, max_response: int) -> StateGroups:
    """Make groups of 0 states, of the shapes of a run."""
    return StateGroups(
        query=np.zeros((0, max_prompt), np.int32),
        query_length=np.zeros((0,), np.int32),
        prefix=np.zeros((0, max_response), np.int32),
        prefix_length=np.zeros((0,), np.int32),
        token=np.zeros((0, rollouts, max_response), np.int32),
        logprob=np.zeros((0, rollouts, max_response), np.float32),
        length=np.zeros((0, rollouts), np.int32),
        advantage=np.zeros((0, rollouts), np.float32),
        source=np.zeros((0, 3), np.int32),
        sampled_logprob=np.zeros((0, rollouts, max_response), np.float32),
        entropy=np.zeros((0, rollouts, max_response), np.float32),
    )


def count(groups: StateGroups) -> int:
    """Count the states."""
    return int(groups.query_length.shape[0])


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


LATER_FIELDS = frozenset({"sampled_logprob", "entropy"})
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
    earlier = {"sampled_logprob": fields["logprob"], "entropy": np.zeros_like(fields["logprob"])}
    return StateGroups(**{k: np.asarray(v)[:-1] for k, v in {**earlier, **fields}.items()})
