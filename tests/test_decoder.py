"""A decoder that the package has never seen, through first return, explore and update.

It is GPT-J's kind: attention and MLP of a layer in parallel behind one LayerNorm, a part of each head
rotated, biases in the MLP and of the LM head alone. All that the package asks of it is in models/decoder.py.
The reference knows no cache, no mesh and nothing of the package: whole sequences, all logits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoding import (
    MAX_NEW,
    MAX_PROMPT,
    POLICY,
    SEED_KEY,
    SIZE,
    STEP,
    check,
    starts_of_queries,
    starts_of_states,
)
from flax import nnx
from support import mesh_of, tiny_params

from fr3e_jax.config import LossConfig, OptimizerConfig
from fr3e_jax.cost import rollout_cost
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.learner.layout import bundles_of
from fr3e_jax.learner.state import init_state, make_optimizer
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.decoder import Decoder, abstract_params, graph_of, logical_axes, unsharded
from fr3e_jax.models.rope import rotate
from fr3e_jax.parallel.mesh import place_model
from fr3e_jax.types import Queries, StateGroups, States

MESHES = [(2, 1, 4), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 1, 1), (1, 2, 2)))]

# --- the decoder


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    vocab_size: int = 44
    width: int = 20
    inner: int = 36
    heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 6
    rotated: int = 4
    num_hidden_layers: int = 2
    context: int = 64
    known_ids: tuple = ((0, 41),)

    def build(self, rngs):
        return ParallelDecoder(self, rngs)

    def forward_flops(self, tokens, pairs, logits):
        both = 2 * (self.heads + self.num_key_value_heads) * self.head_dim  # query and output, key and value
        layer = self.width * (both + 2 * self.inner) * tokens + 2 * self.heads * self.head_dim * pairs
        return 2.0 * (self.num_hidden_layers * layer + self.vocab_size * self.width * logits)


class LayerNorm(nnx.Module):
    def __init__(self, shape, axes):
        self.scale = nnx.Param(jnp.ones(shape), axes=axes)
        self.shift = nnx.Param(jnp.zeros(shape), axes=axes)

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
        scale, shift = (jnp.broadcast_to(p[...], x.shape) for p in (self.scale, self.shift))
        return normed.astype(x.dtype) * scale + shift


class ParallelLayer(nnx.Module):
    def __init__(self, c, rngs):
        def param(*sizes):
            axes, shape = zip(*sizes, strict=True)
            value = 0.1 * jax.random.normal(rngs.params(), (c.num_hidden_layers, *shape))
            return nnx.Param(value, axes=("layer", *axes))

        self.config = c
        embed, mlp, each = ("embed", c.width), ("mlp", c.inner), ("head_dim", c.head_dim)
        heads, kv_heads = ("heads", c.heads), ("kv_heads", c.num_key_value_heads)
        self.norm = LayerNorm((c.num_hidden_layers, c.width), ("layer", "norm"))
        self.q, self.o = param(embed, heads, each), param(heads, each, embed)
        self.k, self.v = param(embed, kv_heads, each), param(embed, kv_heads, each)
        self.up, self.up_bias = param(embed, mlp), param(mlp)
        self.down, self.down_bias = param(mlp, embed), param(("norm", c.width))

    def project(self, x, position, shard):
        normed, size = self.norm(x), self.config.rotated
        query, key, value = (jnp.einsum("te,ehd->thd", normed, p[...]) for p in (self.q, self.k, self.v))

        def turn(y):
            turned = rotate(y[..., :size], position, 10_000.0)
            return jnp.concatenate([turned, y[..., size:]], axis=-1)

        query = shard(query, "length", "heads", "head_dim")
        key = shard(key, "length", "kv_heads", "head_dim")
        return turn(query), turn(key), shard(value, "length", "kv_heads", "head_dim")

    def finish(self, x, attended, shard):
        inner = jax.nn.gelu(self.norm(x) @ self.up[...] + self.up_bias[...][None])
        inner = shard(inner, "length", "mlp")
        x = x + jnp.einsum("thd,hde->te", attended, self.o[...])
        return shard(x + inner @ self.down[...] + self.down_bias[...][None], "length", "activation")


class ParallelDecoder(Decoder):
    def __init__(self, config, rngs):
        def table():
            value = 0.1 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
            return nnx.Param(value, axes=("vocab", "embed"))

        self.config = config
        self.words, self.head = table(), table()
        self.head_bias = nnx.Param(jnp.zeros(config.vocab_size), axes=("vocab",))
        self.layers = ParallelLayer(config, rngs)
        self.norm = LayerNorm((config.width,), ("norm",))

    def embed(self, token, shard):
        return shard(shard(self.words[...], "vocab", None)[token], "length", "activation")

    def logits(self, hidden, shard=unsharded):
        head = shard(self.head[...], "vocab", None)
        logits = jnp.einsum("te,ve->tv", hidden, head, preferred_element_type=jnp.float32)
        return shard(self.known(logits + self.head_bias[...][None]), "length", "vocab")


CONFIG = ParallelConfig()
KNOWN = CONFIG.known_ids[0][1]
GRAPH, AXES, PARAMS = graph_of(CONFIG), logical_axes(CONFIG), tiny_params(CONFIG, scale=2.0)
MATRICES = {"words", "head", "q", "k", "v", "o", "up", "down"}

# --- the reference


def normed(x, p):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / deviation * p["scale"][None] + p["shift"][None]


def turned(x):
    """The first `rotated` dimensions of heads [T, D] as complex numbers, turned by their position."""
    half = CONFIG.rotated // 2
    angle = jnp.arange(x.shape[0])[:, None] * (10_000.0 ** -(jnp.arange(half) / half))[None]
    z = (x[:, :half] + 1j * x[:, half : 2 * half]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag, x[:, 2 * half :]], axis=1)


def reference(params, token):
    """Logits [T, known ids] after each of the tokens [T] of a sequence."""
    causal = jnp.tri(token.shape[0], dtype=bool)
    x = params["words"][token]
    for i in range(CONFIG.num_hidden_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        y = normed(x, p["norm"])
        inner = jax.nn.gelu(y @ p["up"] + p["up_bias"][None])
        x = x + inner @ p["down"] + p["down_bias"][None]
        for h in range(CONFIG.heads):
            shared = h // (CONFIG.heads // CONFIG.num_key_value_heads)
            query, key = turned(y @ p["q"][:, h]), turned(y @ p["k"][:, shared])
            score = jnp.where(causal, query @ key.T / CONFIG.head_dim**0.5, -jnp.inf)
            x = x + jax.nn.softmax(score) @ (y @ p["v"][:, shared]) @ p["o"][h]
    return (normed(x, params["norm"]) @ params["head"].T + params["head_bias"][None])[:, :KNOWN]


@jax.jit
def last_logits(params, token, length):
    """Logits [rows, known ids] after the last of `length` tokens of each row."""
    return jax.vmap(lambda token, length: reference(params, token)[length - 1])(token, length)


@jax.jit
def plain_loss(params, token, start, length, old, advantage):
    """Clip-higher over whole rows [rows, T], and its gradient; `start` is a row's first trained token."""

    def loss(params):
        policy = jax.nn.log_softmax(jax.vmap(reference, (None, 0))(params, token)[:, :-1])
        drawn = jnp.take_along_axis(policy, token[:, 1:, None], axis=2)[..., 0]
        index, a = jnp.arange(1, token.shape[1])[None], advantage[:, None]
        trained = (index >= start[:, None]) & (index < length[:, None])
        ratio = jnp.exp(drawn - old[:, 1:])
        term = -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - 0.22, 1 + 0.28) * a)
        return jnp.where(trained, term, 0.0).sum() / trained.sum()

    return jax.value_and_grad(loss)(params)


# --- the package's stages

R, M, ENDS = 3, 2, (3, 11, 20, 33)
KEPT = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
QUERIES = Queries(
    np.random.default_rng(0).integers(0, KNOWN, (4, MAX_PROMPT)).astype(np.int32),
    np.array([5, 8, 1, 3], np.int32),
    np.array([40, 41, 42, 43], np.int32),
)


@functools.cache
def rollouts(mesh):
    """A round on a mesh, on the host: (base rollouts, rows decoded for them, states, partial rollouts)."""
    _, sampling = place_model(mesh_of(*mesh), AXES, abstract_params(CONFIG))
    engine = Engine(GRAPH, sampling, MAX_NEW, ENDS)
    params = jax.device_put(PARAMS, sampling.shardings(AXES, PARAMS))
    queries = sampling.place_rows(QUERIES)
    base, row_steps = engine.sample(params, queries, SEED_KEY, STEP, R, POLICY)
    base = jax.device_get(base)
    query, trajectory, real = engine.arrange(KEPT)
    length = base.length[query, trajectory]
    prefix_length = np.stack([0 * length, length // 2, length - 1], axis=1)  # the root, a middle, the end
    states = States(
        query=query,
        base=trajectory,
        response=base.token[query, trajectory],
        prefix_length=prefix_length,
        valid=real[:, None] & (np.diff(prefix_length, axis=1, prepend=-1) > 0),
    )
    how = {"seed_key": SEED_KEY, "step": STEP, "rollouts": M, "sampling": POLICY, "after": R}
    partial, _ = engine.explore(params, queries, sampling.place_rows(states), **how)
    return base, int(row_steps), states, jax.device_get(partial)


@functools.cache
def groups():
    """The states of the round on one device, with advantages; log-probabilities of another policy nearby."""
    _, _, states, partial = rollouts((1, 1, 1))
    rng, place = np.random.default_rng(1), np.argwhere(states.valid)
    n, j = place.T
    query, branch = states.query[n], (j * M)[:, None] + np.arange(M)
    logprob = partial.logprob[n[:, None], branch]
    return StateGroups(
        query=QUERIES.token[query],
        query_length=QUERIES.length[query],
        prefix=states.response[n],
        prefix_length=states.prefix_length[n, j],
        token=partial.token[n[:, None], branch],
        logprob=logprob + 0.3 * rng.standard_normal(logprob.shape).astype(np.float32),
        length=partial.length[n[:, None], branch],
        advantage=rng.standard_normal(branch.shape).astype(np.float32),
        source=np.stack([QUERIES.index[query], states.base[n], j], axis=1).astype(np.int32),
    )


@functools.cache
def expected():
    """(Loss, gradient) of `groups`, by the reference."""
    found, rows = groups(), []
    for g, m in np.ndindex(*found.length.shape):
        before = [*found.query[g, : found.query_length[g]], *found.prefix[g, : found.prefix_length[g]]]
        start, end = len(before), len(before) + found.length[g, m]
        token, old = np.zeros(SIZE, np.int32), np.zeros(SIZE, np.float32)
        token[:start], token[start:end] = before, found.token[g, m, : end - start]
        old[start:end] = found.logprob[g, m, : end - start]
        rows.append((token, start, end, old, found.advantage[g, m]))
    return jax.device_get(plain_loss(PARAMS, *map(np.array, zip(*rows, strict=True))))


def learner_on(mesh, settings=None):
    training, _ = place_model(mesh_of(*mesh), AXES, abstract_params(CONFIG))
    optimizer = optax.sgd(1.0) if settings is None else make_optimizer(settings, AXES)
    loss = LossConfig(clip_low=0.22, clip_high=0.28)
    own = Learner(GRAPH, training, optimizer, loss, compute_dtype=jnp.float32, logit_chunk=8, remat=True)
    return own, bundles_of(groups(), mesh[0] * mesh[1], budget=64)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_first_return_and_explore_draw_what_whole_forward_passes_do(mesh):
    base, _, states, partial = rollouts(mesh)
    forward = functools.partial(last_logits, PARAMS)
    check(base, starts_of_queries(QUERIES, R), POLICY, ENDS, forward)
    starts = starts_of_states(QUERIES, base, states, M, R)
    assert len(starts) == M * states.valid.sum() >= 2 * M * KEPT.sum()  # two states of each, or three
    check(partial, starts, POLICY, ENDS, forward)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loss_and_gradient_are_those_of_whole_rows(mesh):
    own, bundles = learner_on(mesh)
    params = jax.device_put(PARAMS, own.placement.shardings(AXES, PARAMS))
    ours, metrics = jax.device_get(own.gradient(params, bundles))
    loss, slope = expected()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["clip_low"] > 0.01 and metrics["clip_high"] > 0.01
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(slope), strict=True):
        assert np.abs(b).max() > 1e-4, path
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.abs(b).max(), err_msg=str(path))


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
def test_an_update_is_a_step_of_adamw_that_decays_matrices_alone(mesh):
    rate, decay, eps, most = 0.1, 0.3, 1e-2, 0.5
    settings = OptimizerConfig(
        learning_rate=rate, warmup_updates=0, weight_decay=decay, eps=eps, max_grad_norm=most
    )
    own, bundles = learner_on(mesh, settings)
    state, _ = own.update(init_state(own.placement, own.optimizer, AXES, PARAMS), bundles)
    _, slope = expected()
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(slope)))
    assert norm > most

    def stepped(path, before, g):
        """The first step: both moments, their bias corrected, are those of the gradient itself."""
        g = g * most / norm
        return before - rate * (g / (np.abs(g) + eps) + decay * before * (path[-1].key in MATRICES))

    wanted = jax.tree_util.tree_map_with_path(stepped, PARAMS, slope)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, wanted)


def test_a_step_is_said_to_cost_what_the_decoders_own_matrices_do():
    base, row_steps, _, _ = rollouts((1, 1, 1))
    layers, sizes = AXES["layers"], abstract_params(CONFIG)["layers"]
    weights = sum(sizes[name].size for name in layers if name in MATRICES)  # of all layers
    drawn, prompt = base.length, QUERIES.length
    tokens = prompt.sum() + drawn.sum()
    # The first draw runs the query's last token again.
    pairs = sum(i + 1 for n in prompt for i in range(n))
    pairs += sum(prompt[n] + i for n, r in np.ndindex(drawn.shape) for i in range(drawn[n, r]))
    scores = 2 * CONFIG.num_hidden_layers * CONFIG.heads * CONFIG.head_dim * pairs
    head = CONFIG.vocab_size * CONFIG.width * drawn.sum()
    told = rollout_cost(CONFIG, QUERIES, base, row_steps)
    assert told["flops"] == 2 * (weights * tokens + scores + head)


@pytest.mark.parametrize("axes", [{}, {"axes": ("embed",)}], ids=["none", "too few"])
def test_a_parameter_whose_axes_have_no_names_is_refused_by_its_own(axes):
    class Unnamed(ParallelConfig):
        def build(self, rngs):
            decoder = super().build(rngs)
            decoder.layers.norm.scale = nnx.Param(jnp.ones((2, 20)), **axes)
            return decoder

    with pytest.raises(ValueError, match=r"^layers\.norm\.scale has 2 axes"):
        logical_axes(Unnamed())
