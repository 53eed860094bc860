"""Every rollout of a step, as the rows of run/rollout_files: what was sampled, judged and decided."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float32, Int, Shaped

from fr3e_jax.algorithm.success import solved
from fr3e_jax.algorithm.trajectories import Measures
from fr3e_jax.config import ExploreConfig, RecordConfig, with_functions
from fr3e_jax.parallel.hosts import Hosts, gather, is_first
from fr3e_jax.parallel.mesh import Placement
from fr3e_jax.pretrained.spelled import texts_with_ends
from fr3e_jax.pretrained.text import Text
from fr3e_jax.rewards.verify import Note, Notes
from fr3e_jax.run.rollout_files import Ragged, RolloutFiles, RolloutRows
from fr3e_jax.run.storage import StorageError
from fr3e_jax.step.measured import Measured
from fr3e_jax.step.stages import Draws, compiled_scores
from fr3e_jax.types import Problem, Queries, Rollouts, States


@dataclasses.dataclass
class ForRecord:
    """What a recorded round keeps beyond what training needs.

    base_notes, notes: on base trajectories and on partial rollouts, those of this process. statistic: score
    that explore.rule gave the token at each position, nan where there is none; None where there are no
    positions.
    """

    base_notes: Notes = dataclasses.field(default_factory=dict)
    notes: Notes = dataclasses.field(default_factory=dict)
    statistic: Float32[np.ndarray, "N K"] | None = None


def position_statistic(
    rules: ExploreConfig,
    placement: Placement,
    draws: Draws,
    queries: Queries,
    base: Rollouts,
    sampled: Rollouts,
    states: States,
    placed: States,
    value: Float32[np.ndarray, " B"] | None,
    measures: Measures | None,
) -> Float32[np.ndarray, "N K"]:
    """Find the scores that explore.rule gave the tokens at positions, nan where there is no position.

    Entropy and log-probability are on the host already. Other rules are asked again. The rule
    mutual_information ranks what it measures, which is given instead.

    Args:
      rules, draws, queries, base, sampled, value, measures: as for `find_states`.
      placement: of the mesh.
      states, placed: as `find_states` gives them.
    """
    query, trajectory, position = states.query, states.base, states.prefix_length[:, 1:]

    def at(x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x[query, trajectory], position, axis=1)

    if rules.rule == "entropy":
        score = at(base.entropy)
    elif rules.rule == "surprisal":
        score = -at(base.logprob)
    elif measures is not None and measures.information is not None:
        score = np.take_along_axis(gather(measures.information), position, axis=1)
    else:
        place = placement.place_rows
        where = place((position, base.length, queries.index[query], query, trajectory))
        worth = None if value is None else place(value[query])
        score = gather(
            compiled_scores(
                with_functions(rules), placement.mesh, where[0], draws, sampled, *where[1:], worth, measures
            )
        )
    return np.where(states.valid[:, 1:] & np.isfinite(score), score, np.nan).astype(np.float32)


@dataclasses.dataclass
class Recorder:
    """Hands the rounds of recorded steps to the files of a run.

    files: where they are written, in the first process; None in others. every: steps between those that are
    recorded; 0 records none. pieces: the bytes that each id adds to a text. say: shows people a line.
    """

    files: RolloutFiles | None
    every: int
    hosts: Hosts
    pieces: Sequence[bytes] = ()
    say: Callable[[str], None] = print
    step: int = 0
    rounds: int = 0

    def begin(self, step: int) -> "Recorder | None":
        """Begin a step; None where it is not recorded."""
        self.step, self.rounds = step, 0
        return self if self.every and step % self.every == 0 else None

    def add(self, queries: Queries, problems: Any, measured: Measured, kept: ForRecord) -> None:
        """Record a round whose rewards are known. Every process calls this.

        Args:
          queries: of the round.
          problems: of each query, which are read here.
          measured: the round, with all states that were explored.
          kept: what it kept for this.
        """
        base_notes, notes = self.gathered(kept.base_notes), self.gathered(kept.notes)
        if self.files is not None:
            asked = [problems[b] for b in range(len(queries.length))]
            kept = ForRecord(base_notes, notes, kept.statistic)
            where = self.step, self.rounds
            self.files.add(
                functools.partial(rows_of_round, where, queries, asked, measured, kept, self.pieces)
            )
        self.rounds += 1

    def end(self) -> None:
        """Write the rounds of the step, beside what follows.

        Raises:
          StorageError: the file of a step before could not be written.
        """
        if self.files is not None:
            self.files.end(self.step)

    def check(self) -> None:
        """Say what was set aside or deleted, and raise the error of a file that could not be written.

        Raises:
          StorageError: it could not be written.
        """
        if self.files is not None:
            self.files.check()
            for line in self.files.take_messages():
                self.say(line)

    def settle(self) -> None:
        """Wait until the rollouts of all steps that have ended are written, before a checkpoint says so.

        Raises:
          StorageError: they could not be written.
        """
        if self.files is not None:
            self.files.wait()
        self.check()

    def gathered(self, notes: Notes) -> Notes:
        """Collect the notes of all processes, each of which has those on its own rows."""
        if jax.process_count() == 1:
            return notes
        parts = self.hosts.gather_bytes(json.dumps(list(notes.items())).encode(), "notes on rollouts")
        return {place: Note(*note) for part in parts for place, note in json.loads(part)}


@contextlib.contextmanager
def open_recorder(
    config: RecordConfig,
    run: epath.PathLike,
    start: int,
    hosts: Hosts,
    text: Text,
    say: Callable[[str], None],
) -> Iterator[Recorder]:
    """Open what records the steps of a run that goes on from step `start`; its files are closed at the end.

    Args:
      config: which steps are recorded, and how much their files may take.
      run: directory.
      start: step of the checkpoint; 0 where the run begins.
      hosts: all processes.
      text: tokenizer of the responses.
      say: shows people a line.

    Raises:
      StorageError: the files cannot be read or moved.
    """
    if not is_first():
        yield Recorder(None, config.every, hosts)
        return
    pieces = text.spoken if config.every else ()
    files = RolloutFiles(run, start, config.max_gb)
    try:
        yield Recorder(files, config.every, hosts, pieces, say)
    except BaseException:
        with contextlib.suppress(StorageError):  # the user is told why the run ended, perhaps the same disk
            files.close()
        raise
    files.close()


def rows_of_round(
    where: tuple[int, int],
    queries: Queries,
    problems: Sequence[Problem],
    measured: Measured,
    kept: ForRecord,
    pieces: Sequence[bytes],
) -> RolloutRows:
    """Make the rows of a round: trajectory by trajectory, each base trajectory before its partial rollouts.

    Args:
      where: step, and number of the round in it from 0.
      queries, problems: of the round.
      measured: the round.
      kept: with the notes of all processes.
      pieces: the bytes that each id adds to a text.
    """
    m, states = measured, measured.states
    (b, r), drawn = m.base.length.shape, drawn_rollouts(measured)
    partial = np.flatnonzero(drawn)
    n, j, i = np.unravel_index(partial, drawn.shape)
    row = np.concatenate([np.repeat(np.arange(b), r), states.query[n]])
    trajectory = np.concatenate([np.tile(np.arange(r), b), states.base[n]])
    place = np.concatenate([np.arange(b * r), partial])
    base = np.arange(len(row)) < b * r
    explored = np.zeros((b, r), bool)
    explored[states.query[n], states.base[n]] = True
    if not m.restarts:  # base trajectories are the rollouts of S_0
        n, i = np.divmod(np.arange(b * r), r)
        j = np.zeros_like(n)
    none = np.full(len(base) - len(n), -1)  # rows of no state
    state, rollout = (np.concatenate([none, x]) for x in (j, i))
    order = np.lexsort((rollout, state, trajectory, row))

    def of_states(values: np.ndarray, known: np.ndarray | bool = True) -> np.ma.MaskedArray:
        """Lay out values of the rows that belong to a state; there are none in other rows."""
        missing = np.concatenate([none < 0, np.broadcast_to(~np.asarray(known), len(n))])
        return np.ma.masked_array(np.concatenate([none.astype(values.dtype), values]), missing)[order]

    def of_rows(of_base: np.ndarray, of_partial: np.ndarray) -> np.ndarray:
        """Lay out values of base trajectories [B, R] and of partial rollouts [N, J, M] or [N, J x M]."""
        return np.concatenate([of_base.reshape(-1), of_partial.reshape(-1)[partial]])[order]

    def tokens(name: str) -> Ragged:
        """Lay out what has an entry for each token of a response."""
        parts = [getattr(x, name).reshape(-1, getattr(x, name).shape[-1]) for x in (m.base, m.rollouts)]
        return reordered([parts[0], parts[1][partial]], lengths, order)

    lengths = [m.base.length.reshape(-1), m.rollouts.length.reshape(-1)[partial]]
    token = tokens("token")
    texts, ends = texts_with_ends(pieces, token.values, token.length)
    reward = of_rows(m.base_reward, m.reward)
    notes = [
        (kept.base_notes if of_base else kept.notes).get(number, Note("", ""))
        for of_base, number in zip(base[order].tolist(), place[order].tolist(), strict=True)
    ]
    asked = [problems[number] for number in row[order].tolist()]
    position, statistic = states.prefix_length[n, j].astype(np.int32), np.full(len(n), np.nan, np.float32)
    if kept.statistic is not None:
        statistic[j > 0] = kept.statistic[n[j > 0], j[j > 0] - 1]
    rejected = [None] * len(none) + rejections(m)[n, j].tolist()
    return {
        "step": np.full(len(row), where[0], np.int32),
        "round": np.full(len(row), where[1], np.int32),
        "query": queries.index[row].astype(np.int64)[order],
        "question": [problem.question for problem in asked],
        "answer": [problem.answer for problem in asked],
        "source": [problem.source for problem in asked],
        "query_token": reordered([queries.token[row]], [queries.length[row]], order),
        "kind": np.where(base, "base", "partial")[order].tolist(),
        "trajectory": trajectory[order].astype(np.int32),
        "kept": explored[row, trajectory][order],
        "state": of_states(j.astype(np.int32)),
        "position": of_states(position),
        "statistic": of_states(statistic, ~np.isnan(statistic)),
        "rollout": of_states(i.astype(np.int32), m.restarts),
        "token": token,
        "logprob": tokens("logprob"),
        "entropy": tokens("entropy"),
        "text": texts,
        "ends": Ragged(ends, token.length),
        "stopped": of_rows(m.base.stopped, m.rollouts.stopped),
        "right": solved(reward, m.success_at),
        "reason": [note.reason for note in notes],
        "extracted": [note.extracted for note in notes],
        "reward": reward,
        "value": of_states(m.value[n, j], m.valid[n, j]),
        "alpha": of_states(m.alpha[n, j], m.valid[n, j]),
        "advantage": of_states(m.advantage[n, j, i], m.counts[n, j, i]),
        "accepted": of_states(m.accepted[n, j]),
        "rejected": [rejected[number] for number in order.tolist()],
    }


def drawn_rollouts(m: Measured) -> Bool[np.ndarray, "N J M"]:
    """Tell which partial rollouts there are: each has a token at least."""
    return (m.rollouts.length > 0).reshape(m.reward.shape) & m.restarts


def rejections(m: Measured) -> np.ndarray:
    """Say why states are not trained on, object [N, J]; None of those that are."""
    counted = m.counts & (m.rollouts.length > 0).reshape(m.reward.shape)
    high = np.where(counted, m.reward, -np.inf).max(axis=2)
    low = np.where(counted, m.reward, np.inf).min(axis=2)
    why = np.full(m.accepted.shape, "rule", object)  # credit.reject by a function of the user's
    why[high == low] = "equal rewards"
    why[(high == low) & (high == 0)] = "all wrong"
    why[(high == low) & solved(high, m.success_at)] = "all right"
    why[~counted.any(axis=2)] = "not counted"
    why[m.accepted] = None
    return why


def reordered(
    parts: Sequence[Shaped[np.ndarray, "_ _"]],
    lengths: Sequence[Int[np.ndarray, " _"]],
    order: Int[np.ndarray, " rows"],
) -> Ragged:
    """Take the beginnings of the rows of several arrays, in an order of all rows.

    Args:
      parts: arrays of rows.
      lengths: how many entries of each row count.
      order: of the rows of all parts, which follow each other.
    """
    pairs = zip(parts, lengths, strict=True)
    values = np.concatenate([x[np.arange(x.shape[1]) < length[:, None]] for x, length in pairs])
    length = np.concatenate(lengths)
    before = np.cumsum(length) - length  # where each row begins
    shift, length = before[order], length[order]
    shift = shift - (np.cumsum(length) - length)
    return Ragged(values[np.repeat(shift, length) + np.arange(length.sum())], length)
