"""A run's directory: new, or held by a run that goes on."""

from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fr3e_jax.config import Config, ConfigError, dump
from fr3e_jax.host.metrics import write_atomically

CONFIG_FILE = "config.yaml"

RESUMABLE = {"steps", "run_dir", "resume", "evaluate", "checkpoint", "mesh"}
"""Settings that a resumed run may have otherwise than the run that it goes on with."""


def refuse_other_settings(config: Config) -> None:
    """Refuse a run directory that holds another run.

    Raises:
      ConfigError: the directory holds a run that was started with other settings, or `resume: never`
        meets a checkpoint.
    """
    if config.run_dir is None or not any((Path(config.run_dir) / "checkpoints").glob("[0-9]*")):
        return
    directory = config.run_dir
    if config.resume == "never":
        raise ConfigError(f"{directory} holds a checkpoint; choose another --run_dir, or --resume auto")
    old = yaml.safe_load((Path(directory) / CONFIG_FILE).read_text())
    changed = differing(old, yaml.safe_load(dump(config)))
    if changed:
        raise ConfigError(
            f"{directory} was started with other settings of {', '.join(changed)}; choose another "
            f"--run_dir, or restore them as its {CONFIG_FILE} has them"
        )


def open_run_dir(config: Config, name: str) -> Path:
    """Make the run's directory and write config.yaml into it; by default it is named after the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = Path(config.run_dir or f"runs/{name}-{stamp}")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / CONFIG_FILE, dump(config))
    return directory


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the settings that a resumed run may not change and that differ."""
    names = []
    for key in sorted(set(new) - RESUMABLE):
        if isinstance(new[key], dict):
            names += [f"{key}.{k}" for k, v in new[key].items() if (old.get(key) or {}).get(k) != v]
        elif old.get(key) != new[key]:
            names.append(key)
    return names
