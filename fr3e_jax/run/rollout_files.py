"""Every rollout of a run: a parquet file for each recorded step, a row for each response.

Files are made and written in a thread beside the step. Each appears in one rename, so that a kill leaves a
whole file or none.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, Shaped

from fr3e_jax.config import ConfigError
from fr3e_jax.run.storage import in_bucket, write_atomically, writing

ROLLOUTS, ASIDE = "rollouts", "aside"  # the folder in a run directory, and the folder in it of repeated steps
FILE_NAME = re.compile(r"step-(\d{6,})\.parquet")
FREED = 0.9  # of record.max_gb is what the files take after some are deleted
ROWS = 1024  # that can be read without the others of a file
REPEATED = ("question", "answer", "source", "kind", "reason", "extracted", "rejected")


class Column(NamedTuple):
    """A column of the files: the type of its values, and what they say."""

    kind: str
    help: str


ROLLOUT_COLUMNS: dict[str, Column] = {
    "step": Column("int32", "training step, as in metrics.jsonl"),
    "round": Column("int32", "sampling round within the step, from 0"),
    "query": Column("int64", "place of the question in the stream of questions"),
    "question": Column("string", "the question"),
    "answer": Column("string", "its right answer"),
    "source": Column("string", "the source of problems that it is of"),
    "query_token": Column("list<int32>", "ids that the model saw before its response"),
    "kind": Column("string", "`base`, a base trajectory, or `partial`, a partial rollout"),
    "trajectory": Column("int32", "which base trajectory of the query, from 0"),
    "kept": Column("bool", "whether that trajectory is explored"),
    "state": Column("int32", "j of the state S_j that the rollout starts from; 0 is the bare query"),
    "position": Column("int32", "tokens of the base trajectory before the state"),
    "statistic": Column("float32", "score that explore.rule gave the token at the position"),
    "rollout": Column("int32", "which rollout of the state, from 0"),
    "token": Column("list<int32>", "ids of the response; of a partial rollout those behind the state"),
    "logprob": Column("list<float32>", "log-probability of each, temperature 1, nats"),
    "entropy": Column("list<float32>", "entropy of the policy before each is drawn, nats"),
    "text": Column("string", "the ids as text, without control tokens"),
    "ends": Column("list<int32>", "characters of `text` up to the end of each token"),
    "stopped": Column("bool", "whether the response ended by itself; otherwise the length limit cut it off"),
    "right": Column("bool", "whether the reward is at least reward.success_at"),
    "reason": Column("string", "why the scorer judged so, where it says; or named parts of its score"),
    "extracted": Column("string", "the part of the whole answer that was judged, at most 1,000 characters"),
    "reward": Column("float32", "reward of the whole answer"),
    "value": Column("float32", "V(S_j)"),
    "alpha": Column("float32", "the factor alpha_j of the state's advantages"),
    "advantage": Column("float32", "modulated advantage of the rollout, where it counts"),
    "accepted": Column("bool", "whether the state is trained on"),
    "rejected": Column(
        "string", "why it is not: `all right`, `all wrong`, `equal rewards`, `not counted`, `rule`"
    ),
}
"""Name -> column, in the order of the files."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Lists of different lengths that lie one behind the other. length: of each list."""

    values: Shaped[np.ndarray, " all"]
    length: Int[np.ndarray, " rows"]


RolloutRows = dict[str, Any]
"""Name -> the values of all rows: an array, masked where values are missing; a list of texts; or `Ragged`."""


def file_of(step: int) -> str:
    """The name of the parquet file that holds the rollouts of a step."""
    return f"step-{step:06}.parquet"


def steps_in(folder: epath.Path) -> dict[int, epath.Path]:
    """Find the files in a folder: step -> file, ascending; nothing where there is no folder."""
    if not folder.exists():
        return {}
    named = [(FILE_NAME.fullmatch(file.name), file) for file in folder.iterdir()]
    return dict(sorted((int(match[1]), file) for match, file in named if match))


def read_rollouts(run: epath.PathLike, step: int | None = None, columns: Sequence[str] | None = None) -> Any:
    """Read the rollouts of a run as a pyarrow.Table, `.to_pandas()` of which is a data frame.

    Args:
      run: directory of the run, which may still be going on.
      step: whose rollouts are read; None reads those of all recorded steps, in their order.
      columns: names of those that are read; None reads all.

    Raises:
      ConfigError: the run has no rollouts (of that step), or a file is damaged.
    """
    import pyarrow.parquet  # which takes a while

    found = steps_in(epath.Path(run) / ROLLOUTS)
    if step is not None and step not in found:
        held = f"those of steps {', '.join(map(str, found))}" if found else "none"
        raise ConfigError(f"{run} has no rollouts of step {step}; it has {held:.200}")
    if not found:
        raise ConfigError(f"{run} has no rollouts; record.every 1 keeps those of every step")
    tables = []
    for file in found.values() if step is None else (found[step],):
        try:
            raw = pyarrow.BufferReader(file.read_bytes())
            tables.append(pyarrow.parquet.read_table(raw, columns=None if columns is None else list(columns)))
        except (pyarrow.ArrowException, OSError) as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigError(f"{file} is damaged ({why}); delete it, and the others can be read") from None
    return pyarrow.concat_tables(tables)


def table_of(columns: RolloutRows) -> Any:
    """Make a pyarrow.Table of all columns of some rows.

    Half of a surrogate pair, which is no text, is written as an escape.
    """
    import pyarrow as pa

    arrays = []
    for name, column in ROLLOUT_COLUMNS.items():
        values, kind = columns[name], column.kind.removeprefix("list<").removesuffix(">")
        inner = pa.bool_() if kind == "bool" else getattr(pa, kind)()
        if isinstance(values, Ragged):
            offsets = np.concatenate([[0], np.cumsum(values.length)]).astype(np.int32)
            arrays.append(pa.ListArray.from_arrays(offsets, pa.array(values.values, inner)))
            continue
        try:
            arrays.append(pa.array(values, inner))
        except UnicodeEncodeError:
            values = [None if x is None else x.encode("utf-8", "backslashreplace").decode() for x in values]
            arrays.append(pa.array(values, inner))
    return pa.table(arrays, list(ROLLOUT_COLUMNS))


def encode_tables(tables: Sequence[Any]) -> bytes:
    """Encode tables as one parquet file."""
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    with pyarrow.parquet.ParquetWriter(
        sink,
        tables[0].schema,
        compression="zstd",
        compression_level=1,
        # Ids and texts come again and again; numbers of tokens hardly do.
        use_dictionary=[*REPEATED, "query_token.list.element"],
        write_statistics=[
            name for name, column in ROLLOUT_COLUMNS.items() if column.kind in ("int32", "int64")
        ],
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROWS)
    return bytes(sink.getvalue())


def to_thin(sizes: Mapping[int, int], most: float) -> list[int]:
    """Choose the steps whose files are deleted when all take more than `most` bytes; none where they do not.

    Of older steps more are deleted than of newer ones, until the rest takes nine tenths of `most`: always the
    one whose neighbours are nearest to each other, compared with how long ago it was. The first step goes
    when only the last one is left beside it; the last one stays.

    Args:
      sizes: step -> bytes.
      most: bytes.
    """
    left, total, deleted = sorted(sizes), sum(sizes.values()), []
    if total <= most:
        return []
    while total > FREED * most and len(left) > 1:
        newest = left[-1]
        gaps = [
            ((after - before) / (newest - step), step)
            for before, step, after in zip(left, left[1:], left[2:], strict=False)
        ]
        step = min(gaps)[1] if gaps else left[0]
        left.remove(step)
        deleted.append(step)
        total -= sizes[step]
    return deleted


class RolloutFiles:
    """Writes the rollouts of a run in a thread, those of a step while the step goes on.

    messages: lines for people on files that were set aside or deleted, until they are taken.
    """

    def __init__(self, run: epath.PathLike, start: int, max_gb: float) -> None:
        """Open the files of a run that goes on from step `start`.

        Files of later steps, which the run repeats, are set aside in the folder `aside`.

        Args:
          run: its directory.
          start: step of its checkpoint; 0 where it begins.
          max_gb: most that all files may take, GiB.

        Raises:
          StorageError: they cannot be moved.
        """
        self.folder = epath.Path(run) / ROLLOUTS
        self.most, self.max_gb = max_gb * 2**30, max_gb
        self.messages: collections.deque[str] = collections.deque()
        with writing(self.folder):
            found = steps_in(self.folder)
            self.sizes = {step: file.stat().length for step, file in found.items() if step <= start}
            later = {step: file for step, file in found.items() if step > start}
            for step, file in later.items():
                (self.folder / ASIDE).mkdir(exist_ok=True)
                set_file_aside(file, self.folder / ASIDE / file_of(step))
            self.aside = {s: f.stat().length for s, f in steps_in(self.folder / ASIDE).items()}
        if later:
            self.messages.append(
                f"rollouts of steps behind step {start} are repeated: {len(later)} files are set aside in "
                f"{self.folder / ASIDE}"
            )
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self.rounds: list[Future[Any]] = []
        self.pending: list[Future[None]] = []

    def add(self, columns: Callable[[], RolloutRows]) -> None:
        """Make the rows of a round of the step that goes on, in the thread."""
        self.rounds.append(self.thread.submit(lambda: table_of(columns())))

    def end(self, step: int) -> None:
        """Write the rounds of a step that were added, in the thread.

        Raises:
          StorageError: the file of a step before could not be written.
        """
        self.wait()
        rounds, self.rounds = self.rounds, []
        if rounds:
            self.pending.append(self.thread.submit(self.write, step, rounds))

    def write(self, step: int, rounds: Sequence[Future[Any]]) -> None:
        """Write the file of a step, and delete others where all take too much.

        Raises:
          StorageError: it could not be written.
        """
        content = encode_tables([made.result() for made in rounds])
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / file_of(step), content)
            self.sizes[step] = len(content)
            aside = self.folder / ASIDE / file_of(step)
            if self.aside.get(step) == len(content) and aside.read_bytes() == content:
                self.remove_aside([step])
            self.thin()

    def remove_aside(self, steps: Sequence[int]) -> None:
        """Delete files that were set aside, and their folder where nothing is left in it."""
        for step in steps:
            (self.folder / ASIDE / file_of(step)).unlink(missing_ok=True)
            del self.aside[step]
        if not self.aside and (self.folder / ASIDE).exists() and not any((self.folder / ASIDE).iterdir()):
            (self.folder / ASIDE).rmtree()

    def thin(self) -> None:
        """Delete files where all take more than they may: what was set aside first, then `to_thin`."""
        limit = f"as record.max_gb {self.max_gb:g} asks"
        if self.aside and sum(self.sizes.values()) + sum(self.aside.values()) > self.most:
            self.remove_aside(list(self.aside))
            self.messages.append(f"the rollouts that were set aside are deleted, {limit}")
        if steps := to_thin(self.sizes, self.most):
            for step in steps:
                (self.folder / file_of(step)).unlink(missing_ok=True)
                del self.sizes[step]
            named = ", ".join(map(str, sorted(steps)[:10])) + (", ..." if len(steps) > 10 else "")
            self.messages.append(f"rollouts of {len(steps)} steps are deleted ({named}), {limit}")

    def check(self) -> None:
        """Raise the error of a file that could not be written, if there is one by now.

        Raises:
          StorageError: it could not be written.
        """
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            future.result()

    def wait(self) -> None:
        """Wait until the files of all steps that have ended are written.

        Raises:
          StorageError: one could not be written.
        """
        while self.pending:
            self.pending.pop(0).result()

    def take_messages(self) -> list[str]:
        """Hand over, once, the lines on files that were set aside or deleted."""
        return [self.messages.popleft() for _ in range(len(self.messages))]  # the thread may add more

    def close(self) -> None:
        """Wait for the thread, and end it.

        Raises:
          StorageError: a file could not be written.
        """
        self.thread.shutdown()
        self.wait()


def set_file_aside(file: epath.Path, target: epath.Path) -> None:
    """Move a file; one of that name is replaced."""
    if not in_bucket(file):
        file.replace(target)
        return
    file.copy(target, overwrite=True)
    file.unlink()
