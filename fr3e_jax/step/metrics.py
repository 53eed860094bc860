"""What is measured of a round and of a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.algorithm.success import solved
from fr3e_jax.cost import Cost
from fr3e_jax.types import Rollouts, StateGroups, States

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A round whose rewards are known, on the host, the same on every process."""

    base: Rollouts
    """Answers sampled from the query alone, leaves [B, R, S]."""
    base_reward: Float32[np.ndarray, "B R"]
    states: States
    rollouts: Rollouts
    """Partial rollouts, leaves [N, J x M, S], state by state."""
    reward: Float32[np.ndarray, "N J M"]
    value: Float32[np.ndarray, "N J"]
    alpha: Float32[np.ndarray, "N J"]
    advantage: Float32[np.ndarray, "N J rows"]
    """Of the rollouts, and with the estimator `edge` of the segment in the last row."""
    accepted: Bool[np.ndarray, "N J"]
    """The states that are trained on."""
    restarts: bool
    """Whether there are positions; without, the base answers are the rollouts."""
    success_at: float = 1.0
    """Least reward of an answer that is right."""
    counted: Bool[np.ndarray, "N J M"] | None = None
    """Which rollouts count; None: all."""
    base_counted: Bool[np.ndarray, "B R"] | None = None
    """Which base trajectories count; None: all."""
    trained: Bool[np.ndarray, "N J rows"] | None = None
    """What of the accepted states is trained on; None: all."""
    gathered: StateGroups | None = None
    """The accepted states, where one asks for what is trained on."""

    @property
    def counts(self) -> Bool[np.ndarray, "N J M"]:
        """Tell which partial rollouts count for values, credit and metrics: all, where there is no mask."""
        return np.ones(self.reward.shape, bool) if self.counted is None else self.counted

    @property
    def segments(self) -> bool:
        """Whether segments of base trajectories are trained on."""
        return self.advantage.shape[2] > self.reward.shape[2]

    @property
    def accepted_advantages(self) -> Float32[np.ndarray, " rollouts"]:
        """The advantages of the rollouts that are trained on."""
        m = self.reward.shape[2]
        trained = self.counts if self.trained is None else self.trained[..., :m]
        return self.advantage[..., :m][self.accepted[:, :, None] & trained]

    @property
    def right(self) -> Bool[np.ndarray, "N J M"]:
        """Which rollouts have a right answer."""
        return solved(self.reward, self.success_at)

    @property
    def valid(self) -> Bool[np.ndarray, "N J"]:
        """Which states there are."""
        return self.states.valid


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


def root_mean(states: States, value: Float32[np.ndarray, "N J"]) -> float | None:
    """Mean of V(S_0) over queries, however many trajectories of each were kept; None where none was."""
    kept = states.valid[:, 0]
    if not kept.any():
        return None
    count, total = (np.bincount(states.query[kept], weights=w) for w in (None, value[kept, 0]))
    return float((total[count > 0] / count[count > 0]).mean())


def success_rates(m: Measured) -> Float32[np.ndarray, " B"]:
    """Share of right answers from the bare query: of the base trajectories and of the rollouts of S_0.

    Those that do not count are left out; nan where none is left.
    """
    right = solved(m.base_reward, m.success_at)
    counts = np.ones(right.shape, bool) if m.base_counted is None else m.base_counted
    total, count = (x.sum(axis=1, dtype=np.float32) for x in (right & counts, counts))
    if m.restarts:
        roots = m.counts[:, 0] & m.valid[:, :1]
        for sums, x in ((total, m.right[:, 0] & roots), (count, roots)):
            np.add.at(sums, m.states.query, x.sum(axis=1, dtype=np.float32))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def of_some(x: Shaped[np.ndarray, "..."], reduce: Callable[[np.ndarray], Any]) -> Any:
    """A statistic of what some states have; None where there are none."""
    return reduce(x) if x.size else None


def identical(m: Measured) -> int:
    """States whose rollouts are the same, token by token."""
    token = m.rollouts.token.reshape(*m.reward.shape, -1)
    first = np.argmax(m.counts, axis=2)[:, :, None, None]
    same = (token == np.take_along_axis(token, first, axis=2)).all(axis=3)
    return int((m.valid & (same | ~m.counts).all(axis=2)).sum())


def position_entropy(m: Measured) -> float | None:
    """Mean entropy at the positions, nats; 0 where no trajectory has one."""
    if not m.restarts:
        return None
    entropy = m.base.entropy[m.states.query, m.states.base]
    at = np.take_along_axis(entropy, m.states.prefix_length[:, 1:], axis=1)[m.valid[:, 1:]]
    return float(at.mean()) if at.size else 0.0


def segment_share(m: Measured) -> float | None:
    """Share of the trained tokens that lie in segments of base trajectories; None where segments are not."""
    if not m.segments or m.gathered is None or not m.gathered.length.size:
        return None
    return float(m.gathered.length[:, -1].sum() / m.gathered.length.sum())


def segment_size(m: Measured) -> float | None:
    """Mean absolute advantage of the segments that are trained on; None without any."""
    if not m.segments or m.trained is None or not m.trained[..., -1].any():
        return None
    return float(np.abs(m.advantage[..., -1][m.trained[..., -1]]).mean())


def continuations(m: Measured, x: Int[np.ndarray, "N C"] | Bool[np.ndarray, "N C"]) -> Any:
    """Mean of x over the partial rollouts that there are; None where there are none, or no positions."""
    return of_some(x[m.rollouts.length > 0], np.mean) if m.restarts else None


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
            else name.startswith(("tokens/", "rows/", "flops/", "sources/"))
        )
        metrics[name] = sum(values) if counted else float(np.mean(values))
    reduce = {"ratio_max": np.max, "ratio_min": np.min, "abs_log_ratio_max": np.max}
    taken = [u for u in updates if not u["skipped"]]
    for name in taken[0] if taken else ():
        values = [u[name] for u in taken]
        metrics[f"update/{name}"] = float(reduce.get(name, np.mean)(values))
    return metrics | {"update/skipped": len(updates) - len(taken)}
