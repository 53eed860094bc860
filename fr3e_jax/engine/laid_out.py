"""The rows of a decoding that goes on with unfinished queries: which branches sit in which trajectory."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from fr3e_jax.engine.starts import Starts, branch_number
from fr3e_jax.engine.unfinished import Unfinished
from fr3e_jax.types import Queries


class Placed(NamedTuple):
    """Branches that are laid out for a decoding.

    queries: of the N trajectories. starts: of their branches. place: of each branch among the base
    trajectories of all queries, followed by all their partial rollouts; -1: there is none.
    """

    queries: Queries
    starts: Starts
    place: Int[np.ndarray, "N C"]


def lay_out(
    unfinished: Unfinished, after: int, columns: int, row_counts: Sequence[int], parts: int
) -> Placed:
    """Lay out what has not ended: branches in the middle, then base trajectories, then branches from states.

    What finds no row waits for the next decoding. Of each kind older queries come first. Each trajectory goes
    to the part of the mesh that has the fewest branches yet, those with the most branches first.

    Args:
      unfinished: all queries.
      after: number of base trajectories, behind which the numbers of partial rollouts begin.
      columns: most branches of a trajectory.
      row_counts: rows of a part that programs are compiled for, ascending; the fewest that do are taken.
      parts: of the mesh.
    """
    found = [*begun_branches(unfinished, after), *not_begun(unfinished, after, columns)]
    enough = (count for count in row_counts if count * parts >= len(found))
    rows = parts * next(enough, row_counts[-1])
    of_part = [list[BranchRow]() for _ in range(parts)]
    load = np.zeros(parts, np.int64)
    for row in sorted(found[:rows], key=lambda row: -len(row.place)):
        room = [len(its) < rows // parts for its in of_part]
        part = int(np.argmin(np.where(room, load, np.iinfo(np.int64).max)))
        of_part[part].append(row)
        load[part] += len(row.place)
    size = unfinished.base.rollouts.token.shape[2]
    number, prefix_length = np.zeros((2, rows, columns), np.int32)
    drawn, at_position = np.zeros((2, rows, columns), bool)
    place, query = np.full((rows, columns), -1), np.zeros(rows, np.int64)
    response = np.zeros((rows, size), np.int32)
    for part, its in enumerate(of_part):
        # They begin in this order where not all find room at once: the longest first, and older queries.
        its = sorted(its, key=lambda row: (row.kind, row.query))
        for n, row in enumerate(its, part * (rows // parts)):
            here = n, slice(len(row.place))
            query[n], response[n, : len(row.response)] = row.query, row.response
            drawn[here], place[here] = True, row.place
            prefix_length[here], number[here], at_position[here] = row.prefix, row.number, row.at_position
    starts = Starts(
        query=np.arange(rows, dtype=np.int32),
        response=response,
        prefix_length=prefix_length,
        drawn=drawn,
        number=number,
        step=unfinished.step[query],
        at_position=at_position,
    )
    return Placed(jax.tree.map(lambda x: x[query], unfinished.queries), starts, place)


class BranchRow(NamedTuple):
    """A trajectory with branches of it.

    kind: 0 base trajectories, 1 branches in the middle, 2 branches from states. query: its row. response: its
    tokens. place, prefix, number, at_position: of each branch, as in `Placed` and `Starts`.
    """

    kind: int
    query: int
    response: np.ndarray
    place: np.ndarray
    prefix: np.ndarray
    number: np.ndarray
    at_position: np.ndarray


def begun_branches(unfinished: Unfinished, after: int) -> list[BranchRow]:
    """Make a row of each branch that was left in the middle."""
    (_, trees, states), found = unfinished.valid.shape, []
    of_tree = unfinished.partial.ended.shape[1] // trees
    for growing, before in ((unfinished.base, 0), (unfinished.partial, unfinished.base.ended.size)):
        length = growing.rollouts.length
        for query, branch in np.argwhere(~growing.ended & (length > 0)).tolist():
            response = own = growing.rollouts.token[query, branch, : length[query, branch]]
            number = branch
            if before:
                tree, column = divmod(branch, of_tree)
                base = unfinished.kept[query, tree]
                prefix = unfinished.prefix_length[query, tree, column // (of_tree // states)]
                response = np.concatenate([unfinished.base.rollouts.token[query, base, :prefix], own])
                number = branch_number(base, column, of_tree, after)
            place = before + query * length.shape[1] + branch
            one = np.array([place]), np.array([len(response)]), np.array([number]), np.array([False])
            found.append(BranchRow(1, query, response, *one))
    return found


def not_begun(unfinished: Unfinished, after: int, columns: int) -> list[BranchRow]:
    """Make rows of the branches that have drawn nothing: base trajectories, then those from states."""
    (q, r), (_, c) = unfinished.base.ended.shape, unfinished.partial.ended.shape
    (_, trees, states), found = unfinished.valid.shape, []
    of_tree = c // trees
    waits = ~unfinished.base.ended & (unfinished.base.rollouts.length == 0)
    for query in np.flatnonzero(waits.any(axis=1)).tolist():
        for some in split_every(np.flatnonzero(waits[query]), columns):
            none = np.zeros(len(some), np.int32)
            found.append(BranchRow(0, query, none[:0], query * r + some, none, some, none > 0))
    waits = (~unfinished.partial.ended & (unfinished.partial.rollouts.length == 0)).reshape(q, trees, of_tree)
    for query, tree in np.argwhere(waits.any(axis=2)).tolist():
        base = unfinished.kept[query, tree]
        response = unfinished.base.rollouts.token[query, base]
        for column in split_every(np.flatnonzero(waits[query, tree]), columns):
            prefix = unfinished.prefix_length[query, tree, column // (of_tree // states)]
            place = q * r + query * c + tree * of_tree + column
            number = branch_number(base, column, of_tree, after)
            found.append(BranchRow(2, query, response, place, prefix, number, prefix > 0))
    return found


def split_every(x: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an array into pieces of at most `size` entries."""
    return np.array_split(x, range(size, len(x), size))
