"""How often each source of a mixture is asked, and how many of its states are trained on."""

from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fr3e_jax.step.metrics import Metrics


def source_metrics(problems: Any, accepted: Bool[np.ndarray, "N J"], query: Int[np.ndarray, " N"]) -> Metrics:
    """Count the queries and the accepted states of each source in a round.

    Args:
      problems: of the B queries by their rows.
      accepted: which of the states of N trajectories are trained on.
      query: of each trajectory, in [0, B).

    Returns:
      `sources/asked/NAME`, queries, and `sources/accepted/NAME`, states, of the sources that were asked.
    """
    asked: Counter[str] = Counter()
    states: Counter[str] = Counter()
    of_queries = np.bincount(query, accepted.sum(axis=1), len(problems))
    for row, count in enumerate(of_queries.tolist()):
        source = problems[row].source
        asked[source] += 1
        states[source] += int(count)
    counts = {"asked": asked, "accepted": states}
    return {f"sources/{what}/{name}": n for what, of in counts.items() for name, n in sorted(of.items())}
