"""The directory of an evaluation: what was asked, and every answer, at whatever moment it is killed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from fr3e_jax.config import ConfigError
from fr3e_jax.evaluation.answers import Answer, Ask
from fr3e_jax.evaluation.settings import NEWER
from fr3e_jax.parallel.hosts import Hosts, is_first
from fr3e_jax.run.jsonl import LineWriter
from fr3e_jax.run.run_dir import arrows
from fr3e_jax.run.storage import location, write_atomically

ANSWERS, SETTINGS, SUMMARY = "answers.jsonl", "evaluation.yaml", "summary.json"
RESOLVED = "resolved"  # in SETTINGS: what `auto` and defaults came to


def open_directory(directory: Path, settings: dict[str, Any], answered: bool) -> None:
    """Make the directory, or go on in one that holds the same evaluation.

    Args:
      directory: of the evaluation.
      settings: what is asked of whom.
      answered: whether it holds answers; without any, it may begin anew with other settings.

    Raises:
      ConfigError: it holds another one, or cannot be made.
    """
    held = held_settings(directory)
    if not held or not answered:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_settings(directory, settings)
        except OSError as error:
            raise ConfigError(f"--out {directory} cannot be written: {error}") from None
        return
    # What `auto` and a branch of the hub came to may also be given.
    held = NEWER | held
    resolved = held | (held.get(RESOLVED) or {})
    changed = {
        name: (resolved.get(name), value)
        for name, value in settings.items()
        if value not in (held.get(name), resolved.get(name))
    }
    if changed:
        refuse(directory, changed)


def note_resolved(directory: Path, resolved: dict[str, Any]) -> None:
    """Write down what the settings came to, or go on where they come to the same as before.

    Args:
      directory: of the evaluation, which is open.
      resolved: the model with its commit, what `auto` stands for, and the like.

    Raises:
      ConfigError: they came to something else when the evaluation was begun, on another machine perhaps.
    """
    held = held_settings(directory)
    before = held.get(RESOLVED)
    if before is None:
        write_settings(directory, held | {RESOLVED: resolved})
    elif changed := {
        name: (before.get(name), now) for name, now in resolved.items() if before.get(name) != now
    }:
        refuse(directory, changed)


def refuse(directory: Path, changed: dict[str, tuple[Any, Any]]) -> NoReturn:
    """Refuse a directory that holds another evaluation, by name -> (its value, the value that was given)."""
    raise ConfigError(
        f"{directory} holds an evaluation with other settings: {arrows(dict(sorted(changed.items())))}; "
        f"choose another --out, or restore them as its {SETTINGS} has them"
    )


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write what is asked of whom, in one rename."""
    write_atomically(
        location(str(directory / SETTINGS)), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    )


def held_settings(directory: Path) -> dict[str, Any]:
    """Read what an evaluation was begun with; nothing where there is none.

    Raises:
      ConfigError: it is damaged.
    """
    file = directory / SETTINGS
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file} cannot be read ({' '.join(str(error).split())}); choose another --out"
        ) from None
    if not isinstance(held, dict):
        raise ConfigError(f"{file} is damaged; choose another --out")
    return held


def without_done(
    benchmark: str, asks: list[Ask], held: Sequence[dict[str, Any]], directory: Path, hosts: Hosts
) -> list[Ask]:
    """Find the answers of a benchmark that are still to be asked for.

    Args:
      benchmark: its name.
      asks: all that it wants.
      held: the answers that there are, of all benchmarks; none in other processes than the first.
      directory: of the evaluation.
      hosts: all processes, which learn what the first one knows.

    Raises:
      ConfigError: the answers that there are belong to other problems.
    """
    done = np.zeros(len(asks), np.int32)
    places = {(ask.number, ask.sample): i for i, ask in enumerate(asks)}
    for line in held:
        if line["benchmark"] != benchmark:
            continue
        place = places.get((line["problem"], line["sample"]))
        problem = None if place is None else asks[place].problem
        if problem is None or (line["question"], line["answer"]) != (problem.question, problem.answer):
            raise ConfigError(
                f"{directory / ANSWERS} was begun with other problems of {benchmark} (problem "
                f"{line['problem']}); restore them, or choose another --out"
            )
        done[place] = 1
    done = hosts.add_up(done, f"the answers to {benchmark} that there are")
    return [ask for ask, answered in zip(asks, done, strict=True) if not answered]


class Writer:
    """Appends answers to a file, as lines that are whole whenever the command is killed.

    Only the first process writes.
    """

    def __init__(self, path: Path, seen: Callable[[str], str]) -> None:
        """Prepare to write; the file is opened with the context.

        Args:
          path: of the file.
          seen: a question -> the prompt as the model sees it.
        """
        self.path = path
        self.seen = functools.cache(seen)  # each sample asks it again
        self.file: LineWriter | None = None

    def __enter__(self) -> "Writer":
        if is_first():
            self.file = LineWriter(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(
        self, benchmark: str, asks: Sequence[Ask], answers: Sequence[Answer], settings: dict[str, Any]
    ) -> None:
        """Write answers with how they were asked for, and wait until they are on the disk."""
        if self.file is None:
            return
        lines = [
            {
                "benchmark": benchmark,
                "problem": ask.number,
                "sample": ask.sample,
                "question": ask.problem.question,
                "answer": ask.problem.answer,
                "prompt": self.seen(ask.problem.question),
                "settings": settings,
                **dataclasses.asdict(answer),
            }
            for ask, answer in zip(asks, answers, strict=True)
        ]
        self.file.write(lines, sync=True)
