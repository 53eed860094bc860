"""How well the value of a state is known: V(S_j) by M rollouts against many more of the same frozen policy.

The states are those of the first rounds of a run, before its first update. From each of them many rollouts
are drawn, cut into blocks of M, and each block is one estimate of V(S_j). A run would train on the state if
the rewards of the block are not all equal.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from fr3e_jax.config import Config, resolve
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.build import Parts, build, mesh_of
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.rounds import open_round
from fr3e_jax.study.results import short
from fr3e_jax.study.settings import ValuesConfig


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """What M rollouts say of a state's value; means over states and blocks.

    M: rollouts of a block. states: number of them. variance: of V(S_j) between the blocks of a state.
    binomial: the variance that independent rollouts have, V (1 - V) / M. bias: V(S_j) by the first M rollouts
    less V by all others. accepted: share of blocks whose rewards are not all equal. missed: share of blocks
    with equal rewards among those of states whose rewards differ somewhere. accepted_error: absolute
    difference between V(S_j) of an accepted block and V by all others. tokens: that a block takes.
    """

    M: int
    states: int
    variance: float
    binomial: float
    bias: float
    accepted: float
    missed: float
    accepted_error: float
    tokens: float


def block_statistics(
    reward: Float[np.ndarray, "states rollouts"], tokens: Int[np.ndarray, "states rollouts"], m: int
) -> BlockStatistics:
    """Compute what blocks of M rollouts say of the values of states.

    Args:
      reward: of each rollout, 0 to 1, in the order in which they are drawn.
      tokens: that it has.
      m: M, at most half of the rollouts; those behind the last whole block count for V alone.
    """
    states, count = reward.shape
    whole = count // m * m
    blocks = reward[:, :whole].reshape(states, -1, m)
    estimate = blocks.mean(axis=2)
    others = (reward.sum(axis=1, keepdims=True) - blocks.sum(axis=2)) / (count - m)
    mixed: Bool[np.ndarray, "states blocks"] = np.ptp(blocks, axis=2) > 0
    open_states = np.ptp(reward, axis=1) > 0
    value = reward.mean(axis=1)
    spread = reward.var(axis=1, ddof=1) if count > 1 else value * 0
    return BlockStatistics(
        M=m,
        states=states,
        variance=float(estimate.var(axis=1, ddof=1).mean()),
        binomial=float(spread.mean() / m),
        bias=float((estimate[:, 0] - others[:, 0]).mean()),
        accepted=float(mixed.mean()),
        missed=float(1 - mixed[open_states].mean()) if open_states.any() else 0.0,
        accepted_error=float(np.abs(estimate - others)[mixed].mean()) if mixed.any() else 0.0,
        tokens=float(tokens.mean() * m),
    )


def rounded_statistics(measured: BlockStatistics) -> dict[str, float]:
    """Name -> number, with the digits of a results file, without M."""
    return {name: short(value) for name, value in dataclasses.asdict(measured).items() if name != "M"}


def rewards_of_states(
    config: Config, values: ValuesConfig
) -> tuple[Float[np.ndarray, "states rollouts"], Int[np.ndarray, "states rollouts"]]:
    """Draw many rollouts from every state of the first rounds of a run, under its starting model.

    Args:
      config: of the run.
      values: how many rollouts, rounds and queries.

    Returns:
      (rewards, tokens).

    Raises:
      ConfigError, PlacementError, CheckpointError: what cannot run.
    """
    explore = dataclasses.replace(config.explore, rollouts=values.rollouts)
    rollout = dataclasses.replace(config.rollout, queries=values.queries)
    config = resolve(dataclasses.replace(config, explore=explore, rollout=rollout))
    rewards, tokens = [], []
    with built_parts(config) as parts:
        params = parts.policy.sampling_params(parts.policy.fresh_state(parts.learner).params)
        position, watch = 0, Stopwatch()
        for _ in range(values.rounds):
            opened = open_round(config, parts, params, 1, position, watch)
            reward, valid, position = opened.rewards(), opened.states.valid, opened.following
            rewards.append(reward[valid])
            tokens.append(opened.rollouts.length.reshape(reward.shape)[valid])
    return np.concatenate(rewards), np.concatenate(tokens)


@contextlib.contextmanager
def built_parts(config: Config) -> Iterator[Parts]:
    """Make the parts of a run, whose scoring processes end with the block."""
    parts = build(config, Hosts(mesh_of(config.mesh), config.distributed.timeout))
    try:
        yield parts
    finally:
        parts.verifier.pool.close()
