"""Attention of rows to pages and contexts against a softmax over concatenated keys, and moves of rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import examples, placement

from fr3e_jax.engine import seats as seats_module
from fr3e_jax.engine.page_moves import PageMoves
from fr3e_jax.engine.pages import PAGE_AXES, Pages, PageSizes, store_tokens
from fr3e_jax.engine.reading import Reach, attend_span
from fr3e_jax.engine.seats import RowBlock, seats_of
from fr3e_jax.models.attention import Segment
from fr3e_jax.models.decoder import cache_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE

LAYERS, KV_HEADS, WIDTH = 2, 2, 8
N, C, SHARED = 4, 3, 11  # trajectories of a part, branches of each, slots of what they share
SIZES = PageSizes(rows=3, slots=4, spans=(2,), context=4, fixed=1)
BLOCKS, SPAN, MOST, PAGES = 4, 2, 3, 14


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@functools.cache
def attend(mesh, context):
    """The program on a mesh; context: slots of what branches share that are attended to at a time."""
    place = placement(*mesh, table=SAMPLING_TABLE)
    sizes = dataclasses.replace(SIZES, context=context)
    return place, jax.jit(functools.partial(attend_span, place, sizes))


def expected(query, key, value, own_key, own_value):
    """Softmax attention of a row [H, D] to keys [S, K, D] and to itself, in float64."""
    key = np.concatenate([key, own_key[None]]).astype(np.float64)
    value = np.concatenate([value, own_value[None]]).astype(np.float64)
    out = np.zeros(query.shape)
    for head in range(len(query)):
        group = head // (len(query) // KV_HEADS)
        score = key[:, group] @ query[head] / np.sqrt(WIDTH)
        weight = np.exp(score - score.max())
        out[head] = (weight / weight.sum()) @ value[:, group]
    return out


def made(parts, seed, running, strip_rows):
    """Blocks with ragged rows, and everything that is attended to."""
    rng = np.random.default_rng(seed)
    blocks = []
    numbers = rng.permutation(PAGES)
    sits = np.full((parts, BLOCKS * SIZES.rows), -1, np.int32)
    for part in range(parts):
        some = rng.permutation(N * C)[: rng.integers(1, N * C + 1)]
        # Some trajectories have no row at all, so that strips are left out.
        some = some[~np.isin(some // C, rng.permutation(N)[: rng.integers(0, 3)])]
        inside = rng.permutation(running * SIZES.rows)[: len(some)]
        sits[part, inside] = some[: len(inside)]
    filled = int(rng.integers(0, SIZES.slots))
    for b in range(running):
        pages = numbers[MOST * b : MOST * b + rng.integers(1, MOST + 1)].tolist()
        end = (len(pages) - 1) * SIZES.slots + filled
        first = rng.integers(0, end + 1, (parts, SIZES.rows)).astype(np.int32)
        blocks.append(RowBlock(sits[:, b * SIZES.rows : (b + 1) * SIZES.rows], first, pages, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seats_module, "STRIP_ROWS", strip_rows)
        seats = seats_of(blocks, SPAN, BLOCKS, MOST, N, C, SIZES)
    pages = [normal(rng, LAYERS, PAGES, parts, KV_HEADS, SIZES.rows, SIZES.slots, WIDTH) for _ in range(2)]
    shared = [normal(rng, LAYERS, parts * N, KV_HEADS, SHARED, WIDTH) for _ in range(2)]
    length = rng.integers(0, SHARED + 1, (parts, N * C)).astype(np.int32)
    return rng, blocks, filled, seats, pages, shared, length


def reach_of(place, seats, filled, running, number, length):
    """What span `number` attends to, as a leg has it."""
    rows, blocks = (slice(number * SPAN * k, (number + 1) * SPAN * k) for k in (SIZES.rows, 1))
    count = seats.count[blocks]
    by_part = (
        seats.first[:, rows],
        seats.lane[:, rows],
        seats.place[:, number],
        seats.strip[:, number],
        seats.strips[:, number],
        length,
    )
    first, lane, row, strip, strips, length = place.place_rows(by_part)
    return Reach(
        table=seats.table[blocks],
        count=count,
        filled=(count - 1) * SIZES.slots + filled,
        running=np.int32(np.clip(running - number * SPAN, 0, SPAN)),
        first=first,
        lane=lane,
        row=row,
        strip=strip,
        strips=strips,
        length=length,
    )


def check(mesh, context, seed, running, strip_rows, heads=4):
    parts = mesh[0] * mesh[1]
    rng, blocks, filled, seats, pages, shared, length = made(parts, seed, running, strip_rows)
    place, program = attend(mesh, context)
    of_row = np.take_along_axis(length, seats.branch, axis=1)
    placed = Pages(*(place.place(x, *PAGE_AXES) for x in pages))
    nothing = np.zeros((parts * N, C), np.int32)
    segment = Segment(*(place.place(x, *cache_axes("batch")) for x in shared), place.place_rows(nothing))
    layer, checked = seed % LAYERS, 0
    for number in range(BLOCKS // SPAN):
        size = SPAN * SIZES.rows
        rows = slice(number * size, (number + 1) * size)
        query = normal(rng, parts, size, heads, WIDTH)
        key, value = (normal(rng, parts, size, KV_HEADS, WIDTH) for _ in range(2))
        reach = reach_of(place, seats, filled, running, number, of_row[:, rows])
        found = program(np.int32(layer), *place.place_rows((query, key, value)), placed, segment, reach)
        found = np.asarray(found)
        assert np.isfinite(found).all()  # of idle rows too
        for part, row in np.argwhere(seats.taken[:, rows]):
            block = blocks[number * SPAN + row // SIZES.rows]
            at, end = row % SIZES.rows, (len(block.pages) - 1) * SIZES.slots + filled
            branch = seats.branch[part, rows][row]
            own = [
                np.concatenate([x[layer, page, part, :, at] for page in block.pages], axis=1)[
                    :, block.first[part, at] : end
                ]
                for x in pages
            ]
            seen = [x[layer, part * N + branch // C, :, : length[part, branch]] for x in shared]
            keys, values = (
                np.concatenate(both, axis=1).swapaxes(0, 1) for both in zip(seen, own, strict=True)
            )
            wanted = expected(query[part, row], keys, values, key[part, row], value[part, row])
            np.testing.assert_allclose(found[part, row], wanted, atol=2e-5)
            checked += 1
    return checked


@examples(40)
@given(st.integers(0, 2**32 - 1), st.integers(1, BLOCKS), st.sampled_from([3, 6]), st.sampled_from([4, 64]))
def test_rows_attend_to_what_they_see_and_nothing_else(seed, running, strip_rows, context):
    """Whatever lies in front of a row's tokens, behind them and in other rows; contexts in tiles or whole."""
    assert (
        check((1, 1, 1), context, seed, running, strip_rows)
        == made(1, seed, running, strip_rows)[3].taken.sum()
    )


@pytest.mark.parametrize(
    ("mesh", "heads"),
    [((2, 2, 2), 4), ((1, 1, 4), 4), ((1, 1, 3), 6)],
    ids=["a key-value head on each", "of one on two", "of one on one and a half"],
)
def test_on_a_mesh_each_part_attends_to_its_own(mesh, heads):
    """Where devices are more than key-value heads, query heads of a device may belong to two of them."""
    assert sum(check(mesh, 4, seed, 3, 3, heads) for seed in range(6)) > 20


# --- what is stored and moved


def pages_on(place, rng):
    shape = (LAYERS, PAGES, 2, KV_HEADS, SIZES.rows, SIZES.slots, WIDTH)
    whole = [normal(rng, *shape) for _ in range(2)]
    return whole, Pages(*(place.place(x, *PAGE_AXES) for x in whole))


def test_new_tokens_are_stored_in_the_last_page_of_blocks_that_run():
    rng, place = np.random.default_rng(0), placement(2, 1, 2, table=SAMPLING_TABLE)
    whole, pages = pages_on(place, rng)
    new = [normal(rng, LAYERS, 2, 3 * SIZES.rows, KV_HEADS, WIDTH) for _ in range(2)]
    store = jax.jit(functools.partial(store_tokens, place))
    placed = [place.place(x, "layer", "batch", None, "kv_heads", None) for x in new]
    found = store(pages, *placed, np.array([5, 2, 9], np.int32), np.int32(2), np.int32(3))
    for ours, before, x in zip((found.key, found.value), whole, new, strict=True):
        by_block = x.reshape(LAYERS, 2, 3, SIZES.rows, KV_HEADS, WIDTH).swapaxes(3, 4)
        for block, page in enumerate((5, 2)):  # the third does not run
            before[:, page, :, :, :, 3] = by_block[:, :, block]
        np.testing.assert_array_equal(ours, before)


@examples(10)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_rows_are_copied_one_after_the_other_in_each_part(seed, count):
    """So that a row that was copied may be copied on; what is listed behind the last one is not copied."""
    rng, (place, moves) = np.random.default_rng(seed), on_two()
    whole, pages = pages_on(place, rng)
    copies = rng.integers(0, [PAGES, SIZES.rows] * 2, (2, 10, 4)).astype(np.int32)
    found = moves.copy(pages, place.place_rows(copies), place.place(np.int32(count)))
    for ours, before in zip((found.key, found.value), whole, strict=True):
        for part in range(2):
            for page, row, to_page, to_row in copies[part, :count]:
                before[:, to_page, part, :, to_row] = before[:, page, part, :, row]
        np.testing.assert_array_equal(ours, before)


@functools.cache
def on_two():
    place = placement(2, 1, 2, table=SAMPLING_TABLE)
    return place, PageMoves(place)


def test_a_page_comes_back_as_it_was_in_another_place():
    rng, (place, moves) = np.random.default_rng(0), on_two()
    whole, pages = pages_on(place, rng)
    kept = moves.take_page(pages, jnp.int32(4))
    found = moves.put_page(pages, kept, jnp.int32(9))
    for ours, before in zip((found.key, found.value), whole, strict=True):
        before[:, 9] = before[:, 4]
        np.testing.assert_array_equal(ours, before)
