"""The rollouts that a run has kept: one parquet file a step, one row a response."""

import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath

from fr3e_jax.run.rollout_files import ROLLOUTS, steps_in
from fr3e_jax.run.storage import in_bucket

RESPONSE_COLUMNS = (
    "kind trajectory kept state position statistic rollout text stopped right reason extracted reward "
    "value alpha advantage accepted rejected"
).split()
"""Columns that the page shows of each response, beside its tokens."""
QUESTION_COLUMNS = "query round question answer source".split()
ORDERED_BY = ("trajectory", "state", "rollout")
COUNTED = ("round", "query", "kind", *ORDERED_BY, "value", "advantage", "accepted")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class DamagedRolloutsError(Exception):
    """A file of rollouts that cannot be read; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class StepRollouts:
    """The rows of a step, in the order of the page: by round, query, trajectory, state and rollout.

    columns: of all but tokens: name -> a list with a value a row. first, count: of the rows of each question.
    table: of pyarrow, with the tokens where they were read.
    """

    columns: dict[str, list[Any]]
    first: list[int]
    count: list[int]
    table: Any

    def token_numbers(self, question: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Read a token column of a question's rows.

        Returns:
          (values, known). values: one for each token of a row, those of all rows one behind the other; nan
          where a row has fewer. known: bool of each row, whether it has any.
        """
        rows = self.table.slice(self.first[question], self.count[question])
        counts = np.array(self.columns["tokens"][self.first[question] :][: rows.num_rows], np.int64)
        if name not in rows.column_names:
            return np.full(counts.sum(), np.nan), np.zeros(len(counts), bool)
        lists = rows.column(name).combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False)
        lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        if np.array_equal(lengths, counts):
            return values, lengths > 0
        place = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = place < np.repeat(counts, lengths)
        filled = np.full(counts.sum(), np.nan)
        filled[(np.repeat(np.cumsum(counts) - counts, lengths) + place)[kept]] = values[kept]
        return filled, lengths > 0


def steps_kept(run: epath.Path) -> dict[int, epath.Path]:
    """Find the steps whose rollouts are kept, ascending, with their files."""
    return steps_in(run / ROLLOUTS)


def read_step(file: epath.Path) -> StepRollouts:
    """Read the rollouts of a step, whose file is read again only when it has been written again.

    Raises:
      DamagedRolloutsError: the file is no such parquet file, or is gone.
    """
    return read_rows(file, written_at(file), None)


def read_quantiles(file: epath.Path) -> dict[str, list[float]]:
    """Summarise a step by quantiles of V and advantage, reading no texts and no tokens.

    Raises:
      DamagedRolloutsError: the file is no such parquet file, or is gone.
    """
    return remembered_quantiles(file, written_at(file))


@functools.lru_cache(maxsize=10_000)
def remembered_quantiles(file: epath.Path, written: float) -> dict[str, list[float]]:
    """Summarise a step; `written` is when its file was, so that a later one is read again."""
    return quantiles_of(read_rows.__wrapped__(file, written, COUNTED))


def written_at(file: epath.Path) -> float:
    """Tell when a file was written, in seconds; 0 where it is gone."""
    try:
        return float(file.stat().mtime or 0)
    except OSError:
        return 0.0


def size_of(file: epath.Path) -> int:
    """Tell how many bytes a file has; 0 where it is gone."""
    try:
        return file.stat().length
    except OSError:
        return 0


@functools.lru_cache(maxsize=3)
def read_rows(file: epath.Path, written: float, names: tuple[str, ...] | None) -> StepRollouts:
    """Read columns of a step; of all columns where `names` is None, with the tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Of a file here only the columns are read that are asked for; texts and tokens are most of it.
        opened = pa.BufferReader(file.read_bytes()) if in_bucket(file) else pa.OSFile(str(file))
        with opened:
            table = pq.read_table(opened, columns=names and list(names))
        table = table.sort_by([(name, "ascending") for name in ("round", "query", *ORDERED_BY)])
        columns = {
            name: without_nan(table.column(name).to_pylist())
            for name in (*QUESTION_COLUMNS, *RESPONSE_COLUMNS)
            if name in table.column_names
        }
        if names is None:
            for name, lists in (("tokens", "token"), ("query_tokens", "query_token")):
                lengths = table.column(lists).combine_chunks().value_lengths()
                columns[name] = lengths.fill_null(0).to_pylist()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DamagedRolloutsError(f"{file} is damaged ({' '.join(str(error).split())[:200]})") from None
    for name in (*QUESTION_COLUMNS, *RESPONSE_COLUMNS):
        columns.setdefault(name, [None] * table.num_rows)
    keys = list(zip(columns["round"], columns["query"], strict=True))
    first = [i for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
    count = [after - before for before, after in zip(first, [*first[1:], len(keys)], strict=True)]
    return StepRollouts(columns, first, count, table)


def without_nan(values: list[Any]) -> list[Any]:
    """Replace what is no finite number by None, so that JSON can say it."""
    return [None if isinstance(value, float) and not np.isfinite(value) else value for value in values]


def rows_by_state(step: StepRollouts) -> dict[tuple[int, int, int], list[int]]:
    """Group the rows of rollouts by their state: (question, trajectory, state) -> rows.

    Without positions the base trajectories of a question are the rollouts of its state 0.
    """
    columns = step.columns
    groups: dict[tuple[int, int, int], list[int]] = {}
    for question, (first, count) in enumerate(zip(step.first, step.count, strict=True)):
        rows = range(first, first + count)
        partial = [i for i in rows if columns["kind"][i] == "partial"]
        for i in partial or rows:
            if columns["state"][i] is not None:
                trajectory = columns["trajectory"][i] if partial else 0
                groups.setdefault((question, trajectory, columns["state"][i]), []).append(i)
    return groups


def disagree(step: StepRollouts, rows: list[int]) -> bool:
    """Tell whether the rewards of a state's rollouts differ."""
    return len({step.columns["reward"][i] for i in rows}) > 1


def quantiles_of(step: StepRollouts) -> dict[str, list[float]]:
    """Summarise a step by quantiles: of V over its states, and of the advantage over accepted rollouts."""
    groups = rows_by_state(step)
    values = [step.columns["value"][rows[0]] for rows in groups.values()]
    trained = [i for rows in groups.values() for i in rows if step.columns["accepted"][i]]
    advantages = [step.columns["advantage"][i] for i in trained]
    found = {}
    for name, numbers in (("value", values), ("advantage", advantages)):
        known = [number for number in numbers if number is not None]
        if known:
            found[name] = [float(f"{x:.5g}") for x in np.quantile(np.asarray(known), QUANTILES)]
    return found
