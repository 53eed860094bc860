"""Whole rounds on branches of given lengths: one round against two of half, with and without waiting."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from fr3e_jax.bench.rollout_sides import branches_of, engine_of, opening
from fr3e_jax.bench.table import TINY, Measurement, in_turns, measurement, run_measurements
from fr3e_jax.config.values import Count
from fr3e_jax.engine.branches import Branches, Decoding
from fr3e_jax.engine.budget import needed_bytes
from fr3e_jax.engine.rollout import Engine, last
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.models.decoder import Params, init_params
from fr3e_jax.parallel.memory import bytes_on_device

ROUND_QUERIES, ROUND_BASE, ROUND_KEPT, ROUND_STATES, ROUND_ROLLOUTS = 16, 4, 2, 5, 16
ROUND_PROMPT, ROUND_LIMIT, ROUND_WAIT_FOR = 32, 128, 0.97
MEAN_SHARE, LOG_DEVIATION = 0.35, 0.8  # of answers: mean to limit, and deviation of the logarithm


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the branches of a round. base: int [B, R]. prefix, continuation: int [N, C]."""

    base: np.ndarray
    prefix: np.ndarray
    continuation: np.ndarray


def round_lengths(queries: int, rng: np.random.Generator) -> Lengths:
    """Draw the lengths of a round: log-normal, and what is left of an answer behind a state."""

    def answers(*shape: int) -> np.ndarray:
        middle = np.log(MEAN_SHARE * ROUND_LIMIT) - LOG_DEVIATION**2 / 2
        drawn = np.exp(middle + LOG_DEVIATION * rng.standard_normal(shape))
        return np.clip(np.ceil(drawn), 1, ROUND_LIMIT).astype(np.int32)

    base = answers(queries, ROUND_BASE)
    kept = base[:, :ROUND_KEPT].reshape(-1, 1)
    share = np.repeat(np.arange(ROUND_STATES) / ROUND_STATES, ROUND_ROLLOUTS)[None]
    prefix = np.minimum((share * kept).astype(np.int32), kept - 1)
    whole = answers(queries * ROUND_KEPT, ROUND_STATES * ROUND_ROLLOUTS)
    return Lengths(base, prefix, np.clip(whole - prefix, 1, ROUND_LIMIT - prefix).astype(np.int32))


def round_branches(lengths: Lengths) -> tuple[Branches, Branches]:
    """Make the branches of first return and of exploration, with KV caches of random numbers."""
    return (
        branches_of(TINY, ROUND_PROMPT, 0, np.zeros_like(lengths.base), lengths.base),
        branches_of(TINY, ROUND_PROMPT, ROUND_LIMIT, lengths.prefix, lengths.continuation),
    )


class Ended(NamedTuple):
    """What a decoding took: tokens that were generated, rows that were decoded, and bytes of KV caches."""

    tokens: int
    rows: int
    bytes: int


def decode_given(
    engine: Engine, params: Params, opened: Decoding, branches: Branches, may_run: int = 0
) -> tuple[Decoding, Ended]:
    """Decode branches of given lengths, until at most `may_run` of them run; and what it took."""
    decoding = last(engine.decode(params, branches, opened, Sampling(), may_run=may_run))
    caches = (branches.context.key, branches.context.value, decoding.pages.key, decoding.pages.value)
    tokens, rows = int(decoding.rollouts.length.sum()), int(decoding.row_steps)
    return decoding, Ended(tokens, rows, sum(map(bytes_on_device, caches)))


def rounds_side(engine: Engine, params: Params, rounds: Sequence[Lengths]) -> Callable[[], list[Ended]]:
    """Make the side that decodes the branches of rounds, one decoding after the other."""
    start = opening(engine)
    decodings = [branches for lengths in rounds for branches in round_branches(lengths)]

    def decoded(branches: Branches) -> Ended:
        return decode_given(engine, params, start(params, branches), branches)[1]

    return lambda: [decoded(branches) for branches in decodings]


def most_bytes(engine: Engine, rounds: Sequence[Lengths]) -> int:
    """Count the most bytes of KV caches that a decoding of these rounds has allocated."""
    found = []
    for branches in (branches for lengths in rounds for branches in round_branches(lengths)):
        key, placement = branches.context.key, engine.placement
        room = engine.room_for(TINY, branches.token.shape, key.shape[3], key.dtype)
        found.append(needed_bytes(TINY, placement, room, key.shape[3], key.dtype))
    return max(found)


def halves(whole: Lengths) -> list[Lengths]:
    """Divide a round into two of half the queries."""
    half = ROUND_QUERIES // 2
    queries = slice(0, half), slice(half, None)
    trajectories = slice(0, half * ROUND_KEPT), slice(half * ROUND_KEPT, None)
    return [
        Lengths(whole.base[some], whole.prefix[its], whole.continuation[its])
        for some, its in zip(queries, trajectories, strict=True)
    ]


class Together(NamedTuple):
    """The branches of a decoding that does not wait for its last ones.

    prefix, limit: int [N, C], tokens before and of each; those of kept trajectories, of base trajectories,
    and what was left, each of which has a row of its own.
    """

    prefix: np.ndarray
    limit: np.ndarray


def together(begun: Lengths, left: Together | None, columns: int) -> Together:
    """Lay out the branches of a round, its base trajectories and what the decoding before has left."""
    rows = [(begun.prefix, begun.continuation), (np.zeros_like(begun.base), begun.base)]
    if left is not None:
        running = left.limit > 0
        rows.append((left.prefix[running][:, None], left.limit[running][:, None]))
    padded = [[np.pad(x, ((0, 0), (0, columns - x.shape[1]))) for x in row] for row in rows]
    return Together(*(np.concatenate(x) for x in zip(*padded, strict=True)))


def early_side(engine: Engine, params: Params, whole: Lengths) -> Callable[[], Ended]:
    """Make the side that decodes a round which does not wait, after one that has left branches."""
    columns, start = ROUND_STATES * ROUND_ROLLOUTS, opening(engine)

    def decoded(given: Together) -> tuple[Ended, Together]:
        branches = branches_of(TINY, ROUND_PROMPT, ROUND_LIMIT, given.prefix, given.limit)
        may_run = int((1 - ROUND_WAIT_FOR) * np.count_nonzero(given.limit))
        decoding, ended = decode_given(engine, params, start(params, branches), branches, may_run)
        drawn = np.asarray(decoding.rollouts.length)
        return ended, Together(given.prefix + drawn, given.limit - drawn)

    _, left = decoded(together(whole, None, columns))
    following = together(whole, left, columns)
    return lambda: decoded(following)[0]


def one_round_vs_two(repeats: int) -> list[Measurement]:
    """Compare a round of 16 queries with two of 8, within the memory that one of these takes."""
    params, whole = init_params(TINY, 0), round_lengths(ROUND_QUERIES, np.random.default_rng(0))
    small = halves(whole)
    engine = engine_of(TINY, ROUND_LIMIT)
    given = most_bytes(engine, small)
    within = dataclasses.replace(engine_of(TINY, ROUND_LIMIT), cache_bytes=given)
    one, ended = rounds_side(within, params, [whole]), list[Ended]()
    not_waiting, early = early_side(within, params, whole), list[Ended]()

    def ours() -> None:
        ended[:] = one()

    def without_waiting() -> None:
        early[:] = [not_waiting()]

    seconds = in_turns(repeats, ours, without_waiting, rounds_side(engine, params, small))
    tokens = int(whole.base.sum() + whole.continuation.sum())
    assert sum(decoding.tokens for decoding in ended) == tokens
    fast, soon, slow = (
        n / taken for n, taken in zip((tokens, early[0].tokens, tokens), seconds, strict=True)
    )
    rows = sum(decoding.rows for decoding in ended)
    half = ROUND_QUERIES // 2
    of = f"{ROUND_QUERIES} queries, {tokens:,} tokens; two rounds of {half} queries"
    measurements = [
        measurement("round_vs_two", fast, slow, "tokens/s", of),
        measurement(
            "early_round_vs_two", soon, slow, "tokens/s", f"the same, {ROUND_WAIT_FOR} of them ended"
        ),
        measurement("round_occupancy", tokens, rows, "tokens", "rows that were decoded"),
    ]
    for name, decodings in (("round", ended), ("early_round", early)):
        peak = max(decoding.bytes for decoding in decodings)
        of = "what a round of half takes"
        measurements.append(measurement(f"{name}_peak_vs_budget", peak / 1e6, given / 1e6, "MB", of))
    return measurements


def measure_rounds(repeats: Count = 3, json: bool = False) -> list[Measurement]:
    """Measure whole rounds on branches of log-normal lengths, on 2 CPU cores.

    round_vs_two: tokens a second of one round, to those of two rounds of half the queries, within the memory
    of these. early_round_vs_two: of one decoding that has its base trajectories beside the exploration, ends
    when 0.97 of the branches have ended, and goes on with what one before it has left. round_occupancy:
    tokens that were generated per row decoded. round_peak_vs_budget, early_round_peak_vs_budget: most bytes
    of KV caches, to what they may take.

    Args:
      repeats: of each side, in turns; medians are shown.
      json: print an object a line instead of a table.

    Returns:
      What is printed as JSON.
    """
    console = Console(stderr=True) if json else Console()
    found = run_measurements("round", {"one_round_vs_two": one_round_vs_two}, "", lambda _: repeats, console)
    return found if json else []
