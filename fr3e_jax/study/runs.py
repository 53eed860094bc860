"""The runs of a study: their settings, the hash of these in a result, and their directories."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from flax import traverse_util

from fr3e_jax.config import Config, as_written, dump, resolve
from fr3e_jax.study.settings import NamedStudy

WITHOUT_INFLUENCE = (
    "run_dir",
    "resume",
    "compilation_cache",
    "checkpoint",
    "distributed",
    "record",
    "scoring.workers",
    "model.export_dtype",
)
"""Sections and options that change nothing in a run's result."""
HASH_LENGTH = 10


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """A training run of a study.

    sweep: whether it searches for a learning rate, and is not reported. config: its settings, seed and
    learning rate included, without run_dir.
    """

    study: str
    task: str
    arm: str
    seed: int
    learning_rate: float
    sweep: bool
    config: Config

    @property
    def label(self) -> str:
        """The run in one line for people."""
        rate = f", learning rate {self.learning_rate:g}" if self.sweep else ""
        return f"{self.study}: {self.task}, {self.arm}, seed {self.seed}{rate}"

    @property
    def settings(self) -> str:
        """The hash of all settings that change the result."""
        return hash_of(own_options(self.config))

    @property
    def place(self) -> str:
        """The run's directory within that of all runs; other settings have another one."""
        rate = f"rate-{self.learning_rate:g}-" if self.sweep else ""
        return f"{self.study}/{self.task}/{self.arm}/{rate}seed-{self.seed}-{self.settings}"

    def written(self, whole: bool) -> str:
        """The settings as YAML that `--config` reads.

        Args:
          whole: with options at their defaults, which an earlier version may not know.
        """
        if whole:
            return dump(self.config)
        return yaml.safe_dump(traverse_util.unflatten_dict(own_options(self.config), sep="."))

    def config_in(self, runs: Path) -> Config:
        """The run's settings with its directory in that of all runs."""
        return dataclasses.replace(self.config, run_dir=str(runs / self.place))


def own_options(config: Config) -> dict[str, Any]:
    """`section.option` -> value, of what has influence and is not at its default.

    An option that is added later, with a default that does what was done before, leaves this the same.
    """
    ours, usual = (
        traverse_util.flatten_dict(as_written(resolve(one)), sep=".") for one in (config, Config())
    )
    return {
        name: value
        for name, value in sorted(ours.items())
        if value != usual.get(name)
        and name not in WITHOUT_INFLUENCE
        and name.partition(".")[0] not in WITHOUT_INFLUENCE
    }


def hash_of(options: dict[str, Any]) -> str:
    """The hash of options, as hexadecimal digits."""
    text = json.dumps(options, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def with_seed(config: Config, seed: int, learning_rate: float) -> Config:
    """A configuration with another seed and learning rate."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(config, seed=seed, optimizer=optimizer)


def sweep_runs(named: NamedStudy) -> Iterator[StudyRun]:
    """The runs that search for a learning rate."""
    for (task, arm), config in named.configs.items():
        for rate in named.study.sweep.values:
            for seed in named.study.sweep.seeds:
                yield StudyRun(named.name, task, arm, seed, rate, True, with_seed(config, seed, rate))


def reported_runs(named: NamedStudy, rates: dict[str, float] | None = None) -> Iterator[StudyRun]:
    """The runs that are reported, seed by seed, so that a study that is cut short compares equal numbers.

    Args:
      rates: arm -> learning rate that was chosen; None: that of its settings. Arms that are not in it are
        left out.
    """
    for seed in named.study.seeds:
        for (task, arm), config in named.configs.items():
            if rates is not None and arm not in rates:
                continue
            rate = config.optimizer.learning_rate if rates is None else rates[arm]
            yield StudyRun(named.name, task, arm, seed, rate, False, with_seed(config, seed, rate))
