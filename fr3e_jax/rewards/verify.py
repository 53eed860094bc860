"""Rewards: rollouts decoded to text and judged, a whole answer at a time, or a group of whole answers."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fr3e_jax.config import RewardConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.text import Text
from fr3e_jax.rewards import form
from fr3e_jax.rewards.pool import Asked, ScoringPool
from fr3e_jax.rewards.rules import judges_groups
from fr3e_jax.rewards.shape import length_factor
from fr3e_jax.rewards.verdict import ScorerError, Verdict
from fr3e_jax.types import Problem, Rollouts, States

Rewards = Callable[[], np.ndarray]
"""Waits for the verdicts, and returns the rewards that they give."""

MOST_EXTRACTED = 1000  # characters of the part of a response that was judged


class Note(NamedTuple):
    """What a verdict says beside the score, for people.

    reason: why the score is what it is; the named parts where the scorer gives no reason. extracted: the part
    of the response that was judged, its first characters where it is long.
    """

    reason: str
    extracted: str


Notes = dict[int, Note]
"""Place of an answer in the flattened array of rewards -> the note on it, of the answers of this process."""


def notes_on(
    answers: int, counted: Sequence[int], answered: Sequence[Verdict], formed: Sequence[Verdict]
) -> list[Note]:
    """Write the notes on answers.

    Args:
      answers: how many there are.
      counted: numbers of those that were judged; the length limit cut off the others.
      answered: verdicts on what they answer; () where no reward depends on it.
      formed: verdicts on their form; () likewise.
    """
    notes = [Note("cut off by the length limit", "")] * answers
    for n, i in enumerate(counted):
        reasons, extracted = [], ""
        if answered:
            verdict = answered[n]
            extracted = verdict.extracted[:MOST_EXTRACTED]
            parts = ", ".join(f"{name} {part:g}" for name, part in verdict.parts)
            reasons = [reason for reason in (verdict.reason, parts) if reason]
        if formed and not formed[n].right:
            reasons.append(formed[n].reason or "not of the form reward.pattern")
        notes[i] = Note("; ".join(reasons), extracted)
    return notes


class PartMeans:
    """Running means of the named parts that a user's own scorer reports."""

    def __init__(self) -> None:
        self.total: collections.Counter[str] = collections.Counter()
        self.count: collections.Counter[str] = collections.Counter()

    def add(self, verdicts: Iterable[Verdict]) -> None:
        """Add the parts of verdicts."""
        for name, part in itertools.chain.from_iterable(verdict.parts for verdict in verdicts):
            self.total[name] += part  # type: ignore[assignment]
            self.count[name] += 1

    def take(self) -> dict[str, float]:
        """The means by metric, `reward/part/NAME`; they start again from nothing."""
        means = {f"reward/part/{name}": self.total[name] / self.count[name] for name in sorted(self.count)}
        self.total.clear()
        self.count.clear()
        return means


def begin_judging(
    pool: ScoringPool,
    responses: Sequence[str],
    problems: Sequence[Problem],
    groups: Sequence[int] | None = None,
) -> Callable[[], list[Verdict]]:
    """Start to judge whole responses in a pool; arguments and result are those of `Verifier.begin`."""
    asked: list[Asked] = []
    members: list[list[int]] = []
    for group in grouped(problems, groups):
        problem = problems[group[0]]
        if judges_groups(problem.scorer):
            texts = tuple(responses[i] for i in group)
            asked.append(Asked(problem.scorer, texts, problem.answer, problem.facts))
            members.append(group)
        else:
            asked += [Asked(problem.scorer, responses[i], problem.answer, problem.facts) for i in group]
            members += [[i] for i in group]
    judging = pool.begin(asked)

    def result() -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        for one, group, verdict in zip(asked, members, judging.result(), strict=True):
            verdicts |= zip(group, [verdict] if isinstance(one.response, str) else verdict, strict=True)
        return [verdicts[i] for i in range(len(responses))]

    return result


@dataclasses.dataclass(frozen=True)
class Verifier:
    """Judges token ids, and makes rewards of the verdicts.

    parts: means of the parts that a user's own scorer names, over the rewards of this process since they were
    last taken. max_response: the length at which answers are cut off, tokens; `shaped` rewards need it.
    """

    text: Text
    hosts: Hosts
    pool: ScoringPool
    config: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    parts: PartMeans = dataclasses.field(default_factory=PartMeans)
    max_response: int = 0

    def begin(
        self, responses: Sequence[str], problems: Sequence[Problem], groups: Sequence[int] | None = None
    ) -> Callable[[], list[Verdict]]:
        """Start to judge whole responses, as text.

        Args:
          responses: the texts.
          problems: which problem each is a response to.
          groups: number of the group that each belongs to, whose members have one problem and are judged at
            once where the scorer judges groups. By default each is a group of its own.

        Returns:
          A function that waits for the verdicts, in the order of the responses.
        """
        return begin_judging(self.pool, responses, problems, groups)

    def rewards(
        self,
        answers: Sequence[np.ndarray],
        stopped: Sequence[bool],
        problems: Sequence[Problem],
        groups: Sequence[int] | None = None,
        noted: Callable[[list[Note]], Any] | None = None,
    ) -> Rewards:
        """Start to find the rewards of whole answers.

        Args:
          answers: token ids.
          stopped: whether each came to an end.
          problems: which problem each is an answer to.
          groups: number of the group that each belongs to, as for `begin`.
          noted: takes the notes on all answers, in their order, once they are judged; None: nobody asks.

        Returns:
          A function that waits for them, float32 [len(answers)], in [0, 1].
        """
        config = self.config
        texts = self.text.answers(answers, stopped)
        counts = np.array(stopped, bool) | (config.cut == "judged")
        length = np.array([len(answer) for answer in answers], np.int32)
        counted = np.flatnonzero(counts).tolist()
        responses = [texts[i] for i in counted]
        nothing: Callable[[], list[Verdict]] = list
        answered = formed = nothing
        if config.answer > 0:
            own = None if groups is None else [groups[i] for i in counted]
            answered = self.begin(responses, [problems[i] for i in counted], own)
        if config.format > 0:
            asked = [Asked(form.NAME, response, config.pattern, None) for response in responses]
            formed = self.pool.begin(asked).result

        def result() -> np.ndarray:
            total = np.zeros(len(texts), np.float32)
            judged = answered(), formed()
            for weight, verdicts in zip((config.answer, config.format), judged, strict=True):
                if verdicts:
                    total[counted] += weight * np.array([verdict.score for verdict in verdicts], np.float32)
                self.parts.add(verdicts)
            if noted is not None:
                noted(notes_on(len(texts), counted, *judged))
            if config.cut == "shaped":
                total *= length_factor(length, self.max_response, config.cut_slope)
            return total / np.float32(config.answer + config.format)

        return result

    def base(self, rollouts: Rollouts, problems: Sequence[Problem], notes: Notes | None = None) -> Rewards:
        """Start to find the rewards of answers that were sampled from the query alone; a query's are a group.

        Args:
          rollouts: on the host, [B, R, S] leaves.
          problems: B of them.
          notes: takes the notes on the answers of this process, by their place in [B, R]; None: nobody asks.

        Returns:
          A function that waits for them, float32 [B, R].
        """
        b, r = rollouts.length.shape
        here = np.flatnonzero(self.hosts.rows_here(b)).tolist()
        answers = [rollouts.token[i, j, : rollouts.length[i, j]] for i in here for j in range(r)]
        own = [problem for problem in (problems[i] for i in here) for _ in range(r)]
        groups = [i for i in here for _ in range(r)]
        places = [i * r + j for i in here for j in range(r)]
        stopped = rollouts.stopped[here].reshape(-1)
        wait = self.rewards(answers, stopped, own, groups, noting(notes, places))

        def result() -> np.ndarray:
            reward, of = np.zeros((b, r), np.float32), "rewards of base trajectories"
            reward[here] = self.hosts.all_or_none(wait, ScorerError, of).reshape(-1, r)
            return self.hosts.add_up(reward, of)

        return result

    def whole(
        self,
        states: States,
        rollouts: Rollouts,
        problems: Sequence[Problem],
        notes: Notes | None = None,
    ) -> Rewards:
        """Start to find the rewards of the whole answers that partial rollouts complete, with their prefixes.

        The answers of a state are a group.

        Args:
          states: on the host.
          rollouts: on the host, [N, J x M, S] leaves, state-major.
          problems: of the round's queries.
          notes: takes the notes on the answers of this process, by their place in [N, J, M]; None: nobody
            asks.

        Returns:
          A function that waits for them, float32 [N, J, M], 0 where no rollout was drawn.
        """
        n, j = states.valid.shape
        m = rollouts.length.shape[1] // j
        mine = states.drawn(m) & self.hosts.rows_here(n)[:, None, None]
        where = np.argwhere(mine).tolist()
        answers = [whole_answer(states, rollouts, *place) for place in where]
        stopped = rollouts.stopped.reshape(n, j, m)[mine]
        own = {query: problems[query] for query in sorted({int(states.query[a]) for a, _, _ in where})}
        asked = [own[int(states.query[a])] for a, _, _ in where]
        places = np.flatnonzero(mine).tolist()
        groups = [a * j + b for a, b, _ in where]
        wait = self.rewards(answers, stopped, asked, groups, noting(notes, places))

        def result() -> np.ndarray:
            reward, of = np.zeros((n, j, m), np.float32), "rewards of partial rollouts"
            reward[mine] = self.hosts.all_or_none(wait, ScorerError, of)
            return self.hosts.add_up(reward, of)

        return result

    def excerpt(
        self,
        accepted: np.ndarray,
        states: States,
        rollouts: Rollouts,
        reward: np.ndarray,
        problems: Sequence[Problem],
        counted: np.ndarray | None = None,
    ) -> dict[str, Any] | None:
        """Choose a state for people to read: the deepest accepted one of the first trajectory that has one.

        Args:
          accepted: bool [N, J].
          states, rollouts, problems: as for `whole`.
          reward: float32 [N, J, M].
          counted: bool [N, J, M], which rollouts count; None: all.

        Returns:
          Question, prefix, position with its entropy, one of the best and one of the worst
          continuations with their rewards; None where no state is accepted.
        """
        if not accepted.any():
            return None
        n = int(np.argmax(accepted.any(axis=1)))
        j = int(np.max(np.nonzero(accepted[n])))
        shown = np.arange(reward.shape[2]) if counted is None else np.flatnonzero(counted[n, j])
        rewards = reward[n, j, shown]
        picks = [int(shown[np.argmax(rewards)]), int(shown[np.argmin(rewards)])]
        size = int(states.prefix_length[n, j])
        pieces = [states.response[n, :size]]
        pieces += [whole_answer(states, rollouts, n, j, m)[size:] for m in picks]
        prefix, *continuations = self.text.decode(pieces)
        problem = problems[int(states.query[n])]
        return {
            "question": problem.question,
            "answer": problem.answer,
            "prefix": prefix,
            "position": size,
            # The first draw from a state is of the uncertain token itself.
            "entropy": round(float(rollouts.entropy[n, j * reward.shape[2] + shown[0], 0]), 4),
            "continuations": continuations,
            "rewards": [float(reward[n, j, m]) for m in picks],
            "value": float(rewards.mean()),
        }


def noting(notes: Notes | None, places: Sequence[int]) -> Callable[[list[Note]], Any] | None:
    """Make what puts notes on answers to their places; None where nobody asks for them."""
    if notes is None:
        return None
    return lambda found: notes.update(zip(places, found, strict=True))


def grouped(problems: Sequence[Problem], groups: Sequence[int] | None) -> list[list[int]]:
    """The indices of the members of each group, in the order in which the groups first occur."""
    members: dict[int, list[int]] = {}
    for i in range(len(problems)):
        members.setdefault(i if groups is None else groups[i], []).append(i)
    return list(members.values())


def whole_answer(states: States, rollouts: Rollouts, n: int, j: int, m: int) -> np.ndarray:
    """Token ids of rollout m of state j of trajectory n, its prefix included."""
    branch = j * (rollouts.length.shape[1] // states.valid.shape[1]) + m
    own = rollouts.token[n, branch, : rollouts.length[n, branch]]
    return np.concatenate([states.response[n, : states.prefix_length[n, j]], own])
