"""What position rules need to know of kept trajectories beyond what sampling records."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool

from fr3e_jax.algorithm.trajectories import Measures
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.second_pass import needs_pass, second_pass
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import Params
from fr3e_jax.pretrained.text import Text
from fr3e_jax.types import Queries, Rollouts, States


def needs_caches(needs: tuple[str, ...]) -> bool:
    """Tell whether what a rule needs is found on the KV caches of the kept trajectories."""
    return needs_pass(needs) or "information" in needs


def kept_rows(engine: Engine, base: Rollouts, kept: Bool[np.ndarray, "B R"]) -> States:
    """Place the kept trajectories on the devices, as `find_states` lays them out, with no states yet.

    Args:
      engine: what sampled the trajectories.
      base: of the round, on the host, leaves [B, R, S].
      kept: which are explored.
    """
    query, trajectory, _ = engine.arrange(kept)
    nothing = np.zeros((len(query), 1), np.int32)
    states = States(query, trajectory, base.token[query, trajectory], nothing, nothing > 0)
    placed: States = engine.placement.place_rows(states)
    return placed


def measure_trajectories(
    needs: tuple[str, ...],
    engine: Engine,
    params: Params,
    queries: Queries,
    rows: States,
    caches: Segment | None,
    base: Rollouts,
    kept: Bool[np.ndarray, "B R"],
    text: Text,
) -> Measures:
    """Find out what sampling has not recorded of kept trajectories, before stage 5.

    Args:
      needs: of the rule (`rule_needs`).
      engine: what sampled the trajectories.
      params: that they were sampled with.
      queries: of the round, on the devices.
      rows, caches: of the kept trajectories; caches where the rule needs them (`needs_caches`).
      base: of the round, on the host; leaves [B, R, S].
      kept: which are explored.
      text: tokenizer, for sentences.

    Returns:
      Measures on the devices, which lie as `find_states` lays trajectories out.
    """
    query, trajectory, real = engine.arrange(kept)
    place = engine.placement.place_rows
    length = np.where(real, base.length[query, trajectory], 0).astype(np.int32)
    measures = Measures()
    if needs_pass(needs) and caches is not None:
        measures = second_pass(engine, needs, params, queries, caches, rows, place(length))
    if "sentence" in needs:
        starts = text.sentence_starts(base.token[query, trajectory], length)
        measures = dataclasses.replace(measures, sentence=place(starts))
    return jax.block_until_ready(measures)
