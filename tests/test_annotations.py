"""Annotations of shapes and dtypes are checked while tests run (checked.py): a wrong one raises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError
from support import TINY, placement, tiny_params

from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.algorithm.loss import policy_loss
from fr3e_jax.config import LossConfig
from fr3e_jax.engine.pages import ON_CPU
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import GREEDY, Sampling, draw, row_key
from fr3e_jax.engine.seats import Leg, RowBlock, Seats, seats_of
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.attention import attend_sequence
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Batch, Bundle, Queries, pytree

REWARD, VALID = jnp.ones((3, 2, 4)), jnp.ones((3, 2), bool)
LOGPROB, MASK = jnp.ones((2, 5)), jnp.ones((2, 5), bool)
QUERY, KEY = jnp.ones((5, 4, 8)), jnp.ones((2, 5, 8))
NUMBERS = np.zeros(2, np.int32)
BLOCK = RowBlock(np.full((2, ON_CPU.rows), -1, np.int32), np.zeros((2, ON_CPU.rows), np.int32), [0], 1)
SEATS = seats_of([BLOCK], 1, 1, 1, 1, 4, ON_CPU)


def loss(advantage=LOGPROB, mask=MASK):
    return policy_loss(LOGPROB, LOGPROB, advantage, mask, 1.0, 0.2, 0.3)


def attend(key=KEY, real=MASK[0]):
    return attend_sequence(QUERY, key, key, real, None)


@pytest.mark.parametrize(
    "call",
    [
        lambda: modulated_advantage(REWARD, VALID),
        lambda: modulated_advantage(np.asarray(REWARD), np.asarray(VALID)),
        lambda: jax.jit(modulated_advantage)(REWARD, VALID),
        lambda: loss(advantage=LOGPROB[:, :1]),
        lambda: attend(),
        lambda: Queries(np.zeros((2, 7), np.int32), NUMBERS, NUMBERS),
        lambda: seats_of([BLOCK], 1, 1, 1, 1, 4, ON_CPU),
        lambda: draw(QUERY[0, 0], 0.5 * QUERY[0, 0, 0], GREEDY),
    ],
)
def test_what_is_annotated_is_accepted(call):
    call()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: modulated_advantage(REWARD, VALID.T), "valid"),
        (lambda: modulated_advantage(REWARD[0], VALID), "reward"),
        (lambda: modulated_advantage(REWARD.astype(int), VALID), "reward"),
        (lambda: modulated_advantage(REWARD, VALID.astype(float)), "valid"),
        (lambda: jax.jit(modulated_advantage)(REWARD, VALID.T), "valid"),
        (lambda: loss(advantage=jnp.ones((2, 4))), "advantage"),
        (lambda: loss(mask=MASK.astype(int)), "mask"),
        (lambda: attend(key=KEY[:, :4]), "key"),
        (lambda: attend(real=LOGPROB[0]), "real"),
        (lambda: Queries(np.zeros((3, 7), np.int32), NUMBERS, NUMBERS), "length"),
        (lambda: Queries(np.zeros((2, 7)), NUMBERS, NUMBERS), "token"),
        (lambda: seats_of([BLOCK], 1.0, 1, 1, 1, 4, ON_CPU), "span"),
        (lambda: draw(QUERY[0], QUERY[0, 0, 0], GREEDY), "logits"),
        (lambda: row_key(jax.random.PRNGKey(0), 0, 0, 0), "seed_key"),
        (lambda: Seats(**vars(SEATS) | {"taken": SEATS.branch}), "taken"),
    ],
)
def test_a_wrong_shape_or_dtype_raises(call, argument):
    with pytest.raises(TypeCheckError, match=f"parameter '{argument}'"):
        call()


def test_the_learner_checks_what_it_is_given():
    """Old log-probabilities in another precision, and rows without a bundle."""
    token, old = np.zeros((2, 5), np.int32), np.zeros((2, 5))
    with pytest.raises(TypeCheckError, match="parameter 'old_logprob'"):
        Batch(token, NUMBERS, NUMBERS, old, np.zeros(2, np.float32), NUMBERS, NUMBERS)
    batch = Batch(token, NUMBERS, NUMBERS, old.astype(np.float32), np.zeros(2, np.float32), NUMBERS, NUMBERS)
    learner = Learner(
        graph_of(TINY),
        placement(),
        optax.sgd(1.0),
        LossConfig(),
        compute_dtype=jnp.float32,
        logit_chunk=16,
        remat=False,
    )
    with pytest.raises(TypeCheckError, match="parameter 'bundles'"):
        learner.gradient(tiny_params(), [batch])
    with pytest.raises(TypeCheckError, match="parameter 'chunks'"):
        Bundle(None, (NUMBERS,), (0,))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda engine, queries: engine.arrange(np.ones((2, 3))), "kept"),
        (lambda engine, queries: engine.arrange(np.ones(3, bool)), "kept"),
        (
            lambda engine, queries: engine.sample(
                tiny_params(), queries, jax.random.PRNGKey(0), 0, 2, Sampling()
            ),
            "seed_key",
        ),
        (
            lambda engine, queries: engine.sample(
                tiny_params(), queries.token, jax.random.key(0), 0, 2, Sampling()
            ),
            "queries",
        ),
    ],
)
def test_the_engine_checks_what_it_is_given(call, argument):
    engine = Engine(graph_of(TINY), placement(table=SAMPLING_TABLE), 8, (3,))
    with pytest.raises(TypeCheckError, match=f"parameter '{argument}'"):
        call(engine, Queries(np.zeros((2, 7), np.int32), NUMBERS, NUMBERS))


def test_trees_of_other_things_than_arrays_are_not_checked():
    """As jax makes them: of axis numbers, None and shardings."""
    queries = Queries(np.zeros((2, 7), np.int32), NUMBERS, NUMBERS)
    assert jax.tree.map(lambda x: None, queries).token is None
    doubled = jax.vmap(lambda q: q.token * 2, in_axes=(jax.tree.map(lambda x: 0, queries),))(queries)
    assert doubled.shape == (2, 7)
    assert jax.eval_shape(lambda q: q, queries).length.shape == (2,)


def test_a_tree_has_the_names_of_its_fields_and_is_the_same_after_a_round_trip():
    @pytree
    class Pair:
        first: np.ndarray
        second: tuple

    pair = Pair(NUMBERS, (NUMBERS + 1, None))
    leaves, structure = jax.tree.flatten_with_path(pair)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".first", ".second[0]"]
    again = jax.tree.unflatten(structure, [leaf for _, leaf in leaves])
    assert type(again) is Pair and again.first is NUMBERS and again.second[1] is None
    assert jax.tree.structure(again) == structure


def test_static_fields_are_no_leaves_and_tell_programs_apart():
    legs = [Leg(SEATS, 1, 0, until, 7, span) for until, span in ((3, 1), (5, 1), (5, 2))]
    leaves, structure = jax.tree.flatten(legs[0])
    assert leaves[-4:] == [1, 0, 3, 7] and len(leaves) == len(jax.tree.leaves(SEATS)) + 4
    again = jax.tree.unflatten(structure, leaves)
    assert (again.span, again.until, again.rows) == (1, 3, ON_CPU.rows)
    assert [jax.tree.structure(leg) == structure for leg in legs] == [True, True, False]
