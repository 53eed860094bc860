"""Branching rollouts against the slow, obvious way: every branch decoded alone, from its full prefix,
without a cache."""

import contextlib
import dataclasses
import functools
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from support import TINY, examples, placement, tiny_params

from fr3e_jax.engine import rollout, sampler, seats
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY, Sampling
from fr3e_jax.engine.seats import Leg, Seats
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.parallel.sizes import two_per_doubling
from fr3e_jax.planning.hlo import Program
from fr3e_jax.types import Queries, States

B, R, M, MAX_PROMPT, MAX_NEW = 4, 3, 2, 8, 24
SIZE = MAX_PROMPT + MAX_NEW
ENDS = (3, 11)
GRAPH = graph_of(TINY)
PARAMS = tiny_params(scale=2.0)  # larger weights amplify the rounding of sums in another order
SEED_KEY = jax.random.key(7)
STEP = 5
POLICY, FILTERED = Sampling(), Sampling(temperature=0.8, top_k=12, top_p=0.9)


# --- the reference


class Alone(NamedTuple):
    """What a branch generates, and of each token what `Rollouts` has."""

    token: list[int]
    logprob: list[float]
    sampled_logprob: list[float]
    entropy: list[float]


class Start(NamedTuple):
    """Where a branch starts: its tokens, the query's place in the stream, its number, most tokens to draw."""

    prefix: list[int]
    index: int
    number: int
    limit: int


@jax.jit
def full_logits(params, token, length):
    """Logits [rows, V] after the last of `length` tokens of each row, by a forward pass over all of them."""
    model = nnx.merge(GRAPH, params)

    def one(token, length):
        hidden, _ = model(token, jnp.arange(SIZE), length)
        return model.logits(hidden)[length - 1]

    return jax.vmap(one)(token, length)


@jax.jit
def uniforms(index, number):
    """Of branches: the uniform number for the draw from the logits of each position, [rows, SIZE]."""
    keys = jax.vmap(sampler.row_key, (None, None, 0, 0))(SEED_KEY, STEP, index, number)
    return jax.vmap(jax.vmap(sampler.draw_uniform, (None, 0)), (0, None))(keys, jnp.arange(SIZE))


def softmax(logits):
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def sampled(logits, sampling):
    """The distribution that tokens are drawn from, by sorting."""
    if sampling.temperature == 0.0:
        return np.eye(len(logits))[logits.argmax()]
    order = np.argsort(-logits)
    kept = order[: sampling.top_k or None]
    weight = softmax(logits[kept] / sampling.temperature)
    if sampling.top_p < 1.0:
        kept = kept[: np.searchsorted(np.cumsum(weight), sampling.top_p) + 1]
    probability = np.zeros(len(logits))
    probability[kept] = softmax(logits[kept] / sampling.temperature)
    return probability


def tiny_logits(token, length):
    """`full_logits` of the model of this file."""
    return full_logits(PARAMS, token, length)


def decode_alone(starts, sampling=POLICY, ends=ENDS, forward=tiny_logits):
    """What every branch generates: one forward pass over the whole of it for every token."""
    rows = -(-max(len(starts), 1) // 16) * 16  # few shapes
    token, length = np.zeros((rows, SIZE), np.int32), np.ones(rows, np.int32)
    name = np.zeros((2, rows), np.int32)
    for row, start in enumerate(starts):
        length[row] = len(start.prefix)
        token[row, : length[row]] = start.prefix
        name[:, row] = start.index, start.number
    uniform = np.asarray(uniforms(*name), np.float64)
    found = [Alone([], [], [], []) for _ in starts]
    running = [row for row, start in enumerate(starts) if start.limit > 0]
    while running:
        logits = np.asarray(forward(token, length), np.float64)
        for row in running:
            policy, drawn_from = softmax(logits[row]), sampled(logits[row], sampling)
            drawn = int(np.searchsorted(np.cumsum(drawn_from), uniform[row, length[row] - 1], side="right"))
            alone = found[row]
            alone.token.append(drawn)
            alone.logprob.append(np.log(policy[drawn]))
            alone.sampled_logprob.append(np.log(drawn_from[drawn]))
            alone.entropy.append(-(policy * np.log(policy)).sum())
            if length[row] < SIZE:
                token[row, length[row]] = drawn
            length[row] += 1
        running = [
            row
            for row in running
            if len(found[row].token) < starts[row].limit and found[row].token[-1] not in ends
        ]
    return found


def check(rollouts, starts, sampling=POLICY, ends=ENDS, forward=tiny_logits):
    """Rollouts [N, C] on the host are what branches, named by (n, c), generate alone; others are empty."""
    alone = dict(zip(starts, decode_alone(list(starts.values()), sampling, ends, forward), strict=True))
    for place in np.ndindex(*rollouts.length.shape):
        expected = alone.get(place, Alone([], [], [], []))
        size = int(rollouts.length[place])
        assert rollouts.token[place][:size].tolist() == expected.token
        for name in ("logprob", "sampled_logprob", "entropy"):
            ours = getattr(rollouts, name)[place]
            np.testing.assert_allclose(ours[:size], getattr(expected, name), atol=1e-5, err_msg=name)
            assert not ours[size:].any()
        assert not rollouts.token[place][size:].any()
        assert bool(rollouts.stopped[place]) == (bool(size) and expected.token[-1] in ends)


def starts_of_queries(q, count):
    """Answers from the query alone."""
    return {
        (n, r): Start(q.token[n, : q.length[n]].tolist(), q.index[n], r, MAX_NEW)
        for n, r in np.ndindex(len(q.length), count)
    }


def starts_of_states(q, base, states, rollouts, count):
    """Continuations of valid states, which `count` base trajectories of a query come before."""
    found = {}
    for n, j in np.argwhere(states.valid):
        query, size = states.query[n], int(states.prefix_length[n, j])
        prefix = [*q.token[query, : q.length[query]], *base.token[query, states.base[n], :size]]
        for c in range(j * rollouts, (j + 1) * rollouts):
            number = count + states.base[n] * states.valid.shape[1] * rollouts + c
            found[n, c] = Start(prefix, q.index[query], number, MAX_NEW - size)
    return found


# --- rounds on a mesh


def queries():
    rng = np.random.default_rng(0)
    length = np.array([5, 8, 1, 3], np.int32)
    token = rng.integers(0, TINY.vocab_size, (B, MAX_PROMPT))
    token = np.where(np.arange(MAX_PROMPT) < length[:, None], token, 0).astype(np.int32)
    # Indices in the stream, not rows: keys must follow them.
    return Queries(token, length, np.array([40, 41, 42, 43], np.int32))


@functools.cache
def engine(data=1, fsdp=1, tensor=1):
    return Engine(GRAPH, placement(data, fsdp, tensor, SAMPLING_TABLE), MAX_NEW, ENDS)


@functools.cache
def explored(sampling, padding=(4, 5)):
    """A round on one device: base rollouts, states, partial rollouts, on the host.

    padding: places of trajectories that have no valid state.
    """
    e = engine()
    placed = e.placement.place_rows(queries())
    base, caches, _ = e.first_return(PARAMS, placed, SEED_KEY, STEP, R, sampling)
    length = np.asarray(base.length)
    # Ragged: the root alone, position 1, the last token, several trajectories of one query, a state
    # that is invalid.
    states = States(
        query=np.array([0, 0, 3, 2], np.int32),
        base=np.array([2, 1, 0, 1], np.int32),
        response=np.asarray(base.token)[[0, 0, 3, 2], [2, 1, 0, 1]],
        prefix_length=np.array([[0, 1, length[0, 2] - 1], [0, 1, 2], [0, 2, 3], [0, 0, 0]], np.int32).clip(0),
        valid=np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool),
    )
    real = np.setdiff1d(np.arange(6), padding)

    def pad(x):
        whole = np.zeros((6, *x.shape[1:]), x.dtype)
        whole[real] = x
        return whole

    states = jax.tree.map(pad, states)
    at = e.placement.place_rows(states)
    how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": M, "sampling": sampling}
    partial, _ = e.explore(PARAMS, placed, caches, at, **how)
    return jax.device_get(base), states, jax.device_get(partial)


@pytest.mark.optimised
@pytest.mark.parametrize("sampling", [GREEDY, POLICY], ids=["greedy", "policy"])
def test_rollouts_equal_decoding_alone(sampling):
    base, states, partial = explored(sampling)
    check(base, starts_of_queries(queries(), R), sampling)
    starts = starts_of_states(queries(), base, states, M, R)
    assert len(starts) == 18
    check(partial, starts, sampling)


def test_greedy_branches_continue_as_their_base_trajectory_did():
    base, states, partial = explored(GREEDY)
    for n, j in np.argwhere(states.valid):
        size = states.prefix_length[n, j]
        whole = base.token[states.query[n], states.base[n]]
        np.testing.assert_array_equal(partial.token[n, j * M, : MAX_NEW - size], whole[size:])


def test_rollouts_of_a_state_differ_when_sampled():
    _, states, partial = explored(POLICY)
    pairs = [(partial.token[n, j * M], partial.token[n, j * M + 1]) for n, j in np.argwhere(states.valid)]
    assert sum((a != b).any() for a, b in pairs) > len(pairs) / 2


def test_rollouts_do_not_depend_on_padding_trajectories():
    _, _, padded = explored(POLICY, padding=(0, 3))
    _, _, plain = explored(POLICY)
    np.testing.assert_array_equal(padded.token[[1, 2, 4, 5]], plain.token[:4])
    assert not padded.length[[0, 3]].any()


def test_an_answer_is_never_longer_than_the_limit_prefix_included():
    _, states, partial = explored(POLICY)
    whole = partial.length + np.repeat(states.prefix_length, M, axis=1)
    assert whole.max() <= MAX_NEW
    assert (~partial.stopped & (whole == MAX_NEW)).any()  # the limit did cut some


# --- rows that move


class Moved(NamedTuple):
    """A step of the engine's loop: rows of a part and slots of each, before and after."""

    before: tuple[int, int]
    after: tuple[int, int]
    full: bool

    @property
    def kind(self):
        if self.before == self.after:
            return "stays"
        if self.after[0] == self.before[0]:
            return "grows"
        return "divided anew because full" if self.full else "divided anew"


@contextlib.contextmanager
def small_ladder(slots=9, step_down=0.5, fewest=3):
    """Rows that move at the sizes of tests, and a list of how they did.

    slots: to begin with. Others: what the ladder has as constants.
    """
    moved, following = [], seats.Ladder.next

    def noting(self, running, rows, slots, full):
        after = following(self, running, rows, slots, full)
        moved.append(Moved((rows, slots), after, full))
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seats, "FEWEST_ROWS", fewest)
        patch.setattr(seats, "STEP_DOWN", step_down)
        patch.setattr(rollout, "first_slots", lambda max_new: slots)
        patch.setattr(seats.Ladder, "next", noting)
        yield moved


N, J = 2, 9  # trajectories, and the root with up to 8 positions; one rollout of each
MANY_ENDS = (3, 11, 20)


@functools.cache
def engine_of(ends):
    """With its programs, which have the constants of `small_ladder` in them where it is used with that."""
    return Engine(GRAPH, placement(table=SAMPLING_TABLE), MAX_NEW, ends)


@st.composite
def rounds(draw):
    """Two queries of any length, and how to choose states of two trajectories of either.

    (queries, [(query, base, [where], ...)]), where being of the base trajectory: a part of it, the root,
    position 1, its last token or all of it.
    """
    length = np.array([draw(st.integers(1, MAX_PROMPT)) for _ in range(2)], np.int32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    token = rng.integers(0, TINY.vocab_size, (2, MAX_PROMPT)).astype(np.int32)
    token = np.where(np.arange(MAX_PROMPT) < length[:, None], token, 0)
    index = np.array([draw(st.integers(0, 2**31 - 1)) for _ in range(2)], np.int32)
    where = st.one_of(st.sampled_from(["root", "first", "last", "all"]), st.floats(0, 1))
    many = st.one_of(st.lists(where, max_size=J), st.lists(where, min_size=J, max_size=J))
    chosen = [(draw(st.integers(0, 1)), r, draw(many)) for r in range(N)]
    return Queries(token, length, index), chosen


def states_of(chosen, base):
    """`States` from what `rounds` draws, once the base trajectories are known."""
    prefix_length, valid = np.zeros((N, J), np.int32), np.zeros((N, J), bool)
    query, trajectory = (np.array([choice[i] for choice in chosen], np.int32) for i in range(2))
    for n, (q, r, wheres) in enumerate(chosen):
        length = int(base.length[q, r])
        named = {"root": 0, "first": 1, "last": length - 1, "all": length}
        for j, where in enumerate(wheres):
            prefix_length[n, j] = named[where] if where in named else int(where * length)
            valid[n, j] = True
    return States(query, trajectory, base.token[query, trajectory], prefix_length, valid)


def return_first(e, q):
    """Base trajectories of two queries; their rows do not move, and here their caches do not grow."""
    base, caches, _ = e.first_return(PARAMS, e.placement.place_rows(q), SEED_KEY, STEP, 2, FILTERED)
    return jax.device_get(base), caches


def test_moved_rows_generate_what_branches_generate_alone():
    """Whatever the states are and however often rows have moved and caches grown meanwhile."""
    e, kinds = engine_of(MANY_ENDS), set()

    @examples(14)
    @given(rounds())
    def holds(drawn):
        q, chosen = drawn
        base, caches = return_first(e, q)
        check(base, starts_of_queries(q, 2), FILTERED, MANY_ENDS)
        states = states_of(chosen, base)
        placed, at = e.placement.place_rows((q, states))
        with small_ladder() as moved:
            how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": 1, "sampling": FILTERED}
            partial, row_steps = e.explore(PARAMS, placed, caches, at, **how)
        partial = jax.device_get(partial)
        check(partial, starts_of_states(q, base, states, 1, 2), FILTERED, MANY_ENDS)
        assert partial.length.sum() <= row_steps <= N * J * partial.length.max()
        kinds.update(move.kind for move in moved)

    holds()
    assert kinds >= {"grows", "divided anew", "divided anew because full"}


@pytest.mark.parametrize("ends", [(), tuple(range(0, TINY.vocab_size, 3))], ids=["never", "soon"])
def test_moved_answers_to_queries_equal_decoding_alone(ends):
    """That all stop at the limit, or nearly all of them soon and some at once."""
    e, q = engine_of(ends), queries()
    with small_ladder(slots=12) as moved:
        answers, row_steps = e.sample(PARAMS, e.placement.place_rows(q), SEED_KEY, STEP, 4, POLICY)
    answers = jax.device_get(answers)
    check(answers, starts_of_queries(q, 4), POLICY, ends)
    kinds = [move.kind for move in moved]
    if ends:
        assert (answers.length == 1).any()
        assert kinds.count("divided anew") > 1
        assert row_steps < answers.length.size * answers.length.max() / 2
    else:
        assert (answers.length == MAX_NEW).all()
        assert kinds == ["grows"]
        assert row_steps == answers.length.sum()


# From (rows, slots) to those to go on with: in another order, divided anew, with a larger cache.
MOVES = {
    (18, 9): [(18, 9), (18, 18), (9, 18)],
    (18, 18): [(9, 36)],
    (9, 18): [(9, 18), (3, 54)],
    (9, 36): [],
    (3, 54): [],
}


def any_seats(rng, running, rows):
    """Seats of running branches [1, N, J] in any rows, with anything that is allowed elsewhere."""
    width = min(J, two_per_doubling(rows))
    branches = rng.permutation(np.flatnonzero(running))
    sits = rng.permutation(rows)[: len(branches)]
    branch = rng.choice(branches, (1, rows)).astype(np.int32)
    row = rng.integers(0, rows, (1, N * J)).astype(np.int32)
    group = rng.integers(0, rows, (1, N, width)).astype(np.int32)
    lane = rng.integers(0, N * width, (1, rows)).astype(np.int32)
    places = [iter(rng.permutation(width)) for _ in range(N)]
    for at, b in zip(sits, branches, strict=True):
        place = next(places[b // J])
        branch[0, at], row[0, b] = b, at
        group[0, b // J, place] = at
        lane[0, at] = b // J * width + place
    return Seats(branch, row, group, lane)


def test_rows_may_move_in_any_order_at_any_time():
    """Random permutations at random moments, and branches that stop at given times of their own."""
    e, shapes = engine_of(MANY_ENDS), set()

    @examples(9)
    @given(rounds(), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 4]))
    def holds(drawn, seed, unequal):
        q, chosen = drawn
        rng = np.random.default_rng(seed)
        base, caches = return_first(e, q)
        states = states_of(chosen, base)
        placed, at = e.placement.place_rows((q, states))
        with small_ladder():
            branches, decoding = e.open_states(
                PARAMS, placed, caches, at, seed_key=SEED_KEY, step=STEP, rollouts=1
            )
        limit = np.ceil(np.asarray(branches.limit) * rng.random((N, J)) ** unequal).astype(np.int32)
        branches = dataclasses.replace(branches, limit=jax.device_put(limit, branches.limit.sharding))
        running, slot, origin = limit > 0, 0, None
        shape = before = (N * J, 9)
        decoding = dataclasses.replace(decoding, running=jax.device_put(running, decoding.running.sharding))
        sits = any_seats(rng, np.ones((1, N, J), bool), N * J)
        while running.any() and slot < min(shape[1], MAX_NEW):
            until = int(rng.integers(slot, min(shape[1], MAX_NEW))) + 1
            leg = e.place(Leg(sits, origin, until, 0, before, shape[1]))
            decoding, ended = e.advance(PARAMS, branches, decoding, leg, sampling=FILTERED)
            running, slot = jax.device_get(ended)
            possible = [after for after in MOVES[shape] if after[0] >= running.sum() and after[1] > slot]
            origin, before = None, shape
            if possible and running.any():
                old, shape = sits, possible[rng.integers(len(possible))]
                sits = any_seats(rng, running, shape[0])
                origin = np.take_along_axis(old.row, sits.branch, axis=1)
                shapes.add((before, shape))
        starts = starts_of_states(q, base, states, 1, 2)
        starts = {place: start._replace(limit=int(limit[place])) for place, start in starts.items()}
        if running.any():  # the cache was full, and no move possible: up to there it has to be right
            starts = {place: start._replace(limit=min(start.limit, slot)) for place, start in starts.items()}
        check(jax.device_get(decoding.rollouts), starts, FILTERED, MANY_ENDS)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # as the engine does
        holds()
    assert len(shapes) >= 5  # of the six that there are


# --- where things are


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_kept_trajectories_are_laid_out_in_the_part_of_their_query(parts, per_part, count, seed):
    rng = np.random.default_rng(seed)
    kept = rng.random((parts * per_part, count)) < rng.random()
    e = Engine(GRAPH, placement(parts, 1, 1, SAMPLING_TABLE), MAX_NEW, ENDS)
    query, trajectory, real = e.arrange(kept)
    assert sorted(zip(query[real], trajectory[real], strict=True)) == sorted(map(tuple, np.argwhere(kept)))
    n, left = divmod(len(query), parts)
    assert left == 0 and n & (n - 1) == 0  # few sizes
    assert n // 2 < max(kept.reshape(parts, -1).sum(axis=1).max(), 1) <= n
    # Padding too: whatever is computed there reads a cache that is there.
    assert (query // per_part == np.repeat(np.arange(parts), n)).all()
    assert ((trajectory >= 0) & (trajectory < count)).all()


def order_in_memory(kind):
    """The axes of an array type, such as f32[3,1,8]{2,1,0}, from the inside out, without those of size 1."""
    sizes, layout = (
        [int(n) for n in found.split(",")] for found in re.search(r"\[([\d,]+)\]\{([\d,]+)", kind).groups()
    )
    return [axis for axis in layout if sizes[axis] > 1]


@pytest.mark.parametrize(("rows", "slots"), [(12, 24), (8, 36)], ids=["goes_on", "moves"])
def test_the_branch_cache_is_updated_in_place(rows, slots):
    """In the compiled program: stored into where it lies, also when it is divided anew."""
    e, size = engine(), TINY.num_hidden_layers * TINY.num_key_value_heads * 12 * 24 * TINY.head_dim
    q = e.placement.place_rows(queries())
    branches, decoding = e.open_queries(PARAMS, q, rollout.root_branches(q, R), SEED_KEY, STEP)
    assert decoding.own.key.shape[3] == 12 * 24
    running = np.arange(12).reshape(1, B, R) < rows
    origin = np.zeros((1, rows), np.int32) if rows < 12 else None
    leg = e.place(Leg(seats.take_seats(running, rows), origin, 24, 0, (12, 24), slots))
    lowered = Engine.advance.lower(e, PARAMS, branches, decoding, leg, sampling=POLICY)
    program = Program(lowered.compile().as_text())
    assert not {move.split()[0] for move in program.moves(size)} - {"copy"}
    stores, copies, repeated = 0, [], in_loops(program)
    for name, instructions in program.computations.items():
        for instruction in instructions.values():
            if any(array.elements == size for array in instruction.arrays):
                stores += instruction.operation == "dynamic-update-slice" and name in repeated
                if instruction.operation == "copy":
                    copies.append((name, instruction.type, instructions[instruction.operands[0]].type))
    assert stores == (2 if rows == 12 else 4)  # keys and values; of a token, and of what moves
    for name, ours, theirs in copies:
        # For CPU, XLA copies what it is given, and what it returns, since it wants the axis of one part
        # elsewhere, which changes nothing: not for a token, nor for a layer.
        assert name not in repeated
        assert order_in_memory(ours) == order_in_memory(theirs)
    assert len(copies) <= 4


def in_loops(program):
    """The computations that loops of a program run."""
    found = []
    for instructions in program.computations.values():
        for instruction in instructions.values():
            if instruction.operation == "while":
                found += re.findall(r"(?:body|condition)=%([\w.\-]+)", instruction.line)
    for name in found:
        for instruction in program.computations[name].values():
            found += [called for called in instruction.called if called not in found]
    return set(found)
