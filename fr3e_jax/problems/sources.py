"""Problems from files: JSON lines, CSV, TSV or parquet, here or of a data set of the Hugging Face hub.

The files are read as data, never a repository's own code. What is wrong in one is an error that names the
file and the line.
"""

import dataclasses
import fnmatch
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import grain
from huggingface_hub import constants

from fr3e_jax.config import BadRows, ConfigError, SourceConfig
from fr3e_jax.pretrained.hub import snapshot
from fr3e_jax.problems.answers import EXAMPLES, judged_answers
from fr3e_jax.problems.columns import BadRow, problems_of
from fr3e_jax.problems.datasets import DATASETS, MIXTURES, DataSet
from fr3e_jax.problems.overlap import normalised
from fr3e_jax.problems.rows import READERS
from fr3e_jax.problems.task import Task
from fr3e_jax.types import Problem

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of a split's files, as the hub's own library knows them."""
TENTH = 10  # of the questions, one in so many is held out by default
DROP_BAD = ", or use --data.bad_rows drop"
MANY = 4  # of the questions, more than one in so many held out are told
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True)
class FileTask:
    """Problems of a source that are in memory.

    kept: the held-out ones, all different and none of the others. messages: lines for people on its rows.
    """

    problems: list[Problem]
    kept: list[Problem]
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of training problems."""
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        """A training problem."""
        return self.problems[index]

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` held-out problems.

        Raises:
          ConfigError: there is none.
        """
        if not self.kept:
            raise ConfigError("no problems are held out; raise data.held_out, or use data.held_out_source")
        return self.kept[:count]


def file_task(
    source: SourceConfig,
    held_out: int,
    bad_rows: BadRows = "refuse",
    tenth: bool = False,
    solutions: bool = False,
) -> FileTask:
    """Read a source and hold some of its problems out.

    They are chosen by a hash of the question: whatever the order of the rows, the same ones are held out, and
    fewer are a part of more. What repeats a held-out question is left out.

    Args:
      source: where the problems are.
      held_out: how many to keep for evaluation.
      bad_rows: what becomes of rows that hold no problem, and of answers that can never be right.
      tenth: keep no more than a tenth of the different questions, but one.
      solutions: read worked solutions too.

    Raises:
      ConfigError: the problems cannot be had, or are too few; the message says what to change.
    """
    problems, messages = read(source, bad_rows == "drop", DROP_BAD, solutions)
    if not held_out:
        return FileTask(problems, [], messages)
    texts = [normalised(problem.asked) for problem in problems]
    order = sorted(set(texts), key=lambda text: (zlib.crc32(text.encode()), text))
    if tenth:
        held_out = min(held_out, max(1, len(order) // TENTH))
    if held_out >= len(order):
        raise ConfigError(
            f"{source.name} has {len(order)} different questions, too few to hold {held_out} of them out and "
            "train on others; lower data.held_out, or use data.held_out_source"
        )
    first: dict[str, Problem] = {}
    for text, problem in zip(texts, problems, strict=True):
        # Not the first in the file: the choice does not depend on the order.
        first[text] = min(first.get(text, problem), problem, key=lambda p: (p.question, p.answer, p.before))
    kept = dict.fromkeys(order[:held_out])
    training = [problem for text, problem in zip(texts, problems, strict=True) if text not in kept]
    if not tenth and held_out * MANY > len(order):
        messages += (
            f"{source.name}: {held_out:,} of {len(order):,} different questions are held out, and "
            f"{len(order) - held_out:,} are left to train on; data.held_out {len(order) // TENTH} would be a "
            "tenth",
        )
    return FileTask(training, [first[text] for text in kept], messages)


def stream(tasks: Sequence[Task], weights: Sequence[float], seed: int) -> Any:
    """The training problems of tasks by their position, without end.

    Each task is shuffled anew in every epoch of its own, and has its share of any stretch of positions,
    within a hundredth of it.

    Args:
      tasks: at least one.
      weights: of the tasks, relative to each other.
      seed: of the run.
    """
    parts = [
        grain.MapDataset.source(task).seed((seed + i) % 2**32).shuffle().repeat()
        for i, task in enumerate(tasks)
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def read(
    source: SourceConfig, drop: bool = False, remedy: str = "", solutions: bool = False
) -> tuple[list[Problem], tuple[str, ...]]:
    """The problems of a source, in the order of its files, and lines for people on its bad rows.

    Args:
      source: where they are.
      drop: leave rows out that hold no problem, and answers that can never be right.
      remedy: what a person can do beside correcting them.
      solutions: read worked solutions too.

    Raises:
      ConfigError: a file cannot be had or read, or has no problem; a row holds none, or too many answers can
        never be right, and they are not to be left out. The message says what to change.
    """
    data = DATASETS.get(source.name)
    source = filled(source, data) if data else source
    files = files_of(source, data)
    good: list[Problem] = []
    broken: list[BadRow] = []
    for shown, file in files:
        for problem in problems_of(source, data, READERS[file.suffix](file, shown), solutions):
            if isinstance(problem, Problem):
                good.append(problem)
            elif drop:
                broken.append(problem)
            else:
                raise ConfigError(f"{problem}{remedy}")
    messages = []
    if broken:
        examples = ", ".join(str(row).partition(";")[0] for row in broken[:EXAMPLES])
        messages = [
            f"{source.name}: {len(broken):,} rows hold no problem and are left out, such as {examples}"
        ]
    if not good:
        if broken:
            raise ConfigError(f"{messages[0]}; none is left: name other columns")
        change = f" in which {dict(source.where)} holds; change where" if source.where else ""
        raise ConfigError(f"{', '.join(shown for shown, _ in files)}: there are no rows{change}")
    problems, about_answers = judged_answers(source.name, good, drop, remedy)
    return problems, (*messages, *about_answers)


def filled(source: SourceConfig, data: DataSet) -> SourceConfig:
    """Fill in what a source leaves open from its named data set."""
    return dataclasses.replace(
        source,
        split=source.split or data.split,
        subset=source.subset or data.subset,
        prompt=source.prompt or data.prompt,
        answer=source.answer or data.answer,
        answer_is=source.answer_is or data.answer_is,
        scorer=source.scorer or data.scorer,
        where={**data.where, **source.where},
    )


# --- files


def files_of(source: SourceConfig, data: DataSet | None) -> list[tuple[str, Path]]:
    """The files of a source, each with its name for people.

    Raises:
      ConfigError: there is no such source, or its files cannot be had.
    """
    split = source.split or "train"
    file = source.file or (source.name if PurePosixPath(source.name).suffix in READERS else None)
    if file:
        path = Path(os.path.expanduser(file))
        if not path.is_file():
            raise ConfigError(f"source {source.name!r}: there is no file {file!r}")
        if path.suffix not in READERS:
            raise ConfigError(f"{file} is none of *{', *'.join(READERS)}; convert it, or rename it")
        return [(file, path)]
    name = data.hub if data else source.name
    repository, at, revision = name.partition("@")
    here = not data and os.path.exists(os.path.expanduser(name))
    if here or repository.count("/") != 1 or (at and not revision):
        raise ConfigError(
            f"source {name!r} is none; give carry_addition, word_addition, gym:NAME, a mixture "
            f"({', '.join(MIXTURES)}), a named data set ({', '.join(DATASETS)}), a file "
            f"(*{', *'.join(READERS)}), a data set of the hub (Org/Name or Org/Name@REVISION), or a task of "
            "your own (FILE.py)"
        )
    known = known_files(source, data) if data else None
    wanted = [known] if known else [f"*{suffix}" for suffix in READERS]
    but = [*NO_DATA, *(f"*/{file}" for file in NO_DATA)]
    folder = snapshot(name, repository, revision or constants.DEFAULT_REVISION, "dataset", wanted, but)
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in READERS)
    chosen = fnmatch.filter(there, known) if known else of_split(there, split, source.subset)
    if not chosen:
        listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "none that can be read"
        asked = known or f"files of split {split!r}" + f", subset {source.subset!r}" * bool(source.subset)
        raise ConfigError(f"data set {name!r} has no {asked}; there are {listed}; change split or subset")
    folders = {subset_of(file, split) for file in chosen}
    if not known and len(folders) > 1:
        raise ConfigError(f"data set {name!r} has subsets {', '.join(sorted(folders))}; set subset to one")
    return [(f"{name}/{file}", folder / file) for file in chosen]


def known_files(source: SourceConfig, data: DataSet) -> str:
    """The pattern of a named data set's files.

    Raises:
      ConfigError: it has no such split or subset.
    """
    for setting, asked, own in (
        ("split", source.split, data.split),
        ("subset", source.subset, data.subset),
    ):
        if asked != own and f"{{{setting}}}" not in data.files:
            raise ConfigError(f"{source.name} has no {setting} {asked!r}; leave {setting} out")
    return data.files.format(split=source.split, subset=source.subset)


def of_split(files: list[str], split: str, subset: str | None) -> list[str]:
    """Choose the files of a split and a subset, by the hub's conventions for their names.

    Files that name no split at all are `train`. Of several formats the first of READERS is taken.
    """
    if subset:
        files = [file for file in files if subset in PurePosixPath(file).with_suffix("").parts]
    named = [file for file in files if names_split(file, split)]
    if not named and split == "train":
        named = [file for file in files if not any(names_split(file, other) for other in SPLITS)]
    formats = {PurePosixPath(file).suffix for file in named}
    taken = next((suffix for suffix in READERS if suffix in formats), None)
    return [file for file in named if PurePosixPath(file).suffix == taken]


def names_split(file: str, split: str) -> bool:
    """Whether a split is named in a file's path, as a word of its own."""
    words = "|".join(map(re.escape, SPLITS.get(split, (split,))))
    return bool(re.search(rf"(?<![^-._ /\d])({words})(?![^-._ /\d])", file))


def subset_of(file: str, split: str) -> str:
    """The name of a file's subset: its folder, without `data` and the split."""
    folders = PurePosixPath(file).parent.parts
    return "/".join(folder for folder in folders if folder != "data" and not names_split(folder, split))
