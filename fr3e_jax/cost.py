"""The cost of a step in tokens and FLOPs of the model, by which algorithms can be compared at equal cost.

FLOPs are those that the algorithm needs: multiplications and additions of matrix products of real tokens.
Padding, idle rows and recomputation are not counted. They show in the seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.types import AnyArray, Bundle, Queries, Rollouts, States

Cost = dict[str, float]

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""FLOP/s of dense bfloat16 matrix products by device kind, as JAX names it and its maker states them.

Names are compared whole: cards in PCIe slots and parts of a card (MIG) have names that begin alike, and are
slower."""


def pairs_of(start: Any, new: Any) -> float:
    """Count the pairs of a token and one that it attends to (itself included).

    Args:
      start: int, any shape, tokens before each sequence's new ones.
      new: int, of its shape, new tokens of each sequence.
    """
    start, new = np.asarray(start, np.float64), np.asarray(new, np.float64)
    return float((new * start + new * (new + 1) / 2).sum())


def prefill_cost(config: DecoderConfig, length: Int[np.ndarray, " B"]) -> Cost:
    """Count the cost of prefilling queries of these lengths, each once."""
    tokens = float(length.sum())
    return {"tokens/prefilled": tokens, "flops": config.forward_flops(tokens, pairs_of(0, length), 0)}


def decode_cost(
    config: DecoderConfig, prefix: Int[np.ndarray, "N C"], rollouts: Rollouts, row_steps: int
) -> Cost:
    """Count the cost of decoding branches from cached prefixes.

    Args:
      config: the architecture.
      prefix: tokens before the first that is drawn.
      rollouts: on the host.
      row_steps: rows that were decoded, idle ones too, added up over steps.
    """
    new = np.asarray(rollouts.length)
    tokens = float(new.sum())
    return {
        "tokens/generated": tokens,
        "tokens/reused": float(np.where(new > 0, prefix, 0).sum()),
        "rows/decoded": float(row_steps),
        "flops": config.forward_flops(tokens, pairs_of(prefix - 1, new), tokens),
    }


def rollout_cost(
    config: DecoderConfig, queries: Queries, rollouts: Rollouts, row_steps: int, states: States | None = None
) -> Cost:
    """Count the cost of a rollout stage: from the queries, which it prefills, or from cached trajectories.

    Args:
      config: the architecture.
      queries, rollouts: on the host.
      row_steps: rows that were decoded, added up over steps.
      states: where the rollouts started; None for the queries.

    Returns:
      tokens/generated; tokens/prefilled; tokens/reused, tokens of prefixes that were read from a KV cache and
      that each branch alone would have had to prefill; rows/decoded; flops.
    """
    if states is None:
        prefilled = prefill_cost(config, queries.length)
        prefix = np.broadcast_to(queries.length[:, None], rollouts.length.shape)
        cost = decode_cost(config, prefix, rollouts, row_steps)
        cost["flops"] += prefilled["flops"]
        cost["tokens/reused"] -= prefilled["tokens/prefilled"]  # each query once, by itself
        return cost | {"tokens/prefilled": prefilled["tokens/prefilled"]}
    count = rollouts.length.shape[1] // states.prefix_length.shape[1]
    prefix = np.repeat(queries.length[states.query][:, None] + states.prefix_length, count, axis=1)
    return decode_cost(config, prefix, rollouts, row_steps) | {"tokens/prefilled": 0.0}


def second_pass_flops(
    config: DecoderConfig,
    needs: Sequence[str],
    query: Int[AnyArray, " B"],
    response: Int[AnyArray, "B R"],
    kept: Bool[AnyArray, "B R"],
) -> float:
    """Count the FLOPs of the forward pass over kept trajectories that a position rule needs.

    Args:
      config: the architecture.
      needs: what the rule needs (`Rule.needs`).
      query, response: tokens of the queries and of their base trajectories.
      kept: which of these are explored.

    Returns:
      0 where nothing needs a pass. A gradient takes the LM head twice: the logits, and back from them.
    """
    if {"gradient", "attention"}.isdisjoint(needs):
        return 0.0
    query, response = np.broadcast_to(query[:, None], response.shape)[kept], response[kept]
    tokens = float(response.sum())
    return config.forward_flops(tokens, pairs_of(query - 1, response), 2 * tokens * ("gradient" in needs))


def update_flops(config: DecoderConfig, bundles: Sequence[Bundle]) -> float:
    """Count the FLOPs of a forward and a backward pass, which is twice the forward."""
    return 3 * forward_flops(config, bundles)


def forward_flops(config: DecoderConfig, bundles: Sequence[Bundle]) -> float:
    """Count the FLOPs of a forward pass of the learner: each trunk once, and the rows."""
    total = 0.0
    for bundle in bundles:
        if bundle.trunks is not None:
            length = np.asarray(bundle.trunks.length)
            total += config.forward_flops(float(length.sum()), pairs_of(0, length), 0)
        for rows in bundle.chunks:
            new = rows.length - 1  # the last token is only a target; 0 in rows that are padding
            trained = float((rows.length - rows.start).sum())
            total += config.forward_flops(float(new.sum()), pairs_of(rows.prefix, new), trained)
    return total


def total_flops(metrics: Mapping[str, float]) -> float:
    """Add up the FLOPs of a step: rollouts, updates and every other pass of the model.

    Args:
      metrics: of the step, `flops/STAGE` among them.
    """
    return float(
        sum(
            metrics[name]
            for name in sorted(metrics)
            if name.startswith("flops/") and not name.startswith("flops/utilisation_")
        )
    )


def utilisation(metrics: Mapping[str, float], devices: Iterable[Any]) -> Cost:
    """Compute the share of the devices' peak FLOP/s that each stage of a step used.

    The peak is that of bfloat16, whatever the type of matrix products. The time of compilation counts in the
    step that compiles.

    Args:
      metrics: of the step; `flops/STAGE`, and `time/STAGE` in seconds.
      devices: those of the mesh, of which `device_kind` is looked up.

    Returns:
      flops/utilisation_STAGE, in [0, 1]; nothing where a device's peak is not known, as on CPUs.
    """
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if len(known) < len(peaks):
        return {}
    stages = [name.removeprefix("flops/") for name in metrics if name.startswith("flops/")]
    return {
        f"flops/utilisation_{stage}": metrics[f"flops/{stage}"] / (metrics[f"time/{stage}"] * sum(known))
        for stage in stages
        if metrics.get(f"time/{stage}")
    }
