"""The weight of the entropy bonus, adapted so that the policy's entropy nears a target."""


def adapted_coefficient(
    coefficient: float, entropy: float, target: float, step: float, limit: float
) -> float:
    """Compute the weight of the next step: c + Delta below the target, c - Delta above it, in [0, limit].

    Skywork-OR1 (arXiv 2505.22312, adaptive entropy control: target 0.2, Delta 1e-4, limit 5e-3). It helps
    where the entropy falls towards 0 before the task is learned. A dual variable as SAC's would change by the
    distance to the target; a fixed Delta does not depend on the scale of the entropy. In contrast to
    Skywork-OR1 the bonus is not switched off at once above the target: the weight shrinks.

    Args:
      coefficient: c, of this step.
      entropy: mean of the trained tokens in this step, nats.
      target: nats.
      step: Delta.
      limit: the largest weight.
    """
    change = step * ((entropy < target) - (entropy > target))
    return min(max(coefficient + change, 0.0), limit)
