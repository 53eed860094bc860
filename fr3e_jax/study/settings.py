"""The study file: which runs a study is made of, and what they are to answer.

A file of studies may begin from another one (`base`), as those of training do.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fr3e_jax.config import Config, ConfigError, check, resolve
from fr3e_jax.config.checks import check_mapping, is_union
from fr3e_jax.config.files import Written, merged_options, read_files
from fr3e_jax.config.values import Count, Name, OptionError, PositiveNumber, Seed, Share

FOLDER_NAME = re.compile(r"[\w.+=-]+")
ANY_CONTEXT = 2**31  # a model's context, which is not known before the model is read


@dataclasses.dataclass(frozen=True)
class StudyTask:
    """What the arms are compared on."""

    config: Name | None = None
    """File of a training configuration that the runs on this task begin from. Default: that of the study."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of training over that file and over the study's settings, as in a configuration file."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The search for a learning rate: the same values for every arm, on seeds that are not reported."""

    values: list[PositiveNumber] = dataclasses.field(default_factory=list)
    """Values of optimizer.learning_rate. Each arm takes the one with the largest area under its curves over
    tokens, the mean over tasks and seeds; of several the smallest. Empty: none is searched for."""
    seeds: list[Seed] = dataclasses.field(default_factory=lambda: [1000])
    """Seeds of the search, none of which is one of the study's."""


@dataclasses.dataclass(frozen=True)
class ValuesConfig:
    """The measurement of V(S_j) under the starting model of each task, with the settings of the reference."""

    sizes: list[Count] = dataclasses.field(default_factory=list)
    """Values of M to measure. Empty: nothing is measured."""
    rollouts: Count = 512
    """Rollouts from each state, by which the estimates of M rollouts are judged; at least twice as many."""
    rounds: Count = 4
    """Sampling rounds, whose states are measured, for each seed."""
    queries: Count = 4
    """Queries of a round; bounds memory."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms x tasks x seeds of training runs."""

    question: Name = "Which arm learns better?"
    """What the study is to answer, for the page."""
    expected: str = ""
    """What theory expects, written before the first run."""
    config: Name = "configs/quickstart.yaml"
    """File of a training configuration that all runs begin from."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of training for all runs, over that file. `end` says when a run is decided: at a held-out
    accuracy in several evaluations in a row, or when its budget of tokens or FLOPs is spent."""
    tasks: dict[str, StudyTask] = dataclasses.field(default_factory=lambda: {"task": StudyTask()})
    """Name -> task."""
    arms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Name -> options of training, over those of the study and of the task."""
    reference: Name | None = None
    """The arm that the others are compared with. Default: the first."""
    seeds: list[Seed] = dataclasses.field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of the runs of every arm on every task. Runs with the same seed have the same questions."""
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    threshold: Share = 0.9
    """Held-out accuracy to which the tokens are counted."""
    judged_by: Literal["area", "accuracy"] = "area"
    """What decides between arms, chosen before the first run: `area`, the mean accuracy on the way to equal
    cost, which tells arms apart that all arrive; or `accuracy`, that at equal cost."""
    compare: Literal["together", "each_task"] = "together"
    """Arms are compared with the reference over all tasks together, or on each task by itself."""
    metrics: list[Name] = dataclasses.field(default_factory=list)
    """Names in metrics.jsonl whose mean over a run's steps is kept and shown."""
    scatter: Name | None = None
    """One of `metrics`, over which a figure draws the score of each arm."""
    values: ValuesConfig = dataclasses.field(default_factory=ValuesConfig)


@dataclasses.dataclass(frozen=True)
class NamedStudy:
    """A study that was read from a file.

    name: the stem of the file. configs: (task, arm) -> configuration of its runs, with neither seed nor
    run_dir.
    """

    name: str
    study: Study
    configs: dict[tuple[str, str], Config]

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.study.reference or next(iter(self.study.arms))


def read_study(file: str, name: str) -> NamedStudy:
    """Read a study file, and make the configuration of every arm on every task.

    Args:
      file: path, or name of a shipped file (`configs/studies/NAME.yaml`).
      name: of the study.

    Raises:
      ConfigError: an option is not there, does not take its value, or cannot stand together with others; one
        line, with file and line where it is one option's.
    """
    written = read_files([file], Study)
    try:
        return checked_study(written, name)
    except OptionError as error:
        raise written.explain(error) from None


def checked_study(written: Written, name: str) -> NamedStudy:
    """Make the study of what a file says.

    Raises:
      OptionError: an option of training is not there, or does not take its value.
      ConfigError: options cannot stand together.
    """
    study: Study = built(Study, written.options)
    check_names(study)
    for path, settings in settings_in(study):
        check_mapping(Config, settings, path)
    configs = {}
    for task_name, task in study.tasks.items():
        of_file = read_files([task.config or study.config], Config).options
        for arm, settings in study.arms.items():
            options = merged_options(of_file, study.settings)
            options = merged_options(merged_options(options, task.settings), settings)
            try:
                configs[task_name, arm] = training_config(options)
            except ConfigError as error:
                raise ConfigError(f"{name}, arm {arm} on task {task_name}: {error}") from None
    return NamedStudy(name, study, configs)


def settings_in(study: Study) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """The options of training that a study file holds: (where they stand, options)."""
    tasks = [(("tasks", name, "settings"), task.settings) for name, task in study.tasks.items()]
    arms = [(("arms", name), settings) for name, settings in study.arms.items()]
    return [(("settings",), study.settings), *tasks, *arms]


def training_config(options: dict[str, Any]) -> Config:
    """Make the configuration of a training run from options as files have them.

    Raises:
      ConfigError: they cannot stand together.
    """
    config: Config = built(Config, options)
    check(resolve(config), 1, ANY_CONTEXT)
    return config


def check_names(study: Study) -> None:
    """Refuse a study without arms, tasks or seeds, or with names and seeds that cannot be.

    Raises:
      OptionError: with one line that says what to change.
    """
    for what, names in (("arms", study.arms), ("tasks", study.tasks)):
        if not names:
            raise OptionError((what,), f"{what} is empty; name at least one")
        for name in names:
            if not FOLDER_NAME.fullmatch(str(name)):
                raise OptionError(
                    (what, name), f"{what} has {name!r}, which must be of letters, digits and . _ + = -"
                )
    if study.reference is not None and study.reference not in study.arms:
        raise OptionError(
            ("reference",), f"reference is {study.reference!r}; choose one of {', '.join(study.arms)}"
        )
    both_seeds: list[tuple[tuple[str, ...], list[int]]] = [
        (("seeds",), study.seeds),
        (("sweep", "seeds"), study.sweep.seeds),
    ]
    for path, seeds in both_seeds:
        if not seeds or len(set(seeds)) < len(seeds):
            raise OptionError(path, f"{'.'.join(path)} is {seeds}, must be different numbers, at least one")
    if study.scatter is not None and study.scatter not in study.metrics:
        raise OptionError(("scatter",), f"scatter is {study.scatter!r}, which metrics does not name; add it")
    if study.values.sizes and max(study.values.sizes) > study.values.rollouts // 2:
        raise OptionError(
            ("values", "rollouts"),
            f"values.rollouts is {study.values.rollouts}, must be at least twice the largest of values.sizes "
            f"{study.values.sizes}",
        )
    if study.sweep.values and (both := sorted(set(study.seeds) & set(study.sweep.seeds))):
        raise OptionError(
            ("sweep", "seeds"),
            f"sweep.seeds has {', '.join(map(str, both))}, which is reported; choose others, so that no arm "
            "is tuned on what it is judged by",
        )
    own_rates = [
        path for path, settings in settings_in(study) if "learning_rate" in settings.get("optimizer", {})
    ]
    if study.sweep.values and own_rates:
        place = (*own_rates[0], "optimizer", "learning_rate")
        raise OptionError(place, f"{'.'.join(place)} is set, and sweep.values too; leave one out")


def built(kind: Any, value: Any) -> Any:
    """Make dataclasses of mappings as a file has them, which are checked already.

    Args:
      kind: type of the value, without limits.
      value: of a file.
    """
    parts = get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        kinds = get_type_hints(kind)
        return kind(**{name: built(kinds[name], inner) for name, inner in value.items()})  # type: ignore[operator]
    if is_union(kind) and isinstance(value, list):
        return built(next((part for part in parts if get_origin(part) is list), kind), value)
    if get_origin(kind) is dict:
        return {name: built(parts[1], inner) for name, inner in value.items()}
    if get_origin(kind) is list:
        return [built(parts[0], inner) for inner in value]
    return float(value) if type(value) is int and float in (kind, *parts) else value
