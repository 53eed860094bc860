"""Lay accepted states out for the learner: trunks, and the rows that follow them, in chunks of few shapes.

A tree is a kept trajectory with its accepted states. Its trunk is its query and base response up to the last
of these states, and its rows are their rollouts. Trees are distributed over the row parts of the mesh. Within
a part rows are sorted by length and cut into chunks.

All parts compute equally many rows of equal widths, so each waits for the longest of them. Trees are cut into
subtrees, each with the trunk again, and a subtree goes where its rows are beside equally long ones of other
parts. Finer cuts fit better and repeat more trunks. Of several layouts the one that computes least is taken.
"""

import dataclasses

import numpy as np
from jaxtyping import Int, Int32

from fr3e_jax.parallel.sizes import eight_per_doubling, last_power_of_two, next_multiple, next_power_of_two
from fr3e_jax.types import Batch, Bundle, StateGroups, Trunks

LEAST_WIDTH = 32  # tokens; widths are multiples of it
OVERHEAD = 768  # tokens that a chunk costs as much as, beside its own; and each shape is a program
CUTS = (1, 2, 3, 4)  # so many times as many subtrees as the work of a part needs
FEWER_ROWS = (1, 2, 4)  # a chunk has as many rows as the budget allows, or so many times fewer
WINDOWS = 16  # most windows of a width of trunks
WINDOW_MULTIPLE = 64  # slots; windows are multiples of it

PartRows = list[tuple[int, int, int]]
"""Trunk, state and rollout of each row of a part."""


@dataclasses.dataclass(frozen=True)
class Subtree:
    """Rows of one tree, which go to one part of the mesh."""

    trunk: Int32[np.ndarray, " tokens"]
    row: Int[np.ndarray, "rows 2"]
    """State and rollout of each row, indices of the groups."""
    cost: int
    """Tokens of the trunk and the rows."""


def bundles_of(groups: StateGroups, parts: int, budget: int, shared: bool = True) -> list[Bundle]:
    """Lay a minibatch out for the learner.

    Args:
      groups: its states.
      parts: row parts of the mesh.
      budget: most tokens of a chunk, and of the trunks of a bundle, on each part, padding included. One row
        and one trunk are there in any case.
      shared: False for the flat form, without trunks.

    Returns:
      Bundles whose chunks have one shape on all parts.
    """
    layouts = [
        laid_out(groups, distribute(subtrees_of(groups, parts, cuts), parts, groups.length), budget, shared)
        for cuts in (CUTS if parts > 1 else CUTS[:1])
    ]
    return min(layouts, key=lambda bundles: computed_tokens(bundles, parts))


def computed_tokens(bundles: list[Bundle], parts: int) -> int:
    """Count the tokens that each part computes, padding and the overhead of programs included."""
    tokens = 0
    for bundle in bundles:
        tokens += 0 if bundle.trunks is None else bundle.trunks.token.size // parts + OVERHEAD
        tokens += sum(rows.token[:, 1:].size // parts + OVERHEAD for rows in bundle.chunks)
    return tokens


def laid_out(
    groups: StateGroups, distributed: list[list[Subtree]], budget: int, shared: bool
) -> list[Bundle]:
    """Lay out the subtrees of each part, which are taken off the lists; others as for `bundles_of`."""
    if not shared:
        whole: list[PartRows] = [
            [(0, *row) for subtree in part for row in subtree.row.tolist()] for part in distributed
        ]
        return [bundle_of(groups, None, whole, budget)]
    bundles = []
    for part in distributed:
        part.sort(key=lambda subtree: -len(subtree.trunk))
    while any(distributed):
        width = width_of(max(len(part[0].trunk) for part in distributed if part))
        count = most_rows(max(map(len, distributed)), width, budget)
        taken = [part[:count] for part in distributed]
        distributed = [part[count:] for part in distributed]
        rows: list[PartRows] = [
            [(i, *row) for i, subtree in enumerate(part) for row in subtree.row.tolist()] for part in taken
        ]
        bundles.append(bundle_of(groups, trunks_of(taken, count, width), rows, budget))
    return bundles


def followed_tokens(groups: StateGroups) -> Int[np.ndarray, " G"]:
    """Count the tokens that the rows of each state follow: query and prefix, but for the last token."""
    return groups.query_length + groups.prefix_length - 1


def tokens_before(groups: StateGroups, state: int) -> Int32[np.ndarray, " tokens"]:
    """Join the query and the prefix of a state."""
    query = groups.query[state, : groups.query_length[state]]
    return np.concatenate([query, groups.prefix[state, : groups.prefix_length[state]]])


def subtrees_of(groups: StateGroups, parts: int, cuts: int = 1) -> list[Subtree]:
    """Make the trees, cut where one is more than its share of the work of a part.

    Args:
      groups: the minibatch.
      parts: row parts of the mesh.
      cuts: of the share of a part, a subtree has one of so many pieces, or less.
    """
    follow, new = followed_tokens(groups), groups.length
    trees: dict[tuple[int, ...], list[int]] = {}
    for state, source in enumerate(groups.source):
        trees.setdefault(tuple(source[:2]), []).append(state)
    share = (int(new.sum()) + int(follow.max())) / (parts * cuts)
    subtrees = []
    for states in trees.values():
        row = np.array([(state, m) for state in states for m in np.flatnonzero(new[state])], int).reshape(
            -1, 2
        )
        row = row[np.argsort(-new[row[:, 0], row[:, 1]], kind="stable")]
        pieces = min(max(round(int(new[states].sum()) / share), 1), len(row))
        for rows in (row[i::pieces] for i in range(pieces)):
            last = int(rows[np.argmax(follow[rows[:, 0]]), 0])
            trunk = tokens_before(groups, last)[: follow[last]]
            subtrees.append(Subtree(trunk, rows, len(trunk) + int(new[rows[:, 0], rows[:, 1]].sum())))
    return subtrees


def distribute(subtrees: list[Subtree], parts: int, length: Int[np.ndarray, "G M"]) -> list[list[Subtree]]:
    """Distribute subtrees over parts, the most costly first.

    Each goes where all parts together compute fewest tokens more: the i-th longest row of a part is as wide
    as that of any part, and so are trunks. Among equal parts it goes to the one with the least cost so far.

    Args:
      subtrees: of the minibatch.
      parts: row parts of the mesh.
      length: new tokens of each rollout.
    """
    distributed: list[list[Subtree]] = [[] for _ in range(parts)]
    load = np.zeros(parts)
    rows, trunks = np.zeros((2, parts, 1), int)
    for subtree in sorted(subtrees, key=lambda subtree: -subtree.cost):
        own = np.array([width_of(int(length[state, rollout])) for state, rollout in subtree.row])
        rows_with = with_widths(rows, own)
        trunks_with = with_widths(trunks, np.array([width_of(len(subtree.trunk))]))
        part = int(np.lexsort((load, computed_with(rows, rows_with) + computed_with(trunks, trunks_with)))[0])
        rows, trunks = replaced(rows, rows_with, part), replaced(trunks, trunks_with, part)
        distributed[part].append(subtree)
        load[part] += subtree.cost
    return distributed


def with_widths(
    widths: Int[np.ndarray, "parts n"], more: Int[np.ndarray, " m"]
) -> Int[np.ndarray, "parts k"]:
    """Add the same widths to those of every part; in falling order, k = n + m."""
    joined = np.concatenate([widths, np.broadcast_to(more, (len(widths), len(more)))], axis=1)
    return -np.sort(-joined, axis=1)


def computed_with(
    widths: Int[np.ndarray, "parts n"], wider: Int[np.ndarray, "parts k"]
) -> Int[np.ndarray, " parts"]:
    """Count the tokens that a part computes if one part, for each of them, has the widths `wider`."""
    longest = np.pad(widths.max(axis=0), (0, wider.shape[1] - widths.shape[1]))
    return np.maximum(wider, longest).sum(axis=1)


def replaced(
    widths: Int[np.ndarray, "parts n"], wider: Int[np.ndarray, "parts k"], part: int
) -> Int[np.ndarray, "parts m"]:
    """Give one part its widths of `wider`, and leave out what is 0 in all parts."""
    widths = np.pad(widths, ((0, 0), (0, wider.shape[1] - widths.shape[1])))
    widths[part] = wider[part]
    return widths[:, widths.any(axis=0)]


def trunks_of(subtrees: list[list[Subtree]], count: int, width: int) -> Trunks:
    """Make the trunks of each part, padded to `count` trunks of `width` tokens."""
    token = np.zeros((len(subtrees), count, width), np.int32)
    length = np.zeros((len(subtrees), count), np.int32)
    for part, own in enumerate(subtrees):
        for i, subtree in enumerate(own):
            token[part, i, : len(subtree.trunk)] = subtree.trunk
            length[part, i] = len(subtree.trunk)
    return Trunks(token, length)


def bundle_of(groups: StateGroups, trunks: Trunks | None, rows: list[PartRows], budget: int) -> Bundle:
    """Cut the rows of each part into chunks."""
    follow = followed_tokens(groups)
    # Tokens that are computed: the last one of a row is only a target.
    computed = groups.length + (follow[:, None] if trunks is None else 0)
    for part in rows:
        part.sort(key=lambda row: (-width_of(int(computed[row[1], row[2]])), -follow[row[1]]))
    longest = np.zeros(max(map(len, rows)), int)
    for part in rows:
        sizes = [computed[state, rollout] for _, state, rollout in part]
        longest[: len(part)] = np.maximum(longest[: len(part)], sizes)
    chunks, windows, origins = [], [], []
    for first, count, width in cut_rows(longest, budget):
        here = [part[first : first + count] for part in rows]
        chunks.append(chunk_of(groups, here, count, width, trunks is not None))
        deepest = max((int(follow[state]) for part in here for _, state, _ in part), default=0)
        windows.append(0 if trunks is None else window_of(deepest, trunks.token.shape[2]))
        origins.append(origin_of(here, count))
    return Bundle(trunks, tuple(chunks), tuple(windows), tuple(origins))


def origin_of(rows: list[PartRows], count: int) -> Int[np.ndarray, "rows 2"]:
    """List state and rollout of each row of a chunk of `count` rows for each part; -1 of missing rows."""
    origin = np.full((len(rows) * count, 2), -1)
    for part, own in enumerate(rows):
        for i, (_, state, rollout) in enumerate(own, part * count):
            origin[i] = state, rollout
    return origin


def width_of(tokens: int) -> int:
    """Round tokens up to one of 8 widths per doubling, so that few are compiled."""
    return eight_per_doubling(tokens, LEAST_WIDTH)


def window_of(deepest: int, width: int) -> int:
    """Choose the window of rows that follow at most `deepest` tokens of trunks of `width` slots."""
    step = max(width // WINDOWS // WINDOW_MULTIPLE, 1) * WINDOW_MULTIPLE
    return min(next_multiple(max(deepest, 1), step), width)


def most_rows(rows: int, width: int, budget: int) -> int:
    """Choose the largest power of 2 of rows of `width` within the budget; `rows` are there in all."""
    return min(last_power_of_two(budget // width), next_power_of_two(rows))


def row_counts(rows: int, width: int, budget: int) -> set[int]:
    """List the numbers of rows that a chunk of `width` may have, powers of 2; `rows` are there in all."""
    most = most_rows(rows, width, budget)
    return {max(most // times, 1) for times in FEWER_ROWS}


def cut_rows(longest: Int[np.ndarray, " rows"], budget: int) -> list[tuple[int, int, int]]:
    """Cut sorted rows into chunks that cost least in all.

    Args:
      longest: tokens of the longest row among the parts, in order, widths falling.
      budget: most tokens of a chunk.

    Returns:
      (first row, number of rows, a power of 2, width) of each chunk; the last may have rows left over.
    """
    n = len(longest)
    least, best = np.zeros(n + 1), np.zeros(n, int)
    for i in range(n - 1, -1, -1):
        width, costs = width_of(int(longest[i])), {}
        for count in row_counts(n, width, budget):
            costs[count] = count * width + OVERHEAD + least[min(i + count, n)]
        best[i] = min(costs, key=costs.__getitem__)
        least[i] = costs[best[i]]
    chunks, i = [], 0
    while i < n:
        chunks.append((i, int(best[i]), width_of(int(longest[i]))))
        i += int(best[i])
    return chunks


def chunk_of(groups: StateGroups, rows: list[PartRows], count: int, width: int, shared: bool) -> Batch:
    """Fill a chunk of `count` rows for each part; rows that are missing have no trained token.

    A row has `width` tokens that are computed, and one more, the last target.
    """
    total = len(rows) * count
    token, old = np.zeros((total, width + 1), np.int32), np.zeros((total, width + 1), np.float32)
    length, start = np.ones((2, total), np.int32)
    trunk, prefix = np.zeros((2, total), np.int32)
    advantage = np.zeros(total, np.float32)
    weight = None if groups.weight is None else np.zeros((total, width + 1), np.float32)
    share = None if groups.share is None else np.zeros(total, np.float32)
    follow = followed_tokens(groups)
    for part, own in enumerate(rows):
        for i, (number, state, rollout) in enumerate(own, part * count):
            before = tokens_before(groups, state)[follow[state] if shared else 0 :]
            new = groups.length[state, rollout]
            start[i], length[i] = len(before), len(before) + new
            token[i, : start[i]] = before
            token[i, start[i] : length[i]] = groups.token[state, rollout, :new]
            old[i, start[i] : length[i]] = groups.logprob[state, rollout, :new]
            advantage[i] = groups.advantage[state, rollout]
            if weight is not None and groups.weight is not None:
                weight[i, start[i] : length[i]] = groups.weight[state, rollout, :new]
            if share is not None and groups.share is not None:
                share[i] = groups.share[state, rollout]
            trunk[i], prefix[i] = number, follow[state] if shared else 0
    return Batch(
        token=token,
        length=length,
        start=start,
        old_logprob=old,
        advantage=advantage,
        trunk=trunk,
        prefix=prefix,
        weight=weight,
        share=share,
    )


def token_counts(bundles: list[Bundle]) -> tuple[int, int]:
    """Count (tokens that are there, tokens that are computed, padding included)."""
    real = padded = 0
    for bundle in bundles:
        if bundle.trunks is not None:
            real += int(bundle.trunks.length.sum())
            padded += bundle.trunks.token.size
        for rows in bundle.chunks:
            real += int((rows.length - 1).sum())
            padded += rows.token[:, 1:].size
    return real, padded
