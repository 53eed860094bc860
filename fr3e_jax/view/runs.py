"""What a run directory says of a run: its settings and the numbers of its steps."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from etils import epath

from fr3e_jax.config import ConfigError
from fr3e_jax.problems.corpus import ADDITIONS, GENERATED
from fr3e_jax.run.reporter import METRICS_FILE, read_metrics
from fr3e_jax.run.run_dir import LostSettingsError, flatten, read_settings
from fr3e_jax.run.storage import location
from fr3e_jax.step.meanings import meaning_of

ALARMS = "alarms"
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
    names = dict.fromkeys(name for line in lines for name in line if name != ALARMS)
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
        alarms = line.get(ALARMS)
        if isinstance(alarms, Mapping):
            found += [(line["step"], str(name), str(sentence)) for name, sentence in alarms.items()]
    return found


def held_out_size(run: ShownRun) -> int | None:
    """Count the problems behind `eval/accuracy`, as far as the settings say; None where they do not."""
    held, sources = run.settings.get("data.held_out"), run.settings.get("data.source")
    if isinstance(held, int):
        return held
    names = (
        [one.get("name") for one in sources if isinstance(one, dict)]
        if isinstance(sources, list)
        else [sources]
    )
    generated = all(name in ADDITIONS or str(name).startswith("gym:") for name in names)
    return GENERATED if names and generated and not run.settings.get("data.held_out_source") else None


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
