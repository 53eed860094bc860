"""What is measured of a round and of a step."""

from typing import Any

import numpy as np

from fr3e_jax.cost import Cost
from fr3e_jax.types import Rollouts, States

Metrics = dict[str, Any]


def round_metrics(base: Rollouts, base_reward: np.ndarray, states: States, alpha: np.ndarray) -> Metrics:
    """Metrics that a round of every algorithm has; `base` are answers sampled from the query alone."""
    tokens = int(base.length.sum())
    return {
        "reward/base_mean": float(base_reward.mean()),
        "entropy/mean": float(base.entropy.sum() / max(tokens, 1)),
        "response/length": float(base.length.mean()),
        "response/cut": float(1.0 - base.stopped.mean()),
        "modulation/mean": float(alpha[states.valid].mean()),
    }


def state_metrics(
    states: States,
    rollouts: Rollouts,
    reward: np.ndarray,
    value: np.ndarray,
    advantage: np.ndarray,
    accepted: np.ndarray,
) -> Metrics:
    """Metrics of a round's states: of all of them, and those named `accepted` of those that are trained on.

    Args:
      rollouts: on the host, [N, J x M, S] leaves, state-major.
      reward, advantage: float32 [N, J, M]. value: float32 [N, J]. accepted: bool [N, J].
    """
    valid = states.valid
    token = rollouts.token.reshape(*reward.shape, -1)
    same = (token == token[:, :, :1]).all(axis=(2, 3))
    taken = advantage[accepted]
    of_accepted = (
        {
            "value/accepted_mean": float(value[accepted].mean()),
            "advantage/accepted_mean": float(taken.mean()),
            "advantage/accepted_std": float(taken.std()),
        }
        if taken.size
        else {}
    )
    return of_accepted | {
        "reward/root_mean": root_mean(states, value),
        "value/mean": float(value[valid].mean()),
        "states/accepted": int(accepted.sum()),
        "states/rejected": int((valid & ~accepted).sum()),
        "states/all_wrong": int((valid & (reward <= 0.0).all(axis=2)).sum()),
        "states/all_right": int((valid & (reward >= 1.0).all(axis=2)).sum()),
        "states/identical": int((valid & same).sum()),
    }


def root_mean(states: States, value: np.ndarray) -> float:
    """Mean of V(S_0) over queries, however many trajectories of each were kept."""
    kept = states.valid[:, 0]
    count, total = (np.bincount(states.query[kept], weights=w) for w in (None, value[kept, 0]))
    return float((total[count > 0] / count[count > 0]).mean())


def restart_metrics(states: States, base: Rollouts, rollouts: Rollouts) -> Metrics:
    """Metrics of a round with positions: how uncertain they are, and how long the restarts go on."""
    entropy = base.entropy[states.query, states.base]
    chosen = np.take_along_axis(entropy, states.prefix_length[:, 1:], axis=1)[states.valid[:, 1:]]
    started = rollouts.length > 0
    return {
        "entropy/positions": float(chosen.mean()) if chosen.size else 0.0,
        "response/continuation": float(rollouts.length[started].mean()),
        "response/continuation_cut": float(1.0 - rollouts.stopped[started].mean()),
    }


def cost_metrics(costs: dict[str, Cost]) -> Metrics:
    """Counts of all stages together, and FLOPs of each."""
    total: Metrics = {f"flops/{stage}": cost.pop("flops") for stage, cost in costs.items()}
    for cost in costs.values():
        for name, value in cost.items():
            total[name] = total.get(name, 0) + int(value)
    return total


def summarize(rounds: list[Metrics], updates: list[Metrics]) -> Metrics:
    """One number per metric: counts are added up, the rest averaged over the rounds that have them.

    A step that the carried states fill has no rounds, and none of their metrics. Of skipped updates only the
    number is told.
    """
    metrics: Metrics = {}
    for name in dict.fromkeys(name for r in rounds for name in r):
        values = [r[name] for r in rounds if name in r]
        counted = name.startswith(("states/", "tokens/", "rows/", "flops/"))
        metrics[name] = sum(values) if counted else float(np.mean(values))
    reduce = {"ratio_max": np.max, "ratio_min": np.min, "abs_log_ratio_max": np.max}
    taken = [u for u in updates if not u["skipped"]]
    for name in taken[0] if taken else ():
        values = [u[name] for u in taken]
        metrics[f"update/{name}"] = float(reduce.get(name, np.mean)(values))
    return metrics | {"update/skipped": len(updates) - len(taken)}
