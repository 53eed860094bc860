"""The stages of the library between sampling and updating: states, rewards, groups."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32

from fr3e_jax.algorithm.keep import KeepRule
from fr3e_jax.algorithm.positions import PositionRule
from fr3e_jax.algorithm.reject import trained_rows
from fr3e_jax.algorithm.values import counted_states
from fr3e_jax.config import ConfigError, ExploreConfig, check_options, rule_needs
from fr3e_jax.learner.groups import collect
from fr3e_jax.library.results import Answers, Base, Restarts, shaped
from fr3e_jax.parallel.hosts import gather
from fr3e_jax.step.measures import kept_rows, measure_trajectories, needs_caches
from fr3e_jax.step.stages import draws_of, find_states, keep
from fr3e_jax.types import Rollouts, StateGroups


def states(
    base: Base,
    rule: PositionRule = "entropy",
    count: int = 4,
    min_gap: int = 0,
    reward: Any = None,
    keep_rule: KeepRule = "all",
) -> Restarts:
    """Where to restart: the query, and before each of `count` positions of the base trajectories.

    Args:
      base: what was sampled.
      rule: what makes a position, as explore.rule, or a function.
      count: K, positions of a trajectory.
      min_gap: least distance of two, tokens.
      reward: float32 [B, R] of the base trajectories, where `keep_rule` is not `all`.
      keep_rule: which trajectories are kept, as explore.keep, or a function.

    Raises:
      ConfigError: a rule needs rewards and there are none, or their shape is another; or `count` or `min_gap`
        is below 0; or the rule needs pilot rollouts.
      RuleError: there is no rule of a name, or its function gives something else than it must.
    """
    check_options(ExploreConfig(positions=count, min_gap=min_gap))
    rules = ExploreConfig(positions=count, rule=rule, min_gap=min_gap, keep=keep_rule)
    rollouts, asked = base.rollouts, len(base.encoded.questions)
    b, r = rollouts.length.shape
    if reward is None and keep_rule != "all":
        raise ConfigError(f"keep_rule {keep_rule} chooses by reward; give reward, float32 [{asked}, {r}]")
    engine, rewards = base.engine.engine, np.zeros((b, r), np.float32)
    if reward is not None:
        shaped("reward", reward, (asked, r))
        rewards[:asked] = reward
    place = engine.placement
    draws, queries = draws_of(base.seed, base.step, place), base.encoded.queries
    kept = gather(keep(rules, draws, *place.place_rows((queries.index, rewards))))
    kept = kept & (np.arange(b) < asked)[:, None]
    sampled, needs, model = place.place_rows(rollouts), rule_needs(rules), base.engine.model
    if "information" in needs:
        raise ConfigError("this rule needs rewards of pilot rollouts, which training alone samples")
    measures, caches = None, None
    if needs:
        rows, placed = kept_rows(engine, rollouts, kept), place.place_rows(queries)
        if needs_caches(needs):
            caches = engine.prefill_trajectories(model.params, placed, rows)
        measures = measure_trajectories(
            needs, engine, model.params, placed, rows, caches, rollouts, kept, model.text
        )
    found, _ = find_states(rules, engine, draws, queries, rollouts, kept, sampled, measures=measures)
    return Restarts(base, found)


def judge(answers: Answers, verifier: Callable[[str, str], float]) -> Float32[np.ndarray, "N J M"]:
    """Rewards of whole answers, 0 where there is no state.

    Args:
      answers: as `Model.texts` makes them.
      verifier: of a question and an answer to it; its value is the reward, in [0, 1].
    """
    reward = np.zeros((len(answers.text), len(answers.text[0]), answers.rollouts), np.float32)
    for n, (question, row) in enumerate(zip(answers.question, answers.text, strict=True)):
        for j, texts in enumerate(row):
            if texts is not None:
                reward[n, j] = [float(verifier(question, text)) for text in texts]
    return reward


def groups(states: Restarts, rollouts: Rollouts, advantage: Any, counted: Any = None) -> StateGroups:
    """The states that carry a gradient, with their rollouts, for the learner.

    Args:
      states: where the rollouts restarted.
      rollouts: leaves [N, J x M, S].
      advantage: float32 [N, J, M], or [N, J, M + 1] with those of the segments of the base trajectories (the
        estimator `edge`); a state whose advantages are all 0 is left out.
      counted: bool [N, J, M], which rollouts count; None: all. Nothing of the others is trained on.
    """
    (n, j), advantage = states.valid.shape, np.asarray(advantage)
    m, rows = rollouts.length.shape[1] // j, advantage.shape[-1] if advantage.ndim else 0
    edges = rows == m + 1
    shaped("advantage", advantage, (n, j, rows if edges else m))
    trained = None
    if counted is not None:
        shaped("counted", counted, (n, j, m))
        trained = np.asarray(counted)
    valid = counted_states(states.valid, trained)
    arrays, base = dataclasses.replace(states.arrays, valid=valid), None
    if edges:
        mixed = valid & np.any(advantage[..., :m] != 0, axis=2)
        every = np.ones((n, j, m), bool) if trained is None else trained
        base, trained = states.base.rollouts, np.asarray(trained_rows(mixed, advantage, valid, every))
    accepted = valid & np.any(advantage != 0, axis=2)
    return collect(accepted, states.base.encoded.queries, arrays, rollouts, advantage, trained, base)
