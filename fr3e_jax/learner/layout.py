"""Laying accepted states out for the learner: trunks, and rows that follow them, in chunks of few shapes.

A tree is a kept trajectory with its accepted states: the trunk is its query and base response up to the last
of them, the rows are their rollouts. Trees are dealt out to the row parts of the mesh, one that is too large
for a part in pieces, each with the trunk again. Within a part rows are sorted by length and cut into chunks.
"""

import dataclasses

import numpy as np

from fr3e_jax.types import Batch, Bundle, StateGroups, Trunks

SMALLEST = 32  # tokens that a width is at least
OVERHEAD = 768  # tokens that a chunk costs as much as, beside its own; and each shape is a program
SMALLER = (1, 2, 4)  # a chunk has as many rows as the budget allows, or so many times fewer
WINDOWS, WINDOW = 16, 64  # parts of a trunk that a chunk can be told to look at; what their size divides by


Rows = list[tuple[int, int, int]]
"""Trunk, state and rollout of each row of a part."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of one tree. row: int [rows, 2], state and rollout in the groups."""

    trunk: np.ndarray
    row: np.ndarray
    cost: int


def bundles_of(groups: StateGroups, parts: int, budget: int, shared: bool = True) -> list[Bundle]:
    """A minibatch for the learner.

    Args:
      groups: its states.
      parts: row parts of the mesh.
      budget: most tokens of a chunk, and of the trunks of a bundle, on each part, padding included (one row
        and one trunk there always are).
      shared: False for the flat form, without trunks.

    Returns:
      Bundles whose chunks have one shape on all parts.
    """
    dealt = deal(pieces_of(groups, parts), parts)
    if not shared:
        whole: list[Rows] = [[(0, *row) for piece in part for row in piece.row.tolist()] for part in dealt]
        return [bundle_of(groups, None, whole, budget)]
    bundles = []
    for part in dealt:
        part.sort(key=lambda piece: -len(piece.trunk))
    while any(dealt):
        width = bucket(max(len(part[0].trunk) for part in dealt if part))
        count = most_of(max(map(len, dealt)), width, budget)
        taken = [part[:count] for part in dealt]
        dealt = [part[count:] for part in dealt]
        rows: list[Rows] = [
            [(i, *row) for i, piece in enumerate(part) for row in piece.row.tolist()] for part in taken
        ]
        bundles.append(bundle_of(groups, trunks_of(taken, count, width), rows, budget))
    return bundles


def follows(groups: StateGroups) -> np.ndarray:
    """Tokens that the rows of each state follow, int [G]: query and prefix but for the last token of both."""
    return groups.query_length + groups.prefix_length - 1


def tokens_before(groups: StateGroups, state: int) -> np.ndarray:
    """Query and prefix of a state, int32."""
    query = groups.query[state, : groups.query_length[state]]
    return np.concatenate([query, groups.prefix[state, : groups.prefix_length[state]]])


def pieces_of(groups: StateGroups, parts: int) -> list[Piece]:
    """The trees, cut where one is more than its share of the work of a part."""
    follow, new = follows(groups), groups.length
    trees: dict[tuple[int, ...], list[int]] = {}
    for state, source in enumerate(groups.source):
        trees.setdefault(tuple(source[:2]), []).append(state)
    share = (int(new.sum()) + int(follow.max())) / parts
    pieces = []
    for states in trees.values():
        row = np.array([(state, m) for state in states for m in range(new.shape[1])])
        row = row[np.argsort(-new[row[:, 0], row[:, 1]], kind="stable")]
        cuts = min(max(round(int(new[states].sum()) / share), 1), len(row))
        for rows in (row[i::cuts] for i in range(cuts)):
            last = int(rows[np.argmax(follow[rows[:, 0]]), 0])
            trunk = tokens_before(groups, last)[: follow[last]]
            pieces.append(Piece(trunk, rows, len(trunk) + int(new[rows[:, 0], rows[:, 1]].sum())))
    return pieces


def deal(pieces: list[Piece], parts: int) -> list[list[Piece]]:
    """Pieces to parts, the most costly first, each to the part that has least."""
    dealt: list[list[Piece]] = [[] for _ in range(parts)]
    load = np.zeros(parts)
    for piece in sorted(pieces, key=lambda piece: -piece.cost):
        part = int(np.argmin(load))
        dealt[part].append(piece)
        load[part] += piece.cost
    return dealt


def trunks_of(pieces: list[list[Piece]], count: int, width: int) -> Trunks:
    """Trunks of each part, padded to `count` of `width` tokens."""
    token = np.zeros((len(pieces), count, width), np.int32)
    length = np.zeros((len(pieces), count), np.int32)
    for part, own in enumerate(pieces):
        for i, piece in enumerate(own):
            token[part, i, : len(piece.trunk)] = piece.trunk
            length[part, i] = len(piece.trunk)
    return Trunks(token, length)


def bundle_of(groups: StateGroups, trunks: Trunks | None, rows: list[Rows], budget: int) -> Bundle:
    """Rows (trunk, state, rollout) of each part in chunks."""
    follow = follows(groups)

    def size(row: tuple[int, int, int]) -> int:
        """Tokens that are computed: the last one is only a target."""
        _, state, rollout = row
        return int(groups.length[state, rollout]) + (0 if trunks is not None else int(follow[state]))

    for part in rows:
        part.sort(key=lambda row: (-bucket(size(row)), -follow[row[1]]))
    longest = np.zeros(max(map(len, rows)), int)
    for part in rows:
        longest[: len(part)] = np.maximum(longest[: len(part)], [size(row) for row in part])
    chunks, windows = [], []
    for first, count, width in cut(longest, budget):
        here = [part[first : first + count] for part in rows]
        chunks.append(chunk_of(groups, here, count, width, trunks is not None))
        deepest = max((int(follow[state]) for part in here for _, state, _ in part), default=0)
        windows.append(0 if trunks is None else window_of(deepest, trunks.token.shape[2]))
    return Bundle(trunks, tuple(chunks), tuple(windows))


def window_of(deepest: int, width: int) -> int:
    """Slots of trunks of `width` that rows look at which follow at most `deepest` tokens of them."""
    step = max(width // WINDOWS // WINDOW, 1) * WINDOW
    return min(max(-(-deepest // step), 1) * step, width)


def most_of(there: int, width: int, budget: int) -> int:
    """The largest power of two that fits the budget, and is not more than `there` rounded up to one."""
    return min(1 << max(budget // width, 1).bit_length() - 1, 1 << (there - 1).bit_length())


def row_counts(rows: int, width: int, budget: int) -> set[int]:
    """Numbers of rows that a chunk of `width` may have, of `rows` that there are in all: powers of two."""
    most = most_of(rows, width, budget)
    return {max(most // smaller, 1) for smaller in SMALLER}


def cut(longest: np.ndarray, budget: int) -> list[tuple[int, int, int]]:
    """Cut sorted rows into chunks so that they cost least in all.

    Args:
      longest: int [n], tokens of the rows in order, widths falling.
      budget: most tokens of a chunk.

    Returns:
      (first row, number of rows, a power of two, width) of each chunk; the last may have rows left over.
    """
    n = len(longest)
    least, best = np.zeros(n + 1), np.zeros(n, int)
    for i in range(n - 1, -1, -1):
        width, costs = bucket(int(longest[i])), {}
        for count in row_counts(n, width, budget):
            costs[count] = count * width + OVERHEAD + least[min(i + count, n)]
        best[i] = min(costs, key=costs.__getitem__)
        least[i] = costs[best[i]]
    chunks, i = [], 0
    while i < n:
        chunks.append((i, int(best[i]), bucket(int(longest[i]))))
        i += int(best[i])
    return chunks


def chunk_of(groups: StateGroups, rows: list[Rows], count: int, width: int, shared: bool) -> Batch:
    """`count` rows for each part, those that are missing without a trained token.

    A row has `width` tokens that are computed, and one more, the last target.
    """
    total = len(rows) * count
    token, old = np.zeros((total, width + 1), np.int32), np.zeros((total, width + 1), np.float32)
    length, start = np.ones((2, total), np.int32)
    trunk, prefix = np.zeros((2, total), np.int32)
    advantage = np.zeros(total, np.float32)
    follow = follows(groups)
    for part, own in enumerate(rows):
        for i, (number, state, rollout) in enumerate(own, part * count):
            before = tokens_before(groups, state)[follow[state] if shared else 0 :]
            new = groups.length[state, rollout]
            start[i], length[i] = len(before), len(before) + new
            token[i, : start[i]] = before
            token[i, start[i] : length[i]] = groups.token[state, rollout, :new]
            old[i, start[i] : length[i]] = groups.logprob[state, rollout, :new]
            advantage[i] = groups.advantage[state, rollout]
            trunk[i], prefix[i] = number, follow[state] if shared else 0
    return Batch(token, length, start, old, advantage, trunk, prefix)


def token_counts(bundles: list[Bundle]) -> tuple[int, int]:
    """(Tokens that have to run, tokens that are run, padding included)."""
    real = padded = 0
    for bundle in bundles:
        if bundle.trunks is not None:
            real += int(bundle.trunks.length.sum())
            padded += bundle.trunks.token.size
        for rows in bundle.chunks:
            real += int((rows.length - 1).sum())
            padded += rows.token[:, 1:].size
    return real, padded


def bucket(length: int) -> int:
    """`length` rounded up to one of eight sizes per doubling, so that few widths are compiled."""
    step = max(SMALLEST, 2 ** ((length - 1).bit_length() - 1) // 8) if length > 1 else SMALLEST
    return -(-max(length, 1) // step) * step
