"""What is measured of a round and of a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.cost import Cost
from fr3e_jax.step.measured import (
    Measured,
    accepted_depth,
    continuations,
    entropy_elsewhere,
    fork_disagreement,
    identical,
    of_some,
    position_distance,
    position_entropy,
    root_mean,
    segment_share,
    segment_size,
)

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a round, or None where the round has none, and what it says.

    help: what the number is. counted: whether a step has the sum over its rounds, and not the mean. unit: of
    the number. over: what it is an average or a count of. watch: which values are a good or a bad sign.
    """

    function: Callable[[Measured], Any]
    help: str
    counted: bool = False
    unit: str = ""
    over: str = ""
    watch: str = ""


BASE, STATES, ACCEPTED, PARTIAL = "base trajectories", "all states", "accepted states", "partial rollouts"

METRICS: dict[str, Metric] = {
    "reward/base_mean": Metric(
        lambda m: m.base_reward.mean(),
        "reward",
        unit="0 to 1",
        over=BASE,
        watch="rises as the model learns; at 0 or 1 no state carries a gradient",
    ),
    "entropy/mean": Metric(
        lambda m: m.base.entropy.sum() / max(int(m.base.length.sum()), 1),
        "entropy of the policy at a token",
        unit="nats",
        over="tokens of the base trajectories",
        watch="a fall towards 0 ends exploration; a steady rise is a policy that falls apart",
    ),
    "response/length": Metric(
        lambda m: m.base.length.mean(), "length of an answer", unit="tokens", over=BASE
    ),
    "response/cut": Metric(
        lambda m: 1.0 - m.base.stopped.mean(),
        "share that rollout.max_response cut off",
        unit="share",
        over=BASE,
        watch="much above 0: the limit is too short, or the answers do not end",
    ),
    "modulation/mean": Metric(
        lambda m: of_some(m.alpha[m.valid], np.mean),
        "factor alpha_j of the advantages",
        unit="factor",
        over=STATES,
        watch="below 1: values rise from state to state",
    ),
    "value/accepted_mean": Metric(
        lambda m: of_some(m.value[m.accepted], np.mean), "value V(S_j)", unit="0 to 1", over=ACCEPTED
    ),
    "value/accepted_std": Metric(
        lambda m: of_some(m.value[m.accepted], np.std),
        "standard deviation of the values V(S_j)",
        unit="0 to 1",
        over=ACCEPTED,
        watch="at 0 all states are as hard as each other",
    ),
    "advantage/accepted_mean": Metric(
        lambda m: of_some(m.accepted_advantages, np.mean),
        "advantage",
        over="rollouts of accepted states",
    ),
    "advantage/accepted_std": Metric(
        lambda m: of_some(m.accepted_advantages, np.std),
        "standard deviation of the advantages",
        over="rollouts of accepted states",
    ),
    "segments/token_share": Metric(
        segment_share,
        "share that segments of base trajectories are, where credit.estimator is edge",
        unit="share",
        over="trained tokens",
    ),
    "segments/advantage": Metric(
        segment_size,
        "absolute advantage of a segment of a base trajectory",
        over="trained segments",
        watch="at 0 the states of a trajectory are worth the same: positions are not where it is decided",
    ),
    "reward/root_mean": Metric(
        lambda m: root_mean(m.states, m.value),
        "value V(S_0), the mean reward from the bare query",
        unit="0 to 1",
        over="queries with a kept trajectory",
        watch="rises as the model learns",
    ),
    "value/mean": Metric(
        lambda m: of_some(m.value[m.valid], np.mean), "value V(S_j)", unit="0 to 1", over=STATES
    ),
    "states/accepted": Metric(
        lambda m: m.accepted.sum(), "states that are trained on", True, unit="count", over=STATES
    ),
    "states/rejected": Metric(
        lambda m: (m.valid & ~m.accepted).sum(),
        "states that are not trained on",
        True,
        unit="count",
        over=STATES,
        watch="nearly all: the problems are too easy or too hard",
    ),
    "states/all_wrong": Metric(
        lambda m: (m.valid & ~(m.right & m.counts).any(axis=2)).sum(),
        "states whose answers are all wrong: rewards below reward.success_at",
        True,
        unit="count",
        over=STATES,
    ),
    "states/all_right": Metric(
        lambda m: (m.valid & (m.right | ~m.counts).all(axis=2)).sum(),
        "states whose answers are all right: rewards of at least reward.success_at",
        True,
        unit="count",
        over=STATES,
    ),
    "states/identical": Metric(
        identical,
        "states whose rollouts are the same, token by token",
        True,
        unit="count",
        over=STATES,
        watch="many: the sampling is too sharp",
    ),
    "entropy/positions": Metric(
        position_entropy,
        "entropy of the policy at a position",
        unit="nats",
        over="positions",
        watch="well above entropy/mean, or positions are no better than any token",
    ),
    "entropy/elsewhere": Metric(
        entropy_elsewhere,
        "entropy of the policy where no position is",
        unit="nats",
        over="tokens of kept trajectories",
        watch="as high as entropy/positions: explore.rule does not find the uncertain tokens",
    ),
    "positions/distance": Metric(
        position_distance,
        "distance to the next position of the trajectory",
        unit="tokens",
        over="positions with a next one",
        watch="near 1: positions lie side by side, and explore.min_gap parts them",
    ),
    "forks/disagree": Metric(
        fork_disagreement,
        "share whose continuations are right and wrong",
        unit="share",
        over="states at positions",
        watch="near 0: what follows a position no longer decides the answer",
    ),
    "states/depth": Metric(
        accepted_depth,
        "share of the base trajectory before the state, 0 for the bare query",
        unit="share",
        over=ACCEPTED,
    ),
    "response/continuation": Metric(
        lambda m: continuations(m, m.rollouts.length),
        "length of a continuation",
        unit="tokens",
        over=PARTIAL,
    ),
    "response/continuation_cut": Metric(
        lambda m: continuations(m, ~m.rollouts.stopped),
        "share that rollout.max_response cut off",
        unit="share",
        over=PARTIAL,
    ),
}
"""What is measured of every round: name -> its function, and what it says."""


def measure(measured: Measured) -> Metrics:
    """The metrics of a round.

    Raises:
      RuleError: one of them gives no number.
    """
    metrics: Metrics = {}
    for name, metric in METRICS.items():
        number = metric.function(measured)
        if number is None:
            continue
        if np.ndim(number) or not np.issubdtype(np.asarray(number).dtype, np.number):
            raise RuleError(f"the metric {name} gave {number!r:.80}; it must be a number, or None")
        metrics[name] = int(number) if metric.counted else float(number)
    return metrics


def cost_metrics(costs: dict[str, Cost]) -> Metrics:
    """Counts of all stages together, and FLOPs of each."""
    total: Metrics = {f"flops/{stage}": cost["flops"] for stage, cost in costs.items()}
    for cost in costs.values():
        for name, value in cost.items():
            if name == "flops":
                continue
            total[name] = total.get(name, 0) + int(value)
    return total


def summarize_step(rounds: list[Metrics], updates: list[Metrics]) -> Metrics:
    """One number per metric: counts are added up, the rest averaged over the rounds that have them.

    A step that the carried states fill has no rounds, and none of their metrics. Of skipped updates only the
    number is told.
    """
    metrics: Metrics = {}
    for name in dict.fromkeys(name for r in rounds for name in r):
        values = [r[name] for r in rounds if name in r]
        counted = (
            METRICS[name].counted
            if name in METRICS
            else name.startswith(("tokens/", "rows/", "rollouts/", "flops/", "sources/"))
        )
        metrics[name] = sum(values) if counted else float(np.mean(values))
    reduce = {"ratio_max": np.max, "ratio_min": np.min, "abs_log_ratio_max": np.max}
    taken = [u for u in updates if not u["skipped"]]
    for name in taken[0] if taken else ():
        values = [u[name] for u in taken]
        metrics[f"update/{name}"] = float(reduce.get(name, np.mean)(values))
    return metrics | {"update/skipped": len(updates) - len(taken)}
