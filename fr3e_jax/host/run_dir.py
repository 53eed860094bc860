"""A run's directory: new, or held by a run that goes on."""

import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import yaml
from etils import epath
from flax import traverse_util

from fr3e_jax.config import Config, ConfigError, dump
from fr3e_jax.host.storage import location, write_atomically
from fr3e_jax.parallel.hosts import is_first

CONFIG_FILE = "config.yaml"

RESUMABLE = {
    "steps",
    "run_dir",
    "resume",
    "compilation_cache",
    "evaluate",
    "checkpoint",
    "mesh",
    "distributed",
    "model.export_dtype",
    "scoring.workers",
    "credit.max_rounds",
    "optimizer.micro_tokens",
    "optimizer.logit_chunk",
    "optimizer.remat",
    "optimizer.max_skipped",
}
"""Sections and settings that a resumed run may have otherwise: they do not change what is learned, or
are what a failed run is told to change. `steps` is none of them where the learning rate decays over it."""


def refuse_other_settings(config: Config) -> None:
    """Refuse a run directory that holds another run.

    Raises:
      ConfigError: the directory holds a run that was started with other settings, or any run where
        `resume` is `never`, or it is no directory; or several processes have none that they share.
    """
    if config.run_dir is None and jax.process_count() > 1:
        raise ConfigError(
            f"there are {jax.process_count()} processes; set --run_dir to a directory that all of them see, "
            "such as gs://BUCKET/PATH"
        )
    directory = location(config.run_dir or "runs")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; choose another --run_dir")
    file = directory / CONFIG_FILE
    if config.run_dir is None or not file.exists():
        return
    if config.resume == "never":
        raise ConfigError(f"{directory} holds a run; choose another --run_dir, or --resume auto")
    changed = differing(yaml.safe_load(file.read_text()), yaml.safe_load(dump(config)))
    if changed:
        raise ConfigError(
            f"{directory} was started with other settings of {', '.join(changed)}; choose another "
            f"--run_dir, or restore them as its {CONFIG_FILE} has them"
        )


def open_run_dir(config: Config, name: str) -> epath.Path:
    """Make the run's directory and write config.yaml into it; by default it is a new one.

    One process writes; before, all must have read what lies there.

    Raises:
      ConfigError: it cannot be made.
    """
    if config.run_dir is None:
        stamp = Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        free = next(d for i in itertools.count() if not (d := numbered(stamp, i)).exists())
        place = location(str(free))
    else:
        place = location(config.run_dir)
    try:
        if is_first():
            place.mkdir(parents=True, exist_ok=config.run_dir is not None)
            write_atomically(place / CONFIG_FILE, dump(config))
    except OSError as error:
        raise ConfigError(f"--run_dir {place} cannot be written: {error}") from None
    return place


def numbered(directory: Path, number: int) -> Path:
    """`directory`, or with a number from 1 behind its name."""
    return directory.with_name(f"{directory.name}-{number}") if number else directory


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the settings that a resumed run may not change and that differ."""
    before, after = flatten(old), flatten(new)
    resumable = RESUMABLE if after["optimizer.schedule"] == "constant" else RESUMABLE - {"steps"}
    return [
        name
        for name in sorted(after)
        if name not in resumable
        and name.partition(".")[0] not in resumable
        and before.get(name) != after[name]
    ]


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value."""
    return traverse_util.flatten_dict(config, sep=".")
