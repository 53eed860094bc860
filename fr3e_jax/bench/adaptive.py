"""What `explore.adaptive` saves: tokens with and without it, by how often a query is solved."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, resolve
from fr3e_jax.config.values import Count, Name
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.build import build, mesh_of
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.step.rounds import Round, open_round

QUICKSTART = "configs/quickstart.yaml"
FROM_BASE = -1.0  # stands for the base trajectories among success rates


@dataclasses.dataclass
class Signal:
    """What the explorations of queries of one success rate cost, and what they gave.

    tokens: that were drawn. states: that carry a gradient. squares: of r - V(S_j), added up over rollouts.
    """

    tokens: int = 0
    states: int = 0
    squares: float = 0.0

    def add(self, other: "Signal") -> None:
        """Add the tokens, states and squares of other explorations to these."""
        self.tokens += other.tokens
        self.states += other.states
        self.squares += other.squares


def measure_adaptive(
    model: Name = "quickstart", rounds: Count = 8, seed: int = 0, json: bool = False
) -> list[dict[str, Any]]:
    """Measure the tokens that a state with a gradient takes, without explore.adaptive and with it.

    Rounds of the quickstart's problems, with its K, M and R. Both sides have the same base trajectories.
    Signal is the sum of the squares of r - V(S_j): many rollouts give more of it than few, and those of a
    state with half of its answers right give most.

    Args:
      model: quickstart, the directory of a run of it that has ended, or another that answers its problems.
      rounds: of 16 queries.
      seed: of the run.
      json: print an object a line instead of a table.

    Returns:
      What is printed, an object a line.
    """
    sides = [explored(model, rounds, seed, adaptive) for adaptive in (False, True)]
    rows = [row_of(f"{rate:.2f}", *(side[rate] for side in sides)) for rate in sorted(sides[0]) if rate >= 0]
    explorations, whole = ([total_of(side, least) for side in sides] for least in (0.0, FROM_BASE))
    rows += [row_of("all", *explorations), row_of("all, with base trajectories", *whole)]
    if json:
        return rows
    table = Table(title=f"explore.adaptive off -> on, {rounds} rounds of {model}")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "V(root)" else "right")
    for row in rows:
        table.add_row(
            *(
                cell if isinstance(cell, str) else " -> ".join(f"{x:,.0f}" for x in cell)
                for cell in row.values()
            )
        )
    Console().print(table)
    return []


def total_of(side: Mapping[float, Signal], least: float) -> Signal:
    """Add up what the success rates of at least `least` have."""
    total = Signal()
    for rate, signal in side.items():
        if rate >= least:
            total.add(signal)
    return total


def row_of(rate: str, off: Signal, on: Signal) -> dict[str, Any]:
    """Make a row of the table, of queries of one success rate."""
    both = (off, on)
    return {
        "V(root)": rate,
        "tokens": [side.tokens for side in both],
        "states": [side.states for side in both],
        "tokens / state": [side.tokens / max(side.states, 1) for side in both],
        "signal": [side.squares for side in both],
        "tokens / signal": [side.tokens / max(side.squares, 1e-6) for side in both],
    }


def explored(model: str, rounds: int, seed: int, adaptive: bool) -> dict[float, Signal]:
    """Explore queries, the same with and without explore.adaptive: success rate -> what it cost and gave.

    Under `FROM_BASE` stands what the base trajectories cost.
    """
    options = [f"--model.path={model}", f"--seed={seed}", f"--explore.adaptive={str(adaptive).lower()}"]
    config, _ = parse(Config, "bench", QUICKSTART, options, lambda _: None)
    config = resolve(config)
    parts = build(config, Hosts(mesh_of(config.mesh), timeout=60))
    params, found = parts.policy.read(), defaultdict[float, Signal](Signal)
    position = 0
    for _ in range(rounds):
        opened = open_round(config, parts, params, 1, position, Stopwatch())
        position = opened.following
        for rate, signal in signals_of(opened).items():
            found[rate].add(signal)
        found[FROM_BASE].add(Signal(int(opened.base.length.sum())))
    parts.verifier.pool.close()
    return dict(found)


def signals_of(opened: Round) -> dict[float, Signal]:
    """Read a round off: success rate of a query -> cost and signal of its explorations."""
    states, reward = opened.states, opened.rewards()
    assert opened.base_reward is not None
    drawn = states.drawn(reward.shape[2])
    value = reward.sum(axis=2) / np.maximum(drawn.sum(axis=2), 1)
    square = np.where(drawn, (reward - value[..., None]) ** 2, 0.0).sum(axis=2)
    tokens = opened.rollouts.length.sum(axis=1)
    rate = opened.base_reward.mean(axis=1)[states.query]
    found = defaultdict[float, Signal](Signal)
    for n in np.flatnonzero(states.valid[:, 0]):
        mixed = square[n] > 1e-6
        found[float(rate[n])].add(Signal(int(tokens[n]), int(mixed.sum()), float(square[n].sum())))
    return dict(found)
