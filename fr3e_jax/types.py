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
T tokens of a whole sequence, G groups (a state with its rollouts).

Words of this package:
  branch  a response that is sampled from a state: a base trajectory (state 0) or a partial rollout
  seat    the batch row that a branch is decoded in (engine)
  block   a few rows that decode together and share pages (engine)
  page    keys and values of the rows of a block over some slots, one for each token of a row (engine)
  span    the blocks that run through the layers at a time (engine)
  strip   a few trajectories whose contexts are attended to at a time (engine)
  leg     the decoding between two looks at which branches still run; the others' rows are given up (engine)
  tree    a kept trajectory with its states and their rollouts
  trunk   query and base response of a tree up to the last token that one of its rollouts follows (learner)
  row     a rollout as the learner computes it: it follows the beginning of a trunk (learner)
  chunk   rows of one width, padded, that one call of a program computes (learner)
  bundle  trunks that are in memory together, and the chunks of rows that follow them (learner)
  window  the first slots of the trunks, as far as a chunk's rows follow them (learner)
  part    the devices that hold the same batch rows: one of data x fsdp parts of the mesh
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

if TYPE_CHECKING:
    AnyArray: TypeAlias = Any
else:
    AnyArray = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
"""An array on devices (jax) or on the host (numpy), or the shape of one, of which programs are planned."""

Tree = TypeVar("Tree")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[Tree]) -> type[Tree]:
    """Make a frozen dataclass that is, to jax, the tree of its fields.

    jax also fills such trees with axis numbers, shardings and marks of its own. It does so without `__init__`
    (with `jax.tree_util.register_dataclass` it would call it), so that the check of the annotations while
    tests run sees the arrays of this package alone.

    A field with `static` in its metadata is no part of the tree: programs are compiled for each value of it.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    names = [field.name for field in fields if not field.metadata.get("static")]
    static = [field.name for field in fields if field.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    def flatten(tree: Tree) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(tree, name) for name in names], tuple(getattr(tree, name) for name in static)

    def flatten_with_keys(tree: Tree) -> tuple[list[Any], tuple[Any, ...]]:
        leaves, values = flatten(tree)
        return list(zip(keys, leaves, strict=True)), values

    def unflatten(values: tuple[Any, ...], leaves: Any) -> Tree:
        tree = object.__new__(made)
        tree.__dict__.update(zip((*names, *static), (*leaves, *values), strict=True))
        return tree

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


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
    decisions: Callable[[str], Sequence[int]] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    """Offsets of the characters at which a response decides its verdict, where the task knows them."""

    @property
    def asked(self) -> str:
        """The text it is known again by: the question behind what was said before, without the system."""
        return "\n".join([*(text for role, text in self.before if role != "system"), self.question])


@pytree
class Queries:
    """B queries, right-padded."""

    token: Int32[AnyArray, "B P"]
    length: Int32[AnyArray, " B"]
    """At least 1."""
    index: Int32[AnyArray, " B"]
    """The query's place in the endless stream of queries; randomness is derived from it."""


@pytree
class Rollouts:
    """What C branches of N trajectories generated; entries from `length` on are 0.

    Log-probabilities and entropy are in nats.
    """

    token: Int32[AnyArray, "N C S"]
    logprob: Float32[AnyArray, "N C S"]
    """Of the drawn token in the unfiltered distribution at temperature 1."""
    sampled_logprob: Float32[AnyArray, "N C S"]
    """Of the drawn token in the distribution that it was drawn from (temperature, top-k, top-p)."""
    entropy: Float32[AnyArray, "N C S"]
    """Of the unfiltered distribution at temperature 1, before the token is drawn."""
    length: Int32[AnyArray, "N C"]
    """Tokens, the one that ended the answer included."""
    stopped: Bool[AnyArray, "N C"]
    """Whether an end token was drawn; False: cut at the limit."""


PER_TOKEN = ("token", "logprob", "sampled_logprob", "entropy")  # fields of `Rollouts`, and of `StateGroups`


@pytree
class StopTable:
    """An automaton over tokens that recognises texts which end an answer.

    Its states are numbers: 0, nothing of such a text, up to the last, in which one is complete and which is
    never left.
    """

    group: Int32[AnyArray, " V"]
    """Tokens that change every state alike have one number."""
    following: Int32[AnyArray, "states groups"]
    """The state after a token of a group."""


@pytree
class States:
    """Where partial rollouts start: J states of each of N kept trajectories."""

    query: Int32[AnyArray, " N"]
    """Row of `Queries`."""
    base: Int32[AnyArray, " N"]
    """Which of the R base trajectories."""
    response: Int32[AnyArray, "N S"]
    """The tokens of that trajectory."""
    prefix_length: Int32[AnyArray, "N J"]
    """How many tokens of the response the state keeps; 0 is the root."""
    valid: Bool[AnyArray, "N J"]
    """False of states that a short response does not have."""
    rollouts: Int32[AnyArray, " N"] | None = None
    """How many rollouts are drawn from each state of a trajectory; None: as many as there is room for."""

    def drawn(self, room: int) -> Bool[np.ndarray, "N J {room}"]:
        """Tell which of the `room` rollouts of each state are drawn; the states are on the host."""
        each = np.full(len(self.valid), room) if self.rollouts is None else self.rollouts
        return self.valid[:, :, None] & (np.arange(room) < each[:, None, None])


@pytree
class Growing:
    """C branches of each of N trajectories, of which some have not ended."""

    rollouts: Rollouts
    """What the branches have drawn so far, leaves [N, C, S]."""
    ended: Bool[AnyArray, "N C"]
    """Which draw no more; also those that are never drawn."""
    drawn_step: Float32[AnyArray, "N C"]
    """Mean of the steps in which their tokens were drawn."""


@pytree
class StateGroups:
    """G accepted states with their M rollouts, on the host: what waits for the learner.

    With credit.estimator edge the segment of the base trajectory that follows the state is one more of them,
    the last.
    """

    query: Int32[AnyArray, "G P"]
    query_length: Int32[AnyArray, " G"]
    prefix: Int32[AnyArray, "G S"]
    """The base response, of which the state holds the first `prefix_length` tokens."""
    prefix_length: Int32[AnyArray, " G"]
    token: Int32[AnyArray, "G M new"]
    """Of the continuations."""
    logprob: Float32[AnyArray, "G M new"]
    """Of these tokens, as recorded while sampling, nats; the learner's where loss.mismatch is not none."""
    length: Int32[AnyArray, "G M"]
    """0 of what is not trained on."""
    advantage: Float32[AnyArray, "G M"]
    """Modulated."""
    source: Int32[AnyArray, "G 3"]
    """Index of the query, base trajectory and state."""
    sampled_logprob: Float32[AnyArray, "G M new"] | None = None
    """Of these tokens, in the distribution that they were drawn from; None: that is `logprob`."""
    entropy: Float32[AnyArray, "G M new"] | None = None
    """Of the policy before each of them is drawn, nats; None: not known."""
    weight: Float32[AnyArray, "G M new"] | None = None
    """How much each of them counts in the objective, beside the advantage; None: 1."""
    share: Float32[AnyArray, "G M"] | None = None
    """How much a token of each rollout counts in the means of the loss; None: 1."""
    drawn_step: Float32[AnyArray, "G M"] | None = None
    """Mean of the steps in which the tokens of each rollout were drawn; nan or None: not known."""


@pytree
class Trunks:
    """What rows share: query and base response up to the last token that a row follows.

    There are n trunks for each of the P parts that the mesh splits rows into.
    """

    token: Int32[AnyArray, "P n S"]
    """Right-padded."""
    length: Int32[AnyArray, "P n"]


@pytree
class Batch:
    """Rows for the learner; a row follows the beginning of a trunk, or nothing (the flat form)."""

    token: Int32[AnyArray, "rows T"]
    """Right-padded: the last token of the state and the continuation, or in the flat form query, prefix and
    continuation; the last column is only a target."""
    length: Int32[AnyArray, " rows"]
    start: Int32[AnyArray, " rows"]
    """Index of the first trained token, at least 1."""
    old_logprob: Float32[AnyArray, "rows T"]
    """Of `token`, as recorded while sampling, nats."""
    advantage: Float32[AnyArray, " rows"]
    trunk: Int32[AnyArray, " rows"]
    """Which of the trunks of its part."""
    prefix: Int32[AnyArray, " rows"]
    """Tokens of the trunk that the row follows; 0 in the flat form."""
    weight: Float32[AnyArray, "rows T"] | None = None
    """How much each token counts in the objective, beside the advantage; None: 1."""
    share: Float32[AnyArray, " rows"] | None = None
    """How much each token of the row counts in the means of the loss; None: 1."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Trunks, None in the flat form, and chunks of rows that follow them, in any order."""

    trunks: Trunks | None
    chunks: tuple[Batch, ...]
    window: tuple[int, ...]
    """For each chunk, the number of the trunks' slots that its rows see: static, a shape of the program."""
    origin: tuple[Int[np.ndarray, "_ 2"], ...] = ()
    """For each chunk, state and rollout of each row, -1 of rows that are padding; () where nobody asks."""
