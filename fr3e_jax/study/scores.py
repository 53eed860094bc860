"""Scores of runs at equal cost, and the learning rate that an arm takes by them."""

from collections.abc import Callable, Sequence

import numpy as np

from fr3e_jax.study.curves import accuracy_at, area_under_curve, cost_to_threshold
from fr3e_jax.study.results import RunResult, StudyHeader

RunScore = Callable[[RunResult], float]


def evaluated(runs: Sequence[RunResult]) -> list[RunResult]:
    """Those runs of which there is an evaluation; a run that failed later counts with what it had reached."""
    return [run for run in runs if run.curve["step"]]


def budget_of(runs: Sequence[RunResult], axis: str) -> float:
    """Compute the cost at which runs on a task are compared: the most that every one of them tells of.

    A run that reached its accuracy tells of any cost, since its curve may be taken to stay where it ended. Of
    the others the one that ended at the least cost is decisive. Where all reached it, the one that took most
    is.

    Args:
      runs: with an evaluation, at least one.
      axis: `tokens`, `flops` or `seconds`.
    """
    ends = [run.curve[axis][-1] for run in runs if not run.decided and run.complete]
    return min(ends) if ends else max(run.curve[axis][-1] for run in runs)


def at_budget(axis: str, budget: float) -> RunScore:
    """The held-out accuracy of a run at a budget."""
    return lambda run: accuracy_at(*run.over(axis), budget)


def area(axis: str, budget: float) -> RunScore:
    """The mean held-out accuracy of a run on the way to a budget."""
    return lambda run: area_under_curve(*run.over(axis), budget)


SCORES = {"accuracy": at_budget, "area": area}
"""What a study may judge by: of a cost and a budget, the score of a run."""


def to_threshold(runs: Sequence[RunResult], axis: str, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(Cost to a threshold, whether it was reached) of each run, [n]; see `cost_to_threshold`."""
    pairs = [cost_to_threshold(*run.over(axis), threshold) for run in runs]
    return np.array([cost for cost, _ in pairs]), np.array([reached for _, reached in pairs], bool)


def scores_by_task(
    runs: Sequence[RunResult], arm: str, tasks: Sequence[str], score: Callable[[str], RunScore]
) -> list[np.ndarray]:
    """RunScore the reported runs of an arm: float [seeds] of each task that it has runs on, seeds ascending.

    Args:
      score: of a task, what its runs are scored by.
    """
    scores = []
    for task in tasks:
        of_task = [run for run in runs if run.arm == arm and run.task == task and not run.sweep]
        if of_task:
            scores.append(
                np.array([score(task)(run) for run in sorted(of_task, key=lambda run: run.seed)], float)
            )
    return scores


def chosen_rates(header: StudyHeader, runs: Sequence[RunResult]) -> dict[str, float]:
    """Choose the learning rate of each arm by the runs that search for it.

    An arm takes the rate with the largest area under its curves over tokens, the mean over tasks and seeds;
    of several with the same, the smallest. A run that failed before its first evaluation counts as 0.

    Args:
      header: of the study.
      runs: of the study.

    Returns:
      Arm -> rate, of the arms whose search is done.
    """
    chosen = {}
    searches = [run for run in runs if run.sweep]
    budgets = {
        task: budget_of(some, "tokens")
        for task in header.tasks
        if (some := evaluated([run for run in searches if run.task == task]))
    }
    for arm in header.arms:
        of_arm = [run for run in searches if run.arm == arm]
        if len(of_arm) < len(header.rates) * len(header.sweep_seeds) * len(header.tasks):
            continue
        means = {
            rate: np.mean(
                [
                    area("tokens", budgets[run.task])(run) if run.curve["step"] else 0.0
                    for run in of_arm
                    if run.learning_rate == rate
                ]
            )
            for rate in header.rates
        }
        chosen[arm] = max(sorted(means), key=lambda rate: means[rate])
    return chosen
