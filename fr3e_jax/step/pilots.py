"""Pilot rollouts: what the two likeliest tokens at a candidate make of the answer."""

import dataclasses
import functools

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int32

from fr3e_jax.algorithm.information import PILOT_TOKENS, mutual_information, spread_scores
from fr3e_jax.algorithm.success import solved
from fr3e_jax.config import Config
from fr3e_jax.cost import Cost, rollout_cost
from fr3e_jax.engine.finite import require_finite
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Params
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.run.build import Parts, sampling_of
from fr3e_jax.run.queries import pilot_rollouts, pilot_states
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.judged import Judged
from fr3e_jax.step.stages import Draws, find_states
from fr3e_jax.types import AnyArray, States


@dataclasses.dataclass(frozen=True)
class Explored:
    """Judged queries whose trajectories to explore are chosen.

    value: V(root) of the queries, where explore.adaptive. kept: which trajectories, on the host. caches: of
    the kept trajectories.
    """

    judged: Judged
    value: Float32[np.ndarray, " B"] | None
    kept: Bool[np.ndarray, "B R"]
    caches: Segment


def sample_pilots(
    config: Config, parts: Parts, params: Params, draws: Draws, explored: Explored, watch: Stopwatch
) -> tuple[Float32[Array, "N S"], Cost]:
    """Stage 5 of the rule mutual_information: estimate what each candidate tells about the reward.

    The caches of the kept trajectories stay. Pilots are drawn with the keys of choices, so that no other
    token depends on how many there are.

    Returns:
      (I(y_t; r) at the candidates, nats, and -inf elsewhere, on the devices; what it cost).

    Raises:
      NotFiniteError: tokens were drawn from logits that are not finite.
    """
    engine, count, judged = parts.engine, config.explore.pilots, explored.judged
    candidates, placed = find_candidates(config, parts, draws, explored)
    with watch.stage("pilots"):
        pilots, row_steps = engine.explore(
            params,
            judged.placed,
            placed,
            seed_key=draws.choices,
            step=draws.step,
            rollouts=pilot_rollouts(config.explore),
            sampling=sampling_of(config.rollout),
            after=config.rollout.base_trajectories,
            caches=explored.caches,
            ranks=tuple(rank for rank in PILOT_TOKENS for _ in range(count)),
        )
        pilots = gather(pilots)
    require_finite(pilots, "pilot rollouts")
    cost = rollout_cost(parts.policy.model.config, judged.queries, pilots, int(row_steps), candidates)
    with watch.stage("verify"):
        reward = parts.verifier.whole(candidates, pilots, judged.problems)()
    by_token = (*candidates.valid.shape, len(PILOT_TOKENS), count)
    right = solved(reward, config.reward.success_at).reshape(by_token)
    logprob = pilots.logprob[:, :, 0].reshape(by_token)[..., 0]
    rows = engine.placement.place_rows((right.mean(axis=-1, dtype=np.float32), logprob))
    size = judged.base.token.shape[2]
    where = (placed.prefix_length, placed.valid)
    return compiled_information(engine.placement.mesh, size, *rows, *where), cost


def find_candidates(config: Config, parts: Parts, draws: Draws, explored: Explored) -> tuple[States, States]:
    """Find the 4 K most uncertain tokens of each kept trajectory, explore.min_gap apart.

    Returns:
      (states before each of them, without the root, on the host; the same on the devices).
    """
    rules = dataclasses.replace(config.explore, rule="entropy", positions=pilot_states(config.explore))
    judged = explored.judged
    states = find_states(
        rules,
        parts.engine,
        draws,
        judged.queries,
        judged.base,
        explored.kept,
        judged.sampled,
        explored.value,
    )
    return without_root(states[0]), jax.jit(without_root)(states[1])


def without_root(states: States) -> States:
    """Leave the first state of each trajectory out, and how many rollouts are drawn."""
    prefix_length, valid = states.prefix_length[:, 1:], states.valid[:, 1:]
    return dataclasses.replace(states, prefix_length=prefix_length, valid=valid, rollouts=None)


@functools.partial(jax.jit, static_argnames=("mesh", "size"))
def compiled_information(
    mesh: Mesh,
    size: int,
    rate: Float32[AnyArray, "N C 2"],
    logprob: Float32[AnyArray, "N C 2"],
    position: Int32[AnyArray, "N C"],
    valid: Bool[AnyArray, "N C"],
) -> Float32[Array, "N S"]:
    """Compute I of candidates, spread over the `size` tokens of their trajectories; -inf elsewhere."""
    told = spread_scores(mutual_information(rate, logprob), position, valid, size)
    return Placement(mesh).shard(told, "batch")
