"""What the runs of a study say: arms with their intervals, and comparisons with the reference."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain, product

import numpy as np

from fr3e_jax.study.curves import Sigmoid, fit_with_errors
from fr3e_jax.study.results import RunResult, StudyHeader, ValuesResult
from fr3e_jax.study.scores import (
    SCORES,
    RunScore,
    budget_of,
    chosen_rates,
    evaluated,
    scores_by_task,
    to_threshold,
)
from fr3e_jax.study.statistics import (
    Estimate,
    PairedDifference,
    Scores,
    Statistic,
    holm,
    interquartile_mean,
    mean_of_all,
    median_time,
    paired_difference,
    probability_of_improvement,
    stratified_bootstrap,
)

EQUAL = ("tokens", "flops")
"""Costs at which arms are compared; seconds depend on the machine, and are shown alone."""


@dataclasses.dataclass(frozen=True)
class ArmScores:
    """An arm over all tasks.

    runs: with an evaluation. failed: runs that failed, those without an evaluation included. scores:
    (`accuracy` or `area`, cost) -> interquartile mean of that score at equal cost. metrics: name -> mean over
    runs. rate: learning rate that was chosen; None where none was searched for.
    """

    arm: str
    runs: int
    failed: int
    scores: dict[tuple[str, str], Estimate]
    metrics: dict[str, Estimate]
    rate: float | None


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """An arm on one task.

    scores: (`accuracy` or `area`, cost) -> mean score at equal cost. median: median tokens to the threshold,
    infinite where half of the runs never reach it. reached: runs that do. fit: sigmoid over FLOPs with
    intervals of its numbers.
    """

    task: str
    arm: str
    runs: int
    scores: dict[tuple[str, str], Estimate]
    median: Estimate
    reached: int
    fit: tuple[Sigmoid, dict[str, tuple[float, float]]] | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the reference at equal cost.

    task: that they are compared on; empty: on all together. improvement: probability that a run of the arm
    scores higher. corrected: p-value by the number of all comparisons of the study.
    """

    task: str
    arm: str
    cost: str
    improvement: Estimate
    difference: PairedDifference
    corrected: float


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that tables and figures show of a study.

    budgets: cost -> task -> what is compared at. values: M -> name in `BlockStatistics` -> its mean over
    tasks and seeds.
    """

    header: StudyHeader
    runs: list[RunResult]
    failed: list[RunResult]
    budgets: dict[str, dict[str, float]]
    arms: list[ArmScores]
    tasks: list[TaskScores]
    comparisons: list[Comparison]
    values: dict[int, dict[str, Estimate]]

    def seeds(self) -> str:
        """The number of seeds of an arm on a task, as in `5 seeds` or `3 to 5 seeds`."""
        counts = {one.runs for one in self.tasks}
        least, most = min(counts, default=0), max(counts, default=0)
        return f"{most} seed{'s' * (most != 1)}" if least == most else f"{least} to {most} seeds"


def analyse(
    header: StudyHeader, runs: Sequence[RunResult], values: Sequence[ValuesResult] = (), seed: int = 0
) -> Analysis:
    """Compute everything that is shown of a study.

    Args:
      header: of the study.
      runs: that belong to it, the search for learning rates included.
      values: measurements that belong to it.
      seed: of all resamples.
    """
    reported = [run for run in runs if not run.sweep]
    held = evaluated(reported)
    tasks = [task for task in header.tasks if any(run.task == task for run in held)]
    budgets = {
        cost: {task: budget_of([run for run in held if run.task == task], cost) for task in tasks}
        for cost in EQUAL
    }
    rates = chosen_rates(header, runs) if header.rates else {}
    failed = [run for run in reported if not run.complete]
    arms = [
        arm_scores(header, held, arm, tasks, budgets, failed, rates.get(arm), seed)
        for arm in header.arms
        if any(run.arm == arm for run in held)
    ]
    of_tasks = [
        task_scores(header, of_arm, task, arm, budgets, seed)
        for task in tasks
        for arm in header.arms
        if (of_arm := [run for run in held if (run.task, run.arm) == (task, arm)])
    ]
    comparisons = compare_arms(header, held, tasks, budgets, seed)
    return Analysis(
        header, held, failed, budgets, arms, of_tasks, comparisons, values_by_size(header, values, seed)
    )


def values_by_size(
    header: StudyHeader, values: Sequence[ValuesResult], seed: int
) -> dict[int, dict[str, Estimate]]:
    """Compute the means of measurements over tasks and seeds: M -> name -> mean."""
    means: dict[int, dict[str, Estimate]] = {}
    for m in header.sizes:
        of_size = [one for one in values if m == one.M]
        for name in of_size[0].statistics if of_size else ():
            by_task = [
                np.array([one.statistics[name] for one in of_size if one.task == task])
                for task in header.tasks
            ]
            scores = [task for task in by_task if task.size]
            means.setdefault(m, {})[name] = stratified_bootstrap([scores], mean_of_all, seed)
    return means


def arm_scores(
    header: StudyHeader,
    runs: list[RunResult],
    arm: str,
    tasks: list[str],
    budgets: dict[str, dict[str, float]],
    failed: list[RunResult],
    rate: float | None,
    seed: int,
) -> ArmScores:
    """Compute the scores of an arm over all tasks."""

    def aggregate(scores: Scores, statistic: Statistic = interquartile_mean) -> Estimate:
        return stratified_bootstrap([scores], statistic, seed)

    of_arm = [run for run in runs if run.arm == arm]
    metrics = {}
    for name in header.metrics:
        values = [
            np.array([run.metrics[name] for run in of_arm if run.task == task and name in run.metrics])
            for task in tasks
        ]
        if present := [task for task in values if task.size]:
            metrics[name] = aggregate(present, mean_of_all)
    return ArmScores(
        arm=arm,
        runs=len(of_arm),
        failed=sum(run.arm == arm for run in failed),
        scores={
            (what, cost): aggregate(scores_by_task(runs, arm, tasks, equal_cost_score(what, cost, budgets)))
            for what, cost in product(SCORES, EQUAL)
        },
        metrics=metrics,
        rate=rate,
    )


def equal_cost_score(what: str, cost: str, budgets: dict[str, dict[str, float]]) -> Callable[[str], RunScore]:
    """What the runs on a task are scored by at equal cost: a function of the task.

    Args:
      what: `accuracy` or `area`.
      cost: `tokens` or `flops`.
      budgets: cost -> task -> budget.
    """
    return lambda task: SCORES[what](cost, budgets[cost][task])


def task_scores(
    header: StudyHeader,
    runs: list[RunResult],
    task: str,
    arm: str,
    budgets: dict[str, dict[str, float]],
    seed: int,
) -> TaskScores:
    """Compute the scores of an arm on one task, of whose runs there is one at least."""
    scores = {}
    for what, cost in product(SCORES, EQUAL):
        score = equal_cost_score(what, cost, budgets)(task)
        values = np.array([score(run) for run in runs])
        scores[what, cost] = stratified_bootstrap([[values]], mean_of_all, seed)
    time, reached = to_threshold(runs, "tokens", header.threshold)
    numbers = np.arange(len(runs))  # of runs, which are drawn with both of their values
    median = stratified_bootstrap([[numbers]], lambda arm: median_time(time[arm[0]], reached[arm[0]]), seed)
    return TaskScores(
        task,
        arm,
        len(runs),
        scores,
        median,
        int(reached.sum()),
        fit_with_errors([run.over("flops") for run in runs], seed),
    )


def compare_arms(
    header: StudyHeader,
    runs: list[RunResult],
    tasks: list[str],
    budgets: dict[str, dict[str, float]],
    seed: int,
) -> list[Comparison]:
    """Compare every arm with the reference, by what the study judges by, at equal tokens and equal FLOPs.

    Of the tasks those count that both have runs on, and of the paired differences the seeds that both have.
    """
    compared: list[tuple[str, str, str, Estimate, PairedDifference]] = []
    groups = [("", tasks)] if header.compare == "together" else [(task, [task]) for task in tasks]
    others = [arm for arm in header.arms if arm != header.reference]
    for (name, some), arm, cost in product(groups, others, EQUAL):
        score = equal_cost_score(header.judged_by, cost, budgets)
        ours, theirs = (
            {
                task: {run.seed: score(task)(run) for run in runs if (run.task, run.arm) == (task, one)}
                for task in some
            }
            for one in (arm, header.reference)
        )
        pairs = [(task, seeds) for task in some if (seeds := sorted(ours[task].keys() & theirs[task].keys()))]
        if not pairs:
            continue
        a, b = (
            [np.array([side[task][number] for number in seeds]) for task, seeds in pairs]
            for side in (ours, theirs)
        )
        every = [[np.array(list(side[task].values())) for task, _ in pairs] for side in (ours, theirs)]
        improvement = stratified_bootstrap(every, probability_of_improvement, seed)
        compared.append((name, arm, cost, improvement, paired_difference(a, b, seed)))
    corrected = holm([difference.p for *_, difference in compared])
    return [Comparison(*one, p) for one, p in zip(compared, corrected, strict=True)]


def commits_of(runs: Sequence[RunResult]) -> list[str]:
    """The commits of the code that made runs, sorted."""
    return sorted(set(chain.from_iterable(run.commit.split() for run in runs)))
