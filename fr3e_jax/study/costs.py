"""What the runs of a study will cost, before they are started."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from fr3e_jax.config import Config
from fr3e_jax.plan import model_of
from fr3e_jax.planning.make import Question, quick_plan
from fr3e_jax.planning.workload import Assumptions
from fr3e_jax.study.results import RunResult
from fr3e_jax.study.runs import StudyRun


@dataclasses.dataclass(frozen=True)
class RunCost:
    """The cost of a run. nan: not known.

    steps, tokens: the most that it makes and draws. seconds: without evaluations, the mean of complete runs
    of its arm on its task, or as planned for a slice. chip_hours: on the slice.
    """

    steps: float
    tokens: float
    seconds: float
    chip_hours: float


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A step on a slice by the plan that `--quick` makes. tokens: that it draws. chips: of the slice."""

    tokens: float
    seconds: float
    chips: int


def cost_of(run: StudyRun, held: Sequence[RunResult], step: PlannedStep | None) -> RunCost:
    """Estimate the cost of a run.

    The most tokens are the run's budget, `end.tokens`; without one they are those of complete runs of its arm
    on its task, or those of the plan.

    Args:
      held: results of the study.
      step: as planned for a slice of TPUs; None: here.
    """
    like = [
        one for one in held if one.complete and (one.task, one.arm) == (run.task, run.arm) and not one.sweep
    ]
    tokens = float(run.config.end.tokens or mean_end(like, "tokens"))
    steps, seconds, chip_hours = float(run.config.steps), mean_end(like, "seconds"), math.nan
    if step is not None:
        if run.config.end.tokens:
            steps = min(steps, math.ceil(run.config.end.tokens / step.tokens))
        tokens = steps * step.tokens
        seconds = steps * step.seconds
        chip_hours = step.chips * seconds / 3600
    return RunCost(steps, tokens, seconds, chip_hours)


def mean_end(runs: Sequence[RunResult], axis: str) -> float:
    """Compute the mean cost of runs at their ends; nan where there are none."""
    return float(np.mean([run.curve[axis][-1] for run in runs])) if runs else math.nan


def planned_step(config: Config, topology: str) -> PlannedStep:
    """Plan a step of a run for a slice, by arithmetic.

    Raises:
      ConfigError, PlacementError: the run cannot start on the slice.
    """
    model = model_of(config.model.path)
    plan = quick_plan(Question("study", config, model, topology, Assumptions()))
    return PlannedStep(float(plan.work.tokens), float(plan.step_seconds or math.nan), plan.slice.chips)


def costs_table(
    runs: Sequence[StudyRun], costs: Sequence[RunCost], states: Sequence[str], topology: str | None
) -> Table:
    """Show the runs of a study with their costs and what is left of them.

    Args:
      states: of each run, as `complete` or `missing`.
    """
    left = [cost for cost, state in zip(costs, states, strict=True) if state != "complete"]
    where = f"on {topology}" if topology else "here"
    table = Table(title=f"{len(runs)} runs, {len(left)} left", caption=f"most steps and tokens; time {where}")
    for column in ("run", "state", "steps", "tokens", "seconds", *(["chip-hours"] if topology else [])):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    for run, cost, state in zip(runs, costs, states, strict=True):
        table.add_row(run.label, state, *cells(cost, topology))
    table.add_section()
    table.add_row("what is left", "", *cells(total(left), topology))
    return table


def total(costs: Sequence[RunCost]) -> RunCost:
    """Add up costs; what is not known of one is not known of all."""
    names = [field.name for field in dataclasses.fields(RunCost)]
    return RunCost(*(sum(getattr(cost, name) for cost in costs) for name in names))


def cells(cost: RunCost, topology: str | None) -> list[str]:
    """The numbers of a row."""
    values = [number_or_unknown(value) for value in (cost.steps, cost.tokens, cost.seconds)]
    return values + ([f"{cost.chip_hours:,.1f}"] if topology else [])


def number_or_unknown(value: float) -> str:
    """A whole number for people."""
    return "not known" if math.isnan(value) or math.isinf(value) else f"{value:,.0f}"
