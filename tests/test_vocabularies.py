"""What is drawn, its log-probability and the entropy, at the vocabularies of real models and the numbers of
rows that real programs have, against float64.

The model is one whose attention and MLP add nothing, so that the distribution behind a token is that of its
own embedding and is known without a forward pass.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, placement

from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling, draw, draw_uniform, row_key
from fr3e_jax.models.decoder import abstract_params, graph_of
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.types import Queries, States

SEED_KEY, STEP, TOKENS = jax.random.key(3), 2, 3
VOCABULARIES = (16, 32_000, 49_152, 151_936, 152_064)  # 49,152: SmolLM2; the last two: Qwen2.5


def config_of(vocabulary):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}  # which divide by all meshes
    return dataclasses.replace(TINY, vocab_size=vocabulary, **sizes, **heads)


def embedding_of(vocabulary):
    """Float32 [V, E], so large that logits are spread by about 3."""
    return (0.75 * np.random.default_rng(vocabulary).normal(size=(vocabulary, 16))).astype(np.float32)


def params_of(vocabulary):
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(config_of(vocabulary)))
    params["embedding"] = embedding_of(vocabulary)
    params["norm"] = jax.tree.map(np.ones_like, params["norm"])
    return params


def exact(vocabulary, token):
    """Log-probabilities float64 [V] after a token."""
    table = embedding_of(vocabulary).astype(np.float64)
    hidden = table[token] / np.sqrt((table[token] ** 2).mean() + 1e-6)
    logits = table @ hidden
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def check_row(vocabulary, before, index, branch, position, token, logprob, entropy):
    """Every token of a branch that begins behind the token `before`, whose place is `position`."""
    key = row_key(SEED_KEY, STEP, index, branch)
    for i in range(len(token)):
        policy = exact(vocabulary, before)
        assert abs(logprob[i] - policy[token[i]]) < 1e-4
        assert abs(entropy[i] + (np.exp(policy) * policy).sum()) < 1e-4
        cdf = np.cumsum(np.exp(policy))
        uniform = float(draw_uniform(key, position + i))
        below = cdf[token[i] - 1] if token[i] else 0.0
        assert below - 3e-6 < uniform < cdf[token[i]] + 3e-6
        before = token[i]


def check(vocabulary, queries, rollouts, first_branch=0):
    """The answers to all queries; of many, 16 or some more."""
    answers = list(np.ndindex(rollouts.length.shape))
    assert (rollouts.length == TOKENS).all()
    for b, c in answers[:: max(1, len(answers) // 16)]:
        told = (rollouts.token[b, c], rollouts.logprob[b, c], rollouts.entropy[b, c])
        position = queries.length[b] - 1
        before = queries.token[b, position]
        check_row(vocabulary, before, queries.index[b], first_branch + c, position, *told)


def engine_on(vocabulary, mesh):
    """An engine, and its parameters in place. No token ends an answer."""
    place = placement(*mesh, table=SAMPLING_TABLE)
    return Engine(graph_of(config_of(vocabulary)), place, TOKENS, (vocabulary,)), params_of(vocabulary)


def queries_of(count, vocabulary):
    rng = np.random.default_rng(count)
    token = rng.integers(0, vocabulary, (count, 4)).astype(np.int32)
    return Queries(token, np.full(count, 3, np.int32), np.arange(5, 5 + count, dtype=np.int32))


ONE = (1, 1, 1)


def cases(eight):
    """(Vocabulary, rows, mesh); by default those that were wrong, or are nearest to them.

    Marked slow are the others: on one device each vocabulary with one row and with several, and on eight each
    with one row. Of the vocabulary of Qwen2.5 there are more numbers of rows.
    """
    quick = [(49_152, 1, ONE), (151_936, 1, ONE), (151_936, 7, ONE)]
    some = [(vocabulary, rows, ONE) for vocabulary in VOCABULARIES for rows in (1, 7)]
    some += [(151_936, 2, ONE), (151_936, 64, ONE), (151_936, 7, eight)]
    some += [(vocabulary, 1, eight) for vocabulary in VOCABULARIES]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in some if case not in quick)]


@pytest.mark.parametrize("vocabulary, rows, mesh", cases((1, 1, 8)))
def test_samples_of_one_query(vocabulary, rows, mesh):
    """As `generate` decodes: one query, so many answers."""
    engine, params = engine_on(vocabulary, mesh)
    queries = queries_of(1, vocabulary)
    placed = engine.placement.place_rows(queries)
    rollouts, _ = engine.sample(params, placed, SEED_KEY, STEP, rows, Sampling())
    check(vocabulary, queries, jax.device_get(rollouts))


@pytest.mark.parametrize("vocabulary, rows, mesh", cases((8, 1, 1)))
def test_answers_of_an_evaluation(vocabulary, rows, mesh):
    """One answer to each of so many queries in each part of the mesh."""
    engine, params = engine_on(vocabulary, mesh)
    queries = queries_of(rows * mesh[0], vocabulary)
    placed = engine.placement.place_rows(queries)
    rollouts, _ = engine.sample(params, placed, SEED_KEY, STEP, 1, Sampling())
    check(vocabulary, queries, jax.device_get(rollouts))


@pytest.mark.parametrize("mesh", [ONE, (2, 1, 4)], ids=["1", "8"])
@pytest.mark.parametrize(
    "vocabulary",
    [pytest.param(v, marks=() if v in (49_152, 151_936) else pytest.mark.slow) for v in VOCABULARIES],
)
def test_first_return_and_explore(vocabulary, mesh):
    """One base trajectory to each query, and one partial rollout from a state within it."""
    engine, params = engine_on(vocabulary, mesh)
    queries = queries_of(mesh[0], vocabulary)
    placed = engine.placement.place_rows(queries)
    base, _ = engine.sample(params, placed, SEED_KEY, STEP, 1, Sampling())
    base = jax.device_get(base)
    check(vocabulary, queries, base)
    query, trajectory, real = engine.arrange(np.ones((mesh[0], 1), bool))
    response, prefix = base.token[query, trajectory], np.full((len(query), 1), 2, np.int32)
    states = States(query, trajectory, response, prefix, real[:, None])
    placed_states = engine.placement.place_rows(states)
    how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": 1, "sampling": Sampling(), "after": 1}
    rollouts = jax.device_get(engine.explore(params, placed, placed_states, **how)[0])
    for n in np.flatnonzero(real):
        assert rollouts.length[n, 0] == 1
        position = queries.length[query[n]] - 1 + 2
        found = [x[n, 0, :1] for x in (rollouts.token, rollouts.logprob, rollouts.entropy)]
        check_row(vocabulary, response[n, 1], queries.index[query[n]], 1, position, *found)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 20, 0.9)], ids=["policy", "filtered"])
def test_no_windows_are_summed_by_the_library_for_cpus(sampling):
    """XLA's fusions for it (`ynn` in jaxlib 0.10) sum windows wrongly where there is one row."""
    shapes = jax.ShapeDtypeStruct((1, 151_936), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    rows = jax.jit(jax.vmap(lambda logits, uniform: draw(logits, uniform, sampling)))
    text = rows.lower(*shapes).compile().as_text()
    computations = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    to_library = re.findall(r"kind=kCustom, calls=%?([\w.-]+)", text)
    assert not [name for name in to_library if "reduce-window" in computations[name]]
