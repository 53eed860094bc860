"""What a run directory says of a run: its settings and the numbers of its steps."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from etils import epath

from fr3e_jax.config import ConfigError
from fr3e_jax.run.reporter import METRICS_FILE, read_metrics
from fr3e_jax.run.run_dir import LostSettingsError, flatten, read_settings
from fr3e_jax.run.storage import location
from fr3e_jax.step.meanings import meaning_of

ALARMS_KEY = "alarms"
"""Key of a step's metrics: name of an alarm -> what it means and what to try."""


@dataclasses.dataclass(frozen=True)
class ShownRun:
    """A run as the page shows it.

    place: its directory. name: as the page calls it. settings: option -> value, of its config.yaml; empty
    where that is lost. columns: metric -> a number or None for each step. alarms: (step, name, sentence).
    """

    place: epath.Path
    name: str
    settings: dict[str, Any]
    columns: dict[str, list[float | int | None]]
    alarms: list[tuple[int, str, str]]


def read_run(path: str, name: str) -> ShownRun:
    """Read a run directory.

    Raises:
      ConfigError: there is no such directory, or it holds no metrics of steps.
    """
    place = location(path)
    if not place.is_dir():
        raise ConfigError(f"there is no run directory {path}; name one that training has written")
    lines = read_metrics(place)
    if not lines:
        raise ConfigError(
            f"{path} holds no {METRICS_FILE} with a step; name a run directory, such as runs/quickstart-..."
        )
    try:
        settings = flatten(read_settings(place))
    except LostSettingsError:
        settings = {}
    return ShownRun(place, name, settings, metric_columns(lines), alarms_of(lines))


def run_names(paths: Iterable[str]) -> list[str]:
    """Name runs by the last parts of their paths: as many as tell them apart."""
    parts = [[part for part in path.split("/") if part not in ("", ".")] or [path] for path in paths]
    count = 1
    while True:
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names) or count >= max(map(len, parts)):
            return names
        count += 1


def metric_columns(lines: list[dict[str, Any]]) -> dict[str, list[float | int | None]]:
    """Turn lines of metrics into columns of finite numbers, rounded to 6 digits; all else is None."""
    names = dict.fromkeys(name for line in lines for name in line if name != ALARMS_KEY)
    columns = {name: [finite(line.get(name)) for line in lines] for name in names}
    return {name: column for name, column in columns.items() if any(x is not None for x in column)}


def finite(value: Any) -> float | int | None:
    """Round a number to 6 digits; None of what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def alarms_of(lines: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Collect the alarms of all steps, in their order."""
    found = []
    for line in lines:
        alarms = line.get(ALARMS_KEY)
        if isinstance(alarms, Mapping):
            found += [(line["step"], str(name), str(sentence)) for name, sentence in alarms.items()]
    return found


def effective_answers(run: ShownRun) -> list[float | None] | None:
    """Count, step by step, the independent answers that would measure the held-out accuracy as well.

    Answers to one problem depend on each other. n independent ones that are right with probability p have a
    mean whose variance is p (1 - p) / n, and the run has measured that variance over its problems. So n is
    this quotient, at least the number of problems and at most that of answers (Kish 1965, "Survey Sampling":
    the effective sample size).

    Returns:
      A number for each step, None for steps without an evaluation; None for a run that does not say how many
      problems were judged.
    """
    if "eval/problems" not in run.columns:
        return None
    missing: list[float | int | None] = [None] * len(run.columns["step"])
    names = ("eval/accuracy", "eval/problems", "eval/samples", "eval/accuracy_se")
    columns = (run.columns.get(name, missing) for name in names)
    return [effective_size(*values) for values in zip(*columns, strict=True)]


def effective_size(
    accuracy: float | None, problems: float | None, samples: float | None, error: float | None
) -> float | None:
    """Count the independent answers of an evaluation; None where it does not say enough."""
    if accuracy is None or problems is None or samples is None:
        return None
    if not error:  # one problem, or as many right answers to each
        return problems
    return min(max(accuracy * (1 - accuracy) / error**2, problems), problems * samples)


def shown_settings(run: ShownRun) -> dict[str, str]:
    """Write the settings as YAML has them."""
    return {
        name: yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        .removesuffix("...\n")
        .strip()
        for name, value in run.settings.items()
    }


def meanings_for(runs: Iterable[ShownRun]) -> dict[str, dict[str, str]]:
    """Say what each metric of the runs is: help, unit, over and watch."""
    names = dict.fromkeys(name for run in runs for name in run.columns)
    found = {name: meaning_of(name) for name in names}
    return {name: meaning._asdict() for name, meaning in found.items() if meaning is not None}
