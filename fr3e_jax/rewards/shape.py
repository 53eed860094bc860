"""Rewards that fall with the length of an answer, before the limit cuts it off."""

import numpy as np
from jaxtyping import Float32, Int


def length_factor(
    length: Int[np.ndarray, " answers"], max_response: int, slope: float
) -> Float32[np.ndarray, " answers"]:
    """Compute the factor of each reward: 1, then falling linearly to 0 over the last tokens before the limit.

    DAPO's soft overlong punishment (arXiv 2503.14476) adds a number that falls from 0 to -1 to
    rewards of -1 and 1. Here rewards are in [0, 1], and are multiplied: a long right answer is worth less, a
    wrong one is worth 0 at any length.

    Args:
      length: tokens of whole answers.
      max_response: the limit.
      slope: share of the limit over which the factor falls, in (0, 1].
    """
    return np.clip((max_response - length) / (slope * max_response), 0.0, 1.0).astype(np.float32)
