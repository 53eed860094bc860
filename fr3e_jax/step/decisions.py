"""How many of the places that decide an answer the positions are, for tasks that know such places.

A task of one's own that has a function `decisions(row, response)` says where a response decides its verdict:
offsets of characters, ascending. The token that the character at an offset is part of makes the decision.
"""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.step.metrics import Metrics
from fr3e_jax.types import Rollouts, States


def decision_metrics(
    base: Rollouts,
    states: States,
    problems: Any,
    decode: Callable[[list[list[int]]], list[str]],
) -> Metrics:
    """Compare the positions of the kept trajectories with the tokens that decide them.

    Args:
      base: base trajectories, leaves [B, R, S], on the host.
      states: of the kept trajectories, on the host.
      problems: of the B queries, each read by its row.
      decode: gives the texts of rows of tokens.

    Returns:
      `decisions/hit`, the share of positions that decide; `decisions/chance`, that of all tokens, which
      positions drawn at random would hit; `decisions/found`, the share of what decides that a position was
      at. Each is left out where it is a share of nothing; all are where no task knows what decides.

    Raises:
      RuleError: the task's function failed.
    """
    positions = tokens = decisions = found = 0
    for n in np.flatnonzero(states.valid[:, 0]).tolist():
        problem, length = problems[int(states.query[n])], base.length[states.query[n], states.base[n]]
        if problem.decisions is None:
            continue
        pieces = decode([[token] for token in states.response[n, :length].tolist()])
        try:
            offsets = problem.decisions("".join(pieces))
        except Exception as error:
            raise RuleError(f"{problem.source}: decisions(row, response) failed: {error!r:.200}") from error
        begins = [0, *accumulate(map(len, pieces))]
        deciding = {bisect_right(begins, offset) - 1 for offset in offsets}
        chosen = set(states.prefix_length[n, 1:][states.valid[n, 1:]].tolist())
        positions, tokens = positions + len(chosen), tokens + int(length)
        decisions, found = decisions + len(deciding), found + len(deciding & chosen)
    shares = {
        "decisions/hit": (found, positions),
        "decisions/chance": (decisions, tokens),
        "decisions/found": (found, decisions),
    }
    return {name: part / whole for name, (part, whole) in shares.items() if whole}
