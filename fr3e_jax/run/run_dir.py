"""The directory of a run: which settings it may go on with, and what it holds."""

import dataclasses
import itertools
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import jax
import yaml
from etils import epath
from flax import traverse_util

from fr3e_jax.config import Config, ConfigError, SourceConfig, as_written, dump, resolve
from fr3e_jax.config.renamed import with_new_names
from fr3e_jax.parallel.hosts import is_first
from fr3e_jax.pretrained.hub import FINAL_MODEL, RUN_SETTINGS
from fr3e_jax.run.reporter import SUMMARY_FILE
from fr3e_jax.run.saved import CHECKPOINTS, saved_steps
from fr3e_jax.run.storage import FULL, StorageError, brief, location, write_atomically

OLD_HELD_OUT = 256  # what data.held_out was before its default was null
ALGORITHMS = get_args(get_type_hints(Config)["algorithm"])

RESUMABLE = {
    "steps",
    "run_dir",
    "resume",
    "compilation_cache",
    "evaluate",
    "end",
    "alarms",
    "report",
    "checkpoint",
    "record",
    "mesh",
    "distributed",
    "model.export_dtype",
    "scoring.workers",
    "rollout.queries",
    "rollout.cache_gb",
    "rollout.max_queries",
    "rollout.wait_for",
    "credit.max_rounds",
    "credit.short_batch",
    "optimizer.micro_tokens",
    "optimizer.logit_chunk",
    "optimizer.remat",
    "optimizer.max_skipped",
}
"""Sections and settings that may change when a run is resumed: they do not change what is learned, or an
error message advises to change them, such as what to lower where the memory does not suffice. The position in
the stream of questions counts single questions, and carried states are whole, so that rounds of another size
go on where those before ended. `steps` may not change where the learning rate decays over it."""


AnyPath = TypeVar("AnyPath", Path, epath.Path)


class LostSettingsError(Exception):
    """A run's config.yaml does not say its settings; the message says why."""


class MissingSettingsError(LostSettingsError):
    """There is no config.yaml."""


def refuse_other_settings(config: Config) -> LostSettingsError | None:
    """Refuse a run directory that holds another run.

    Returns:
      The reason why the settings of its run are not known from config.yaml, where that is missing or damaged.

    Raises:
      ConfigError: the directory holds a run with saved steps that was started with other settings, or any run
        where `resume` is `never`, or it is no directory; or several processes have none that they share.
    """
    if config.run_dir is None and jax.process_count() > 1:
        raise ConfigError(
            f"there are {jax.process_count()} processes; set --run_dir to a directory that all of them see, "
            "such as gs://BUCKET/PATH"
        )
    directory = location(config.run_dir or "runs")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; choose another --run_dir")
    if config.run_dir is None or not holds_run(directory):
        return None
    if config.resume == "never":
        raise ConfigError(f"{directory} holds a run; choose another --run_dir, or --resume auto")
    try:
        held = read_settings(directory)
    except LostSettingsError as error:
        return error
    if saved_steps(directory):
        refuse_differing(held, config, str(directory), f"its {RUN_SETTINGS} has")
    return None


def begun_anew(config: Config) -> list[str]:
    """Describe, for people, the settings that change where a run without a saved step begins anew."""
    if config.run_dir is None or not holds_run(directory := location(config.run_dir)):
        return []
    if saved_steps(directory):
        return []
    try:
        changed = changes(read_settings(directory), yaml.safe_load(dump(config)))
    except LostSettingsError:
        return []
    begins = f"{directory} has no saved step, and begins anew"
    return [f"{begins} with other settings: {arrows(changed)}" if changed else begins]


def completed(config: Config) -> dict[str, Any] | None:
    """What summary.json says of a complete run with which nothing is left to do; None of others.

    Something is left where more steps are asked for, where the model is to be exported in another type, and
    where it is not there any more.
    """
    if config.run_dir is None:
        return None
    directory = location(config.run_dir)
    try:
        held = read_settings(directory)
        summary = json.loads((directory / SUMMARY_FILE).read_text())
        now = as_written(config)
        same_rules = all(held.get(name, now[name]) == now[name] for name in ("end", "alarms"))
        decided = bool(summary.get("ended")) and same_rules
        done = decided or summary["steps"] >= config.steps
        same_type = held["model"]["export_dtype"] == config.model.export_dtype
    except (LostSettingsError, OSError, ValueError, KeyError, TypeError):
        return None
    there = (directory / FINAL_MODEL / "config.json").exists()
    return summary if done and same_type and there else None


def describe_completed(summary: dict[str, Any], config: Config) -> list[str]:
    """Lines for people on a run that is complete."""
    steps = summary["steps"]
    accuracies = [
        "not recorded" if share is None else f"{share:.1%}"
        for share in (summary.get("accuracy_before"), summary.get("accuracy_after"))
    ]
    lines = [
        f"{config.run_dir} holds a complete run of {steps} steps; nothing is left to do",
        f"held-out accuracy {accuracies[0]} -> {accuracies[1]}; model: {config.run_dir}/{FINAL_MODEL}",
    ]
    if ended := summary.get("ended"):
        others = "other rules of `end`, or other `alarms`, go on from there"
        lines.append(f"it ended before its last step, since {ended}; {others}")
    elif steps > config.steps:
        lines.append(
            f"--steps {config.steps} asks for fewer steps than it has; python -m fr3e_jax.export --run "
            f"{config.run_dir} --step N writes the model of an earlier step whose checkpoint is kept"
        )
    elif config.optimizer.schedule == "constant":
        lines.append(f"--steps with more than {steps} goes on from there")
    return lines


def what_may_change(message: str, run: epath.Path) -> str:
    """Say which of the settings that an error advises to change may change in the run directory.

    Args:
      message: of the error, in which the settings are named.
      run: directory.
    """
    if not saved_steps(run):
        return f"No step is saved in {run}: the same command with changed settings begins it anew."
    named = sorted(name for name in options(Config()) if re.search(rf"\b{re.escape(name)}\b", message))
    free = [name for name in named if not RESUMABLE.isdisjoint(beginnings(name))]
    may = f"of these only {', '.join(free)} may change" if free else "none of these may change"
    return f"{run} has saved steps, so that {may} there; for others choose another --run_dir."


def holds_run(directory: epath.Path) -> bool:
    """Decide whether a directory holds a run, perhaps one whose config.yaml is lost."""
    if (directory / RUN_SETTINGS).exists():
        return True
    # A model's directory may have a folder of that name as well.
    return (directory / CHECKPOINTS).is_dir() and not (directory / "config.json").exists()


def read_settings(directory: epath.Path) -> dict[str, Any]:
    """Read a run's settings from its config.yaml.

    Raises:
      LostSettingsError: there is no such file, or it holds no settings.
    """
    file = directory / RUN_SETTINGS
    if not file.exists():
        raise MissingSettingsError(f"{file} is missing")
    try:
        return parse_settings(file.read_text())
    except (OSError, ValueError) as error:
        raise LostSettingsError(f"{file} is damaged ({' '.join(str(error).split())})") from None


def parse_settings(text: str) -> dict[str, Any]:
    """Parse the text of a config.yaml into section -> option -> value, with the names that options have now.

    Raises:
      ValueError: it holds no settings.
    """
    try:
        held = yaml.safe_load(text)
        if isinstance(held, dict) and flatten(held):
            return with_new_names(held)
    except (RecursionError, yaml.YAMLError) as error:  # of values that hold themselves, for example
        raise ValueError(str(error)) from None
    raise ValueError("it is empty" if held is None else "it has no options")


def refuse_differing(held: dict[str, Any], config: Config, holder: str, where: str) -> None:
    """Refuse to go on with settings that may not change.

    Args:
      held: what the run was started with.
      config: what it is to go on with.
      holder: of `held`, for the message. where: "SOMETHING has" them.

    Raises:
      ConfigError: they differ, or some are unknown here.
    """
    ours = yaml.safe_load(dump(config))
    known = options(config)
    if unknown := sorted(name for name in flatten(held) if not known & set(beginnings(name))):
        raise ConfigError(
            f"{holder} was started with options that this version does not know: {', '.join(unknown)[:200]}; "
            "go on with the version that began it, or choose another --run_dir"
        )
    if changed := changes(held, ours):
        raise ConfigError(
            f"{holder} was started with other settings: {arrows(changed)}; choose another --run_dir, or "
            f"restore them as {where} them"
        )


def open_run_dir(config: Config, name: str) -> epath.Path:
    """Make the run's directory, by default a new one, and write config.yaml into it.

    The first process writes, after all have read what lies there.

    Raises:
      ConfigError: it cannot be made.
      StorageError: the disk is full.
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
            write_atomically(place / RUN_SETTINGS, dump(config))
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"--run_dir {place} cannot be written ({brief(error)})") from None
        raise ConfigError(f"--run_dir {place} cannot be written: {error}") from None
    return place


def numbered(directory: AnyPath, number: int) -> AnyPath:
    """Append a number to the name of a directory; 0 leaves it as it is."""
    return directory.with_name(f"{directory.name}-{number}") if number else directory


def changes(old: dict[str, Any], new: dict[str, Any], allowed: bool = False) -> dict[str, tuple[Any, Any]]:
    """Name -> (old value, new value) of the settings that differ and that a resumed run may not change.

    With `allowed` of those that it may change.
    An option that `old` does not have is newer than the version that wrote it, and has its default: what
    that version did. So the default of a new option must be what was done before there was a choice.
    """
    after = flatten(new)
    algorithm = flatten(old).get("algorithm", after["algorithm"])
    implied = resolve(Config(algorithm=algorithm if algorithm in ALGORITHMS else "fr3e"))
    before = flatten(yaml.safe_load(dump(implied))) | flatten(old)
    resumable = RESUMABLE if after["optimizer.schedule"] == "constant" else RESUMABLE - {"steps"}
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if allowed == (name in resumable or name.partition(".")[0] in resumable)
        and not alike(name, before.get(name), after.get(name))
    }


def alike(name: str, old: Any, new: Any) -> bool:
    """Whether two values of a setting ask for the same; an earlier version may have written the old one.

    Where the default of data.held_out says something else than it did, the problems' checksum tells.
    """
    if name == "data.held_out" and new is None:
        return old in (None, OLD_HELD_OUT)
    if name == "data.source" and isinstance(old, list) and all(isinstance(one, dict) for one in old):
        usual = as_written(SourceConfig(""))  # of options that are newer than what was written
        old = [usual | one for one in old]
    return bool(old == new)


def arrows(changed: dict[str, tuple[Any, Any]]) -> str:
    """Write changes as `name: old -> new`, as in YAML."""

    def short(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
        text = text.removesuffix("...\n").strip()
        return text if len(text) <= 60 else text[:57] + "..."

    return ", ".join(f"{name}: {short(old)} -> {short(new)}" for name, (old, new) in changed.items())


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten settings to `section.key` -> value."""
    flat = traverse_util.flatten_dict(config, keep_empty_nodes=False)
    return {".".join(map(str, path)): value for path, value in flat.items()}


def options(config: Any, prefix: str = "") -> set[str]:
    """Collect the names of all options of a configuration, `section.key`."""
    names = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        names |= options(value, f"{prefix}{field.name}.") if inner else {prefix + field.name}
    return names


def beginnings(name: str) -> list[str]:
    """Split `a.b.c` into `a`, `a.b`, `a.b.c`, one of which is an option; its value may be a mapping."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
