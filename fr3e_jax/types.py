"""The pytrees that pass between the stages of a step, and the glossary.

Paper symbol, meaning, name here:
  q       query                        `Queries`; B of them a round
  k       base trajectory              `Rollouts` with branch axis R
  H_t     token entropy, nats          `Rollouts.entropy`
  T_k     position                     `position`, index of a response token; K of them
  S_j     state                        (trajectory, `prefix_length`); J = K + 1, S_0 = q
  r_ij    reward of rollout i of S_j   `reward` [N, J, M]
  V(S_j)  value                        `value` [N, J]
  A, A'   advantage, modulated         `advantage` [N, J, M]
  alpha_j modulation                   `alpha` [N, J]

Axis letters: B queries, R base trajectories per query, N kept trajectories, J states, M rollouts
per state, C branches of a trajectory (R, or J x M), P prompt tokens, S response tokens,
T tokens of a whole sequence.
"""

import dataclasses
from typing import Any

import jax

Leaf = Any
"""A jax.Array on the devices, a numpy array on the host; the docstrings give shape and dtype."""


Turns = tuple[tuple[str, str], ...]
"""Turns of a chat: (role, text) each."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question as the model is asked it, and what its answer is judged by."""

    question: str
    answer: str
    scorer: str
    """Name of what judges an answer (rewards/rules.py)."""
    source: str = ""
    """Name of the source that it is of."""
    facts: Any = None
    """What the scorer needs beside the answer; goes to a worker process."""
    before: Turns = ()
    """What is said before the question, where it is the last turn of a chat: a system turn, earlier turns."""
    place: str = dataclasses.field(default="", compare=False)
    """Where it stands, for messages: `problems.jsonl, line 3`."""
    solution: str = dataclasses.field(default="", compare=False, repr=False)
    """A worked solution, which `sft` teaches."""

    @property
    def asked(self) -> str:
        """The text it is known again by: the question behind what was said before, without the system."""
        return "\n".join([*(text for role, text in self.before if role != "system"), self.question])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """B queries, right-padded.

    token: int32 [B, P]. length: int32 [B], at least 1. index: int32 [B], the query's place in the
    endless stream of queries; randomness is derived from it.
    """

    token: Leaf
    length: Leaf
    index: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What C branches of N trajectories generated; entries from `length` on are 0.

    token: int32 [N, C, S]. logprob: float32 [N, C, S], of the drawn token, nats. entropy: float32
    [N, C, S], of the distribution before the draw, nats; both of the unfiltered distribution at
    temperature 1. sampled_logprob: float32 [N, C, S], of the drawn token in the distribution that it was
    drawn from (temperature, top-k, top-p), nats. length: int32 [N, C], the token that ended the answer
    included. stopped: bool [N, C], an end token was drawn (False: cut at the limit).
    """

    token: Leaf
    logprob: Leaf
    sampled_logprob: Leaf
    entropy: Leaf
    length: Leaf
    stopped: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopTable:
    """An automaton over tokens that recognises texts which end an answer.

    Its states are numbers: 0, nothing of such a text, up to the last, in which one is complete and which is
    never left. group: int32 [V], tokens that change every state alike have one number. following: int32
    [states, groups], the state after a token of a group.
    """

    group: Leaf
    following: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
    """Where partial rollouts start: J states of each of N kept trajectories.

    query: int32 [N], row of `Queries`. base: int32 [N], which of the R base trajectories.
    response: int32 [N, S], the tokens of that trajectory. prefix_length: int32 [N, J], how many of them
    the state keeps; 0 is the root. valid: bool [N, J].
    """

    query: Leaf
    base: Leaf
    response: Leaf
    prefix_length: Leaf
    valid: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateGroups:
    """G accepted states with their M rollouts, on the host: what waits for the learner.

    query: int32 [G, P]. query_length: int32 [G]. prefix: int32 [G, S], the base response, of which
    the state holds the first `prefix_length` (int32 [G]) tokens. token: int32 [G, M, S], logprob:
    float32 [G, M, S], length: int32 [G, M], the continuations. advantage: float32 [G, M], modulated.
    source: int32 [G, 3], index of the query, base trajectory and state.
    """

    query: Leaf
    query_length: Leaf
    prefix: Leaf
    prefix_length: Leaf
    token: Leaf
    logprob: Leaf
    length: Leaf
    advantage: Leaf
    source: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trunks:
    """What rows share: query and base response up to the last token that a row follows.

    token: int32 [P, n, S], right-padded, n for each of the mesh's P row parts. length: int32 [P, n].
    """

    token: Leaf
    length: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows for the learner; a row follows the beginning of a trunk, or nothing (the flat form).

    token: int32 [rows, T], right-padded: the last token of the state and the continuation, or in the flat
    form query, prefix and continuation; the last column is only a target. length: int32 [rows]. start: int32
    [rows], index of the first trained token, at least 1. old_logprob: float32 [rows, T], aligned with
    `token`, as recorded while sampling.
    advantage: float32 [rows]. trunk: int32 [rows], which of the trunks of its part. prefix: int32 [rows],
    tokens of it that the row follows; 0 in the flat form.
    """

    token: Leaf
    length: Leaf
    start: Leaf
    old_logprob: Leaf
    advantage: Leaf
    trunk: Leaf
    prefix: Leaf


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Trunks, None in the flat form, and chunks of rows that follow them, in any order.

    window: for each chunk, slots of the trunks that its rows see (static).
    """

    trunks: Trunks | None
    chunks: tuple[Batch, ...]
    window: tuple[int, ...]
