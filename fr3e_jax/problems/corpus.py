"""The problems of a run: its sources, mixed, and the held-out ones."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

from fr3e_jax.config import ConfigError, DataConfig, SourceConfig
from fr3e_jax.config.values import OptionError, OptionPath, nearest
from fr3e_jax.pretrained.text import Text
from fr3e_jax.problems.additions import make_addition
from fr3e_jax.problems.datasets import DATASETS, MIXTURES
from fr3e_jax.problems.gym import GymTask
from fr3e_jax.problems.overlap import normalised, report
from fr3e_jax.problems.own_task import COMPARED, OwnTask, is_own
from fr3e_jax.problems.sources import DROP_BAD, FileTask, file_task, read, stream
from fr3e_jax.problems.task import Task
from fr3e_jax.problems.unsayable import require_template, sayable, unwritable
from fr3e_jax.rewards.rules import named_scorers
from fr3e_jax.types import Problem

GYM = "gym:"
ADDITIONS = ("carry_addition", "word_addition")
FIRST = 4  # problems of a source without end, or of one's own, by which it is known again
GENERATED = 256  # problems that a model is judged by, of a source that makes them without end


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run trains on and is judged by.

    tasks: one for each source. weights: their shares of the queries. held_out: problems to evaluate on.
    messages: lines for people. checksum: of the problems, in [0, 2^31).
    """

    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    held_out: list[Problem]
    messages: tuple[str, ...]
    checksum: int

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers that its problems have."""
        return sorted({task[0].scorer for task in self.tasks} | {p.scorer for p in self.held_out})

    def stream(self, seed: int) -> Any:
        """The training problems by their position, without end."""
        return stream(self.tasks, self.weights, seed)


def sources_of(source: str | list[SourceConfig]) -> list[SourceConfig]:
    """List the sources that `data.source` names; the parts of a mixture share its weight.

    Raises:
      ConfigError: there is none, or a weight is not above 0.
    """
    if not source:
        raise ConfigError("data.source is empty; name a source")
    expanded = []
    for one in [SourceConfig(source)] if isinstance(source, str) else source:
        if not 0 < one.weight < math.inf:
            raise ConfigError(f"the weight of source {one.name} is {one.weight}, must be above 0")
        parts = MIXTURES.get(one.name, [one])
        total = sum(part.weight for part in parts)
        expanded += [dataclasses.replace(part, weight=one.weight * part.weight / total) for part in parts]
    return expanded


def names_of(data: DataConfig) -> list[str]:
    """Names of the sources as they stand in the configuration."""
    return [data.source] if isinstance(data.source, str) else [source.name for source in data.source]


def make_task(
    source: SourceConfig, data: DataConfig, seed: int, held_out: int, solutions: bool = False
) -> Task:
    """Make the task of a source.

    Args:
      source: its name and settings.
      data: the run's data section.
      seed: of the run; generated problems are a function of it.
      held_out: problems that a data set keeps for evaluation.
      solutions: read the worked solutions of files too.

    Raises:
      ConfigError: it cannot be had; the message says what to change.
    """
    refuse_unread(source, path_of(source, data))
    if source.name in ADDITIONS:
        return make_addition(source.name, data)
    if source.name.startswith(GYM):
        return GymTask(source.name.removeprefix(GYM), source.parameters, seed)
    if is_own(source.name):
        return OwnTask(source.name, source.parameters)
    return file_task(source, held_out, data.bad_rows, data.held_out is None, solutions)


def is_made(name: str) -> bool:
    """Whether a program makes a source's problems and keeps some for evaluation; others are in files."""
    return name in ADDITIONS or name.startswith(GYM) or is_own(name)


def path_of(source: SourceConfig, data: DataConfig) -> OptionPath:
    """Where a source stands in the configuration, so that its file and line can be named."""
    named = [] if isinstance(data.source, str) else [one.name for one in data.source]
    number = (named.index(source.name),) if source.name in named else ()
    return ("data", "source", *number)


def refuse_unread(source: SourceConfig, path: OptionPath = ()) -> None:
    """Refuse settings that a source of this kind does not read, and scorers that are not there.

    Args:
      source: its name and settings.
      path: where it stands in the configuration.

    Raises:
      OptionError: it has one.
    """
    if source.name in ADDITIONS:
        reads = {"name", "weight"}
    elif is_made(source.name):
        reads = {"name", "weight", "parameters"}
    else:
        reads = {field.name for field in dataclasses.fields(source)} - {"parameters"}
    plain = SourceConfig(source.name)
    given = [f.name for f in dataclasses.fields(source) if getattr(source, f.name) != getattr(plain, f.name)]
    if unread := sorted(set(given) - reads):
        raise OptionError(
            (*path, unread[0]), f"source {source.name} reads no {', '.join(unread)}; leave it out"
        )
    known_scorer = source.scorer is None or source.scorer in named_scorers() or is_own(source.scorer)
    if not known_scorer and source.scorer is not None:
        near = nearest(source.scorer, named_scorers())
        raise OptionError(
            (*path, "scorer"),
            f"the scorer of source {source.name} is {source.scorer!r}; "
            + (f"did you mean {near}? Scorers are" if near else "choose one of")
            + f" {', '.join(named_scorers())}, or a file *.py with a function score",
        )


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a configuration names: sources, the task of each, and the held-out problems.

    messages: lines for people on answers of a held-out source that can never be right.
    """

    sources: list[SourceConfig]
    tasks: list[Task]
    held_out: list[Problem]
    messages: tuple[str, ...]


def chosen_tasks(data: DataConfig, seed: int, solutions: bool = False) -> Chosen:
    """Read, or make, the tasks of a configuration and choose its held-out problems.

    Args:
      data: the data section.
      seed: of the run; generated problems are a function of it.
      solutions: read the worked solutions of files too.

    Raises:
      ConfigError: a source cannot be had, or has too few held-out problems.
    """
    sources = sources_of(data.source)
    wanted = GENERATED if data.held_out is None else data.held_out
    share, more = divmod(0 if data.held_out_source else wanted, len(sources))
    tasks, held_out = [], []
    messages: tuple[str, ...] = ()
    for i, source in enumerate(sources):
        count = share + (i < more)
        task = make_task(source, data, seed, count, solutions)
        held_out += task.held_out(count) if count else []
        tasks.append(task)
    if data.held_out_source:
        held_out, messages = judging_problems(judging_source(data.held_out_source), seed, wanted)
    elif data.held_out is not None and len(held_out) < data.held_out:
        raise ConfigError(
            f"data.held_out is {data.held_out}, but {', '.join(names_of(data))} has only {len(held_out)} "
            "held-out problems; lower it"
        )
    return Chosen(sources, tasks, held_out, messages)


def make_corpus(data: DataConfig, seed: int, text: Text, max_prompt: int) -> Corpus:
    """Read, or make, the problems of a run.

    A problem of a data set that is held out, of whichever source, is left out of training.

    Raises:
      ConfigError: a source cannot be had, has no problems, or has queries of more than `max_prompt` tokens
        where they are refused.
    """
    chosen = chosen_tasks(data, seed)
    sources, tasks, messages = chosen.sources, list(chosen.tasks), list(chosen.messages)
    # Of a source that models are judged by nothing is left out.
    others = "keep" if data.held_out_source else data.bad_rows
    held_out, lines = sayable(chosen.held_out, text, "held-out problems", others, DROP_BAD)
    messages += lines
    require_template(held_out[0], text)
    fitting(held_out, text, max_prompt, "refuse", "held-out problems", "")
    asked = {normalised(problem.asked) for problem in held_out}
    from_files: list[Problem] = []
    for i, (source, task) in enumerate(zip(sources, tasks, strict=True)):
        if not isinstance(task, FileTask):
            messages += made_sayable(task, text, source.name)
            continue
        apart = [p for p in task.problems if normalised(p.asked) not in asked]
        messages += [*task.messages, *left_out(source.name, len(task) - len(apart), "that are held out")]
        apart, lines = sayable(apart, text, source.name, data.bad_rows, DROP_BAD)
        kept = fitting(apart, text, max_prompt, data.too_long, source.name)
        messages += [
            *lines,
            *left_out(source.name, len(apart) - len(kept), f"of more than {max_prompt} tokens"),
        ]
        training = [apart[k] for k in kept]
        tasks[i] = FileTask(training, task.kept)
        from_files += training
    if from_files:
        messages.append(report(from_files, held_out))
    messages += control_texts(from_files + held_out, text)
    first = [task[i] for task in tasks for i in range(known(task))]
    weights = tuple(source.weight for source in sources)
    return Corpus(tuple(tasks), weights, held_out, tuple(messages), checksum([*first, *held_out]))


def made_sayable(task: Task, text: Text, name: str) -> list[str]:
    """Look at the first problems that a program makes for what the tokenizer cannot say.

    Returns:
      Lines for people on answers of a user's own task.

    Raises:
      ConfigError: a question has characters that the tokenizer cannot say.
    """
    count = {OwnTask: COMPARED, GymTask: FIRST}.get(type(task), GENERATED)
    problems, _ = sayable([task[k] for k in range(min(count, len(task)))], text, name)
    return unwritable(problems, text, name) if isinstance(task, OwnTask) else []


def known(task: Task) -> int:
    """Number of problems that the checksum of a task covers: all of a file's, few where each is made."""
    return len(task) if isinstance(task, FileTask) else min(FIRST, len(task))


def checksum(problems: Sequence[Problem]) -> int:
    """Checksum of questions and answers in their order, in [0, 2^31)."""
    total = 0
    for problem in problems:
        before = "".join(f"{role}\0{text}\0" for role, text in problem.before)
        written = f"{before}{problem.question}\0{problem.answer}\0"
        total = zlib.crc32(written.encode(errors="replace"), total)
    return total % 2**31


def left_out(name: str, count: int, which: str) -> list[str]:
    """A line for people on problems that are not trained on, if there are any."""
    return [f"{name}: {count:,} problems {which} are left out of training"] if count else []


def control_texts(problems: Sequence[Problem], text: Text) -> list[str]:
    """A line for people on questions that have the text of control tokens in them, if there are any."""
    tokens = [token for problem in problems if (token := text.control_in(problem.question, problem.before))]
    if not tokens:
        return []
    return [
        f"{len(tokens):,} questions have control tokens in them, such as {tokens[0]!r}; they are read as text"
    ]


def fitting(
    problems: Sequence[Problem],
    text: Text,
    max_prompt: int,
    too_long: str,
    whose: str,
    remedy: str = ", or use --data.too_long drop",
) -> list[int]:
    """Find the problems that give queries of at most `max_prompt` tokens.

    Raises:
      ConfigError: none does; or one does not, and `too_long` is `refuse`.
    """
    lengths = text.query_lengths([p.question for p in problems], [p.before for p in problems])
    kept = [i for i, length in enumerate(lengths) if length <= max_prompt]
    if not kept or (too_long == "refuse" and len(kept) < len(problems)):
        if not problems:
            raise ConfigError(f"{whose}: no problem is left to train on; lower data.held_out")
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise ConfigError(
            f"{whose}: {len(problems) - len(kept)} of {len(problems)} queries have more than "
            f"rollout.max_prompt {max_prompt} tokens, the longest {lengths[longest]} "
            f"({problems[longest].question[:60]!r}); raise it{remedy}"
        )
    return kept


def judging_source(name: str, file: str | None = None) -> SourceConfig:
    """Make a source that models are judged by: the split that a named data set has, and `test` of others."""
    if is_made(name):
        return SourceConfig(name)
    return SourceConfig(name, split=None if name in DATASETS else "test", file=file)


def judging_problems(source: SourceConfig, seed: int, limit: int) -> tuple[list[Problem], tuple[str, ...]]:
    """The problems of a source that models are judged by: of a data set all, of others the held-out ones.

    None is left out, whatever its answer is: another number of problems would be another benchmark.

    Args:
      source: its name and settings.
      seed: of generated problems.
      limit: take the first so many; 0 takes all of a data set, and 256 that are generated.

    Returns:
      (the problems, lines for people on answers that can never be right).

    Raises:
      ConfigError: they cannot be had, or too many answers can never be right.
    """
    if is_made(source.name):
        return make_task(source, DataConfig(), seed, 0).held_out(limit or GENERATED), ()
    problems, messages = read(source)
    return problems[: limit or None], messages
