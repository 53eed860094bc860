"""The options of alarms: from which values on the metrics of a run are a sign that it goes wrong."""

import dataclasses
from typing import Annotated, Literal

from fr3e_jax.config.values import Bounds, PositiveNumber, Share

AlarmName = Literal[
    "entropy",
    "no_signal",
    "advantage_mean",
    "advantage_spread",
    "cut",
    "mismatch",
    "spike",
    "timeouts",
    "source",
    "held_out",
]


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """Signs in metrics.jsonl that a run goes wrong: a threshold for each, and null for none. The defaults are
    chosen so that runs that learn are silent (ours)."""

    window: Annotated[int, Bounds(least=3)] = 10
    """Steps that are looked at together: the last ones, and for some alarms the first ones of the run too. A
    step of few states is noisy, and 10 of them are not."""
    entropy: Share | None = 0.2
    """The entropy has collapsed when what is left of it, relative to the first steps, is less than this share
    of what is left of the wrong answers, and it is below 0.1 nats a token. Where learning makes answers sure,
    entropy and wrong answers fall together, and the ratio stays above 1."""
    no_signal: Share | None = 0.9
    """Share of the states of a step whose answers are all right or all wrong, so that they teach nothing. At
    0.9 a batch takes ten times the sampling that it would take if all were mixed."""
    advantage_mean: PositiveNumber | None = 0.1
    """Distance of the mean advantage from 0, in standard deviations of the advantages. With the mean of a
    state's rewards as its baseline it is 0 but for rounding."""
    advantage_spread: Share | None = 0.25
    """Standard deviation of the advantages, relative to the first steps. That of mixed states moves by less
    than half."""
    cut: Share | None = 0.25
    """Share of the answers that rollout.max_response cut off. Runs with room for their answers are below
    0.1."""
    mismatch: PositiveNumber | None = 0.1
    """Mean absolute log-ratio of the policy's probabilities in the update and while sampling, nats, at which
    tokens are a tenth more or less likely. Where loss.mismatch is not none: by how much the share of tokens
    outside [0.9, 1.1] has grown."""
    spike: Annotated[float, Bounds(above=1, why="or null")] | None = 10.0
    """How many times the median of the steps before it a gradient norm or a loss is, twice within the window.
    A noisy step has 2 to 7 times; a single spike is clipped, and passes."""
    timeouts: PositiveNumber | None = 0.1
    """Answers on which the scorer ran out of time, for each state. They count as wrong; 0.1 is less than one
    answer in a hundred where a state has 16."""
    source: Share | None = 0.9
    """Share of the accepted states that are of one source, where the others' share of the questions is more
    than twice their share of the states."""
    held_out: Share | None = 0.1
    """Fall of the held-out accuracy, the mean of three evaluations, below its best, while the reward rose. It
    must also be 4 times what the evaluations differ by from one to the next."""
    stop: list[AlarmName] = dataclasses.field(default_factory=list)
    """Alarms that end the run when they go off, as options of `end` do: it is evaluated, saved and exported.
    It goes on with the same --run_dir and other options of `alarms`."""
