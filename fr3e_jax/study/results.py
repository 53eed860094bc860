"""The results file: one line that says what a study is, and one for each of its runs and measurements.

It is all that tables, figures and the page are made from, and small enough for a repository. Several studies
may stand in one file. It is always written whole, sorted, and in one rename.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fr3e_jax.config import Config, ConfigError
from fr3e_jax.cost import total_flops
from fr3e_jax.run.jsonl import read_lines, to_line
from fr3e_jax.run.reporter import read_metrics
from fr3e_jax.run.storage import StorageError, brief, write_atomically
from fr3e_jax.study.curves import cost_to_threshold
from fr3e_jax.study.runs import StudyRun, hash_of, own_options
from fr3e_jax.study.settings import NamedStudy

RESULTS = "results"
AXES = ("tokens", "flops", "seconds")
CURVE = ("step", *AXES, "accuracy")
DIGITS = 6  # of a number in the file


@dataclasses.dataclass(frozen=True)
class StudyHeader:
    """What a study is, as its results file says it.

    settings: "TASK/ARM" -> options that are not at their defaults. sizes: values of M that the values of
    states are measured with. Other fields: as in the study file.
    """

    study: str
    question: str
    expected: str
    reference: str
    tasks: list[str]
    arms: list[str]
    seeds: list[int]
    rates: list[float]
    sweep_seeds: list[int]
    threshold: float
    judged_by: str
    metrics: list[str]
    settings: dict[str, dict[str, Any]]
    compare: str = "together"
    scatter: str | None = None
    sizes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What came of a run.

    settings: hash of its options. commit: of the code that made it. status: `complete` or `failed`. reason:
    why it failed, or by which rule it ended before its last step; may be empty. decided: whether it reached
    its accuracy, so that its curve may be taken to stay where it ended. curve: name -> number for each
    evaluation: step; tokens, FLOPs and seconds up to there, those of evaluations left out; held-out accuracy.
    metrics: name -> mean over steps. final_accuracy: None without an evaluation. tokens_to_threshold: None
    where the accuracy was not reached. cpus: CPUs that it could use, by whose number XLA orders its sums on
    CPU; None where that changed on the way.
    """

    study: str
    task: str
    arm: str
    seed: int
    learning_rate: float
    sweep: bool
    settings: str
    commit: str
    status: str
    reason: str
    decided: bool
    curve: dict[str, list[float]]
    metrics: dict[str, float]
    final_accuracy: float | None
    tokens_to_threshold: float | None
    cpus: int | None = None

    @property
    def key(self) -> tuple[str, str, str, bool, float, int, str]:
        """What no other run has, and by which runs are sorted."""
        rate = self.learning_rate if self.sweep else 0.0
        return self.study, self.task, self.arm, self.sweep, rate, self.seed, self.settings

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "complete"

    def over(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """(Cost, accuracy) of each evaluation, float [n], the cost in tokens, FLOPs or seconds."""
        return np.array(self.curve[axis], float), np.array(self.curve["accuracy"], float)


@dataclasses.dataclass(frozen=True)
class ValuesResult:
    """How well M rollouts tell the value of a state, under the starting model of a task.

    settings: hash of the options of the run whose states they are. commit: of the code. rollouts: from each
    state. statistics: as `BlockStatistics` has them, and nothing of M.
    """

    study: str
    task: str
    seed: int
    settings: str
    commit: str
    rollouts: int
    M: int
    statistics: dict[str, float]

    @property
    def key(self) -> tuple[str, str, int, str, int, int]:
        """What no other measurement has, and by which they are sorted."""
        return self.study, self.task, self.seed, self.settings, self.rollouts, self.M


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a results file says.

    studies: name -> what it is. runs: key -> result. values: key -> measurement of the values of states.
    """

    studies: dict[str, StudyHeader]
    runs: dict[tuple, RunResult]
    values: dict[tuple, ValuesResult] = dataclasses.field(default_factory=dict)

    def of(self, study: str) -> list[RunResult]:
        """The results that belong to a study as it is now: of its tasks, arms, seeds and settings."""
        header = self.studies[study]
        wanted = set(expected_keys(header, [run for run in self.runs.values() if run.study == study]))
        return [self.runs[key] for key in sorted(self.runs) if key in wanted]

    def values_of(self, study: str) -> list[ValuesResult]:
        """The measurements of the values of states that belong to a study as it is now."""
        header = self.studies[study]
        return [
            self.values[key]
            for key in sorted(self.values)
            if self.values[key].study == study
            and self.values[key].M in header.sizes
            and self.values[key].seed in header.seeds
            and self.values[key].settings == reference_hash(header, self.values[key])
        ]


def expected_keys(header: StudyHeader, runs: Iterable[RunResult]) -> Iterable[tuple]:
    """The keys of those results that are of a study's present settings."""
    for run in runs:
        options = header.settings.get(f"{run.task}/{run.arm}")
        seeds = header.sweep_seeds if run.sweep else header.seeds
        rates = not run.sweep or run.learning_rate in header.rates
        if options is not None and run.seed in seeds and rates:
            ours = options | {"seed": run.seed, "optimizer.learning_rate": run.learning_rate}
            if run.settings == hash_of(without_defaults(ours)):
                yield run.key


def reference_hash(header: StudyHeader, measured: ValuesResult) -> str:
    """The hash of the present settings of the run whose states a measurement is of; empty without one."""
    options = header.settings.get(f"{measured.task}/{header.reference}")
    return "" if options is None else hash_of(without_defaults(options | {"seed": measured.seed}))


def without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Options without a seed of 0 or the default learning rate, as `own_options` has them, sorted."""
    usual = {"seed": Config().seed, "optimizer.learning_rate": Config().optimizer.learning_rate}
    return {name: value for name, value in sorted(options.items()) if usual.get(name, ...) != value}


def header_of(named: NamedStudy) -> StudyHeader:
    """What a results file says of a study."""
    study = named.study
    return StudyHeader(
        study=named.name,
        question=study.question,
        expected=study.expected,
        reference=named.reference,
        tasks=list(study.tasks),
        arms=list(study.arms),
        seeds=list(study.seeds),
        rates=list(study.sweep.values),
        sweep_seeds=list(study.sweep.seeds) if study.sweep.values else [],
        threshold=study.threshold,
        judged_by=study.judged_by,
        metrics=list(study.metrics),
        settings={f"{task}/{arm}": own_options(config) for (task, arm), config in named.configs.items()},
        compare=study.compare,
        scatter=study.scatter,
        sizes=list(study.values.sizes),
    )


def result_of(
    run: StudyRun,
    directory: Path,
    header: StudyHeader,
    commits: str,
    cpus: int | None = None,
    ended: str = "",
    failure: str = "",
) -> RunResult:
    """Read what came of a run from its directory.

    Args:
      run: of the study.
      directory: of the run; it need not be there.
      header: of the study, with its threshold and the metrics that are kept.
      commits: of the code that made the run.
      cpus: that it could use; None where that changed.
      ended: the rule by which it ended before its last step; may be empty.
      failure: why it failed; empty where it is complete.
    """
    lines = read_metrics(directory) if directory.is_dir() else []
    curve: dict[str, list[float]] = {name: [] for name in CURVE}
    tokens = flops = seconds = 0.0
    for line in lines:
        tokens = line.get("tokens/total", tokens)
        flops += total_flops(line)
        seconds += line.get("time/step", 0.0)
        if "eval/accuracy" in line:
            point = (line["step"], tokens, flops, seconds, line["eval/accuracy"])
            for name, value in zip(CURVE, point, strict=True):
                curve[name].append(short(value))
    kept = {}
    for name in header.metrics:
        values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        if values:
            kept[name] = short(float(np.mean(values)))
    reached = (0.0, False)
    if curve["step"]:
        reached = cost_to_threshold(np.array(curve["tokens"]), np.array(curve["accuracy"]), header.threshold)
    return RunResult(
        study=run.study,
        task=run.task,
        arm=run.arm,
        seed=run.seed,
        learning_rate=run.learning_rate,
        sweep=run.sweep,
        settings=run.settings,
        commit=commits,
        status="failed" if failure else "complete",
        reason=failure or ended,
        decided=ended.startswith("end.accuracy"),
        curve=curve,
        metrics=kept,
        final_accuracy=curve["accuracy"][-1] if curve["step"] else None,
        tokens_to_threshold=short(reached[0]) if reached[1] else None,
        cpus=cpus,
    )


def short(value: float) -> float:
    """A number with few digits, as a whole one where it is one."""
    rounded = float(f"{value:.{DIGITS}g}") if abs(value) < 10**DIGITS else float(round(value))
    return int(rounded) if rounded.is_integer() and math.isfinite(rounded) else rounded


def results_files(out: Path) -> list[Path]:
    """The results files in a directory: that of all runs, and one for each slice of `--shard`."""
    return sorted(out.glob(f"{RESULTS}*.jsonl"))


def read_results(files: Iterable[Path], say: Callable[[str], None]) -> Results:
    """Read results files as one; of two results of a run a complete one counts.

    Args:
      files: that are there.
      say: is given a line on lines that are skipped.

    Raises:
      ConfigError: a file was written by a version with other fields.
    """
    results = Results({}, {})
    for file in files:
        lines = read_lines(file)
        for message in lines.warnings():
            say(message)
        for number, line in lines.objects:
            kind = line.pop("kind", None)
            try:
                if kind == "study":
                    header = StudyHeader(**line)
                    results.studies[header.study] = header
                elif kind == "values":
                    measured = ValuesResult(**line)
                    results.values[measured.key] = measured
                else:
                    run = RunResult(**line)
                    if run.key not in results.runs or run.complete:
                        results.runs[run.key] = run
            except TypeError:
                raise ConfigError(
                    f"{file}, line {number}: this is no line of results of this version; move the file away, "
                    "and the study reads its complete runs again"
                ) from None
    return results


def write_results(file: Path, results: Results) -> None:
    """Write a results file, sorted, in one rename.

    Raises:
      StorageError: it cannot be written.
    """
    lines = [
        {"kind": "study"} | dataclasses.asdict(results.studies[name]) for name in sorted(results.studies)
    ]
    entries = (("values", results.values), ("run", results.runs))
    lines += [
        {"kind": kind} | dataclasses.asdict(held[key]) for kind, held in entries for key in sorted(held)
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, b"".join(map(to_line, lines)))
    except OSError as error:
        raise StorageError(f"{file} cannot be written ({brief(error)})") from None
