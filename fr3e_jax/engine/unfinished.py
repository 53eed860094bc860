"""Queries whose rollouts are not all there: what a decoding that does not wait leaves, on the host.

A query is begun with its base trajectories. When these have ended, states of some are opened. When the
rollouts of these have ended too, the query is complete. Between two decodings every branch that has not ended
is either not begun or left in the middle. One in the middle goes on behind its own tokens, which are
prefilled with the parameters of the next decoding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from fr3e_jax.types import PER_TOKEN, AnyArray, Growing, Queries, Rollouts, States, pytree


class QueryRoom(NamedTuple):
    """What a query has room for.

    base: R trajectories. kept: most of them that are explored. states: J of each. rollouts: M of each state.
    response: S tokens of an answer, prefix included.
    """

    base: int
    kept: int
    states: int
    rollouts: int
    response: int

    @property
    def branches(self) -> int:
        """Branches of a kept trajectory."""
        return self.states * self.rollouts


@pytree
class Unfinished:
    """Q queries whose rollouts are not all there."""

    queries: Queries
    step: Int32[AnyArray, " Q"]
    """In which they were begun, which the randomness of all their branches is a function of."""
    base: Growing
    """Base trajectories, leaves [Q, R, S]."""
    base_reward: Float32[AnyArray, "Q R"]
    judged: Bool[AnyArray, " Q"]
    """Whether their base trajectories are judged and their states are opened."""
    kept: Int32[AnyArray, "Q T"]
    """Base trajectories that are explored; -1: none."""
    prefix_length: Int32[AnyArray, "Q T J"]
    valid: Bool[AnyArray, "Q T J"]
    rollouts: Int32[AnyArray, "Q T"]
    """How many are drawn from each state of a trajectory."""
    statistic: Float32[AnyArray, "Q T J"]
    """What the position rule gave the token behind each state, where the run records it; nan elsewhere."""
    partial: Growing
    """Partial rollouts, leaves [Q, T x J x M, S]: trajectory by trajectory, state by state."""

    @property
    def count(self) -> int:
        """Count the queries whose rollouts are not all there."""
        return len(self.step)

    @property
    def in_the_middle(self) -> int:
        """Number of the branches that have begun and not ended."""
        growing = self.base, self.partial
        return sum(int((~x.ended & (x.rollouts.length > 0)).sum()) for x in growing)

    def take(self, which: Bool[np.ndarray, " Q"] | Int[np.ndarray, " n"]) -> "Unfinished":
        """Keep only the queries that are chosen, by a mask or by their rows."""
        return jax.tree.map(lambda x: x[which], self)


def begin(queries: Queries, step: int, sizes: QueryRoom) -> Unfinished:
    """Begin queries; none of their branches has drawn a token.

    Args:
      queries: on the host.
      step: of the run.
      sizes: of what each has room for.
    """
    q, (_, kept, states, *_) = len(queries.length), sizes
    return Unfinished(
        queries=queries,
        step=np.full(q, step, np.int32),
        base=nothing_drawn(q, sizes.base, sizes.response, ended=False),
        base_reward=np.zeros((q, sizes.base), np.float32),
        judged=np.zeros(q, bool),
        kept=np.full((q, kept), -1, np.int32),
        prefix_length=np.zeros((q, kept, states), np.int32),
        valid=np.zeros((q, kept, states), bool),
        rollouts=np.zeros((q, kept), np.int32),
        statistic=np.full((q, kept, states), np.nan, np.float32),
        partial=nothing_drawn(q, kept * sizes.branches, sizes.response, ended=True),
    )


def nothing_drawn(n: int, c: int, response: int, ended: bool) -> Growing:
    """Make n x c branches that have drawn nothing."""
    rollouts = Rollouts(
        token=np.zeros((n, c, response), np.int32),
        logprob=np.zeros((n, c, response), np.float32),
        sampled_logprob=np.zeros((n, c, response), np.float32),
        entropy=np.zeros((n, c, response), np.float32),
        length=np.zeros((n, c), np.int32),
        stopped=np.zeros((n, c), bool),
    )
    return Growing(rollouts, np.full((n, c), ended), np.zeros((n, c), np.float32))


def joined(first: Unfinished, second: Unfinished) -> Unfinished:
    """Put the queries of `second` behind those of `first`."""
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)


def with_states(
    unfinished: Unfinished,
    row: Int[np.ndarray, " B"],
    base_reward: Float32[np.ndarray, "B R"],
    base: Rollouts,
    states: States,
    statistic: Float32[np.ndarray, "N K"] | None,
    rollouts: int,
) -> Unfinished:
    """Open the states of queries whose base trajectories are judged.

    Args:
      unfinished: all queries.
      row: of those that are judged.
      base_reward, base: of their base trajectories; answers are cut before stop texts.
      states: on the host, of the kept trajectories; `query` is the place in `row`. Those without a valid
        state are padding.
      statistic: of the positions, where it is recorded.
      rollouts: M of each state.
    """
    changed = jax.tree.map(np.copy, unfinished)
    changed.judged[row], changed.base_reward[row] = True, base_reward
    for name in (*PER_TOKEN, "length", "stopped"):
        getattr(changed.base.rollouts, name)[row] = getattr(base, name)
    drawn, slot = states.drawn(rollouts), np.zeros(len(row), np.int64)
    ended = changed.partial.ended.reshape(*changed.kept.shape, -1)
    for n in np.flatnonzero(states.valid.any(axis=1)).tolist():
        query = int(states.query[n])
        at = row[query], slot[query]
        slot[query] += 1
        changed.kept[at] = states.base[n]
        changed.prefix_length[at], changed.valid[at] = states.prefix_length[n], states.valid[n]
        changed.rollouts[at] = rollouts if states.rollouts is None else states.rollouts[n]
        ended[at] = ~drawn[n].reshape(-1)
        if statistic is not None:
            changed.statistic[at][1:] = statistic[n]
    return changed


def states_of_queries(unfinished: Unfinished, rows: int, adaptive: bool) -> tuple[States, Any, Any]:
    """Lay the kept trajectories of complete queries out.

    Args:
      unfinished: the complete queries.
      rows: number of rows, of which those behind the kept trajectories are padding without a valid state.
      adaptive: whether trajectories have different numbers of rollouts.

    Returns:
      (states, their partial rollouts as `Growing`, the statistic of their positions float32 [N, K]).
    """
    query, slot = np.nonzero(unfinished.kept >= 0)
    padding = rows - len(query)

    def of_kept(x: np.ndarray) -> np.ndarray:
        taken = x[query, slot]
        return np.pad(taken, [(0, padding)] + [(0, 0)] * (taken.ndim - 1))

    def of_branches(x: np.ndarray) -> np.ndarray:
        return of_kept(x.reshape(len(x), unfinished.kept.shape[1], -1, *x.shape[2:]))

    base = of_kept(unfinished.kept)
    of_query = np.pad(query, (0, padding)).astype(np.int32)
    states = States(
        query=of_query,
        base=base,
        response=unfinished.base.rollouts.token[of_query, base],
        prefix_length=of_kept(unfinished.prefix_length),
        valid=of_kept(unfinished.valid),
        rollouts=of_kept(unfinished.rollouts) if adaptive else None,
    )
    return states, jax.tree.map(of_branches, unfinished.partial), of_kept(unfinished.statistic)[:, 1:]


def complete(unfinished: Unfinished, restarts: bool) -> Bool[np.ndarray, " Q"]:
    """Tell which queries have all their rollouts.

    Args:
      unfinished: all queries.
      restarts: whether states of base trajectories are explored.
    """
    whole = unfinished.base.ended.all(axis=1)
    return whole & unfinished.judged & unfinished.partial.ended.all(axis=1) if restarts else whole


def absorbed(
    unfinished: Unfinished, place: Int[np.ndarray, "N C"], drawn: Rollouts, running: np.ndarray, step: int
) -> Unfinished:
    """Add what a decoding has drawn.

    Args:
      unfinished: all queries, as they were laid out.
      place: as `lay_out` gives it.
      drawn: on the host, leaves [N, C, S]; what each branch has drawn now.
      running: bool [N, C], which have not ended.
      step: of the run, in which they were drawn.
    """
    changed = jax.tree.map(np.copy, unfinished)
    first = changed.base.ended.size
    for growing, mine, before in (
        (changed.base, (place >= 0) & (place < first), 0),
        (changed.partial, place >= first, first),
    ):
        to = place[mine] - before
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), growing)
        new, old = drawn.length[mine], flat.rollouts.length[to]
        n, t = np.nonzero(np.arange(drawn.token.shape[2]) < new[:, None])
        for name in PER_TOKEN:
            getattr(flat.rollouts, name)[to[n], old[n] + t] = getattr(drawn, name)[mine][n, t]
        flat.rollouts.length[to] = old + new
        flat.rollouts.stopped[to] |= drawn.stopped[mine]
        flat.ended[to] = ~running[mine]
        total = flat.drawn_step[to] * old + np.float32(step) * new
        flat.drawn_step[to] = total / np.maximum(old + new, 1)
    return changed


def as_arrays(unfinished: Unfinished) -> dict[str, np.ndarray]:
    """Make a dict of names and arrays for a checkpoint, without the padding behind answers.

    Arrays are padded by one entry, since a checkpoint refuses arrays without elements.
    """
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(unfinished):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        group, _, leaf = name.rpartition("/")
        if leaf in PER_TOKEN and group.endswith("rollouts"):
            length = getattr(unfinished, group.split("/")[0]).rollouts.length
            x = x[np.arange(x.shape[2]) < length[..., None]]
        found[name] = np.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
    return found


def from_arrays(arrays: dict[str, np.ndarray], response: int) -> Unfinished:
    """Undo `as_arrays`, with answers of up to `response` tokens."""
    fields = {name: np.asarray(x)[:-1] for name, x in arrays.items()}

    def growing(name: str) -> Growing:
        length = fields[f"{name}/rollouts/length"]
        inside = np.arange(response) < length[..., None]

        def whole(leaf: str) -> np.ndarray:
            packed = fields[f"{name}/rollouts/{leaf}"]
            x = np.zeros(inside.shape, packed.dtype)
            x[inside] = packed
            return x

        rollouts = Rollouts(
            **{leaf: whole(leaf) for leaf in PER_TOKEN},
            length=length,
            stopped=fields[f"{name}/rollouts/stopped"],
        )
        return Growing(rollouts, fields[f"{name}/ended"], fields[f"{name}/drawn_step"])

    queries = Queries(**{leaf: fields[f"queries/{leaf}"] for leaf in ("token", "length", "index")})
    single = [field.name for field in dataclasses.fields(Unfinished) if field.name in fields]
    return Unfinished(
        queries=queries,
        base=growing("base"),
        partial=growing("partial"),
        **{name: fields[name] for name in single},
    )
