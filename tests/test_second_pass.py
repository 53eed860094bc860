"""What sampling does not record, measured in one pass on the KV caches, against transformers and by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import GRAPH, PARAMS, POLICY, SEED_KEY, SIZE, STEP, B, R, engine, queries
from flax import nnx
from support import TINY, placed, write

from fr3e_jax.cost import second_pass_flops
from fr3e_jax.engine import second_pass as pass_of
from fr3e_jax.engine.second_pass import by_distance, second_pass, second_pass_bytes
from fr3e_jax.types import States

NEEDS = ("gradient", "attention")
BLOCK = 7  # tokens, which divide no answer
KEPT = np.ones((B, R), bool)
KEPT[1] = False


@functools.cache
def measured(*mesh):
    """(Kept rows, their lengths and measures) on the host, and the program."""
    e = engine(*mesh)
    params = placed(PARAMS, TINY, mesh) if mesh else PARAMS
    q = e.placement.place_rows(queries())
    base, _ = e.sample(params, q, SEED_KEY, STEP, R, POLICY)
    base = jax.device_get(base)
    query, trajectory, real = e.arrange(KEPT)
    length = np.where(real, base.length[query, trajectory], 0).astype(np.int32)
    nothing = np.zeros((len(query), 1), np.int32)
    states = States(query, trajectory, base.token[query, trajectory], nothing, nothing > 0)
    rows = e.placement.place_rows((states, length))
    caches = e.prefill_trajectories(params, q, rows[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_of, "block_size", lambda rows, width: BLOCK)
        traced = second_pass.trace(e, NEEDS, params, q, caches, *rows)
    found = jax.device_get(traced.lower().compile()(params, q, caches, *rows))
    return states, length, found, traced.jaxpr


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The model of `decoding` in transformers, whose attention tells its weights."""
    torch = pytest.importorskip("torch", reason="torch is the reference; pip install -e '.[parity]'")
    from transformers import AutoModelForCausalLM

    directory = write(tmp_path_factory.mktemp("tiny"), TINY, PARAMS)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").double().eval()

    def measure(query, response):
        """(norms of the gradient, attention between tokens of the response [later, earlier])."""
        token = torch.tensor([[*query, *response[:-1]]])
        outputs = model.model(token, output_attentions=True)
        hidden = outputs.last_hidden_state[0, len(query) - 1 :].detach().requires_grad_()
        logprob = torch.log_softmax(model.lm_head(hidden), dim=-1)
        logprob[torch.arange(len(response)), torch.tensor(response)].sum().backward()
        weight = torch.stack(outputs.attentions)[:, 0].mean(dim=(0, 1)).detach().numpy()
        return hidden.grad.norm(dim=1).numpy(), np.tril(weight[len(query) :, len(query) :], -1)

    return measure


MESHES = [(), pytest.param((2, 1, 2), id="mesh"), pytest.param((1, 2, 4), marks=pytest.mark.slow, id="wide")]


@pytest.mark.parametrize("mesh", MESHES)
def test_measures_are_those_of_transformers(mesh, reference):
    """On a mesh too, whose tensor axis splits query heads, key-value heads and vocabulary."""
    states, length, found, _ = measured(*mesh)
    q, seen = queries(), 0
    for n in np.flatnonzero(length):
        size, response = int(length[n]), states.response[n, : length[n]].tolist()
        norm, weight = reference(q.token[states.query[n], : q.length[states.query[n]]].tolist(), response)
        np.testing.assert_allclose(found.gradient[n, :size], norm, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(found.attention[n, : size - 1], weight.sum(axis=0), atol=1e-5)
        at = [np.trace(weight, -d) for d in range(size - 1)]
        np.testing.assert_allclose(found.attention_at[n, 1 : size - 1], at[1:], atol=1e-5)
        for x in jax.tree.leaves(found):
            assert not x[n, size:].any()
        assert found.attention[n, size - 1 :].sum() == 0  # the last token is never run
        seen += size
    assert seen > 60 and not found.gradient[length == 0].any()


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_are_those_of_a_whole_forward_pass(mesh):
    """Of the log-probability of each token, by the hidden state that it is drawn from."""
    states, length, found, _ = measured(*mesh)
    q, model = queries(), nnx.merge(GRAPH, PARAMS)

    @jax.jit
    def norms(token, size, target):
        """Of every slot of a row [SIZE]; target: what follows."""
        hidden, _ = model(token, jnp.arange(SIZE), size)

        def logprob(hidden, target):
            return jax.nn.log_softmax(model.logits(hidden[None])[0])[target]

        return jnp.linalg.norm(jax.vmap(jax.grad(logprob))(hidden, target), axis=1)

    for n in np.flatnonzero(length):
        asked, size = int(q.length[states.query[n]]), int(length[n])
        token = np.zeros(SIZE + 1, np.int32)
        token[:asked] = q.token[states.query[n], :asked]
        token[asked : asked + size] = states.response[n, :size]
        whole = norms(token[:-1], np.int32(asked + size), token[1:])[asked - 1 : asked - 1 + size]
        np.testing.assert_allclose(found.gradient[n, :size], whole, rtol=2e-4, atol=1e-5)


def test_logits_and_scores_are_those_of_one_block_at_a_time():
    states, *_, program = measured()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[(\d+(?:,\d+)*)\]", str(program))}
    logits = [s for s in shapes if TINY.vocab_size in s and TINY.hidden_size not in s]
    assert logits and max(map(np.prod, logits)) <= states.query.size * BLOCK * TINY.vocab_size
    scores = [s for s in shapes if s[-2:] == (BLOCK, 24)]
    assert max(map(np.prod, scores)) <= states.query.size * TINY.num_attention_heads * BLOCK * 24
    assert not [s for s in shapes if s[-2:] == (24, 24)]


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_by_distance_is_the_sum_of_diagonals(tokens):
    paid = np.arange(1.0, tokens * 8 + 1).reshape(tokens, 8).astype(np.float32)
    for first in range(8):
        expected = np.zeros(8)
        for row, column in np.ndindex(tokens, 8):
            if 0 <= (distance := first + row - column) < 8:
                expected[distance] += paid[row, column]
        found = jax.jit(by_distance)(jnp.asarray(paid), jnp.int32(first))
        np.testing.assert_allclose(found, expected)


def test_flops_are_those_of_the_kept_trajectories_tokens():
    """By hand: a query of 3 tokens and a response of 2, whose tokens attend to 3 and 4."""
    kept = np.array([[False, True], [False, False]])
    lengths = np.array([3, 9]), np.array([[7, 2], [7, 7]])
    layers = TINY.forward_flops(2, 3 + 4, 0)
    assert second_pass_flops(TINY, ("attention",), *lengths, kept) == layers
    head = 2 * TINY.vocab_size * TINY.hidden_size * 2
    assert second_pass_flops(TINY, ("attention", "gradient"), *lengths, kept) == layers + 2 * head
    assert second_pass_flops(TINY, ("sentence",), *lengths, kept) == 0


def test_memory_is_bounded_by_the_block_whatever_the_answers_are():
    sizes = {"rows": 8, "prompt": 64, "heads": TINY.num_attention_heads}
    short, long = (
        second_pass_bytes(TINY, ("gradient",), response=response, **sizes) for response in (1024, 4096)
    )
    assert long < 4.1 * short  # scores grow with what is attended to, and not with its square
    assert second_pass_bytes(TINY, ("sentence",), response=4096, **sizes) == 0
