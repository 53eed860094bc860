"""The Qwen2 decoder (Qwen2.5 checkpoints), in Flax NNX.

Two flags make the same decoder its nearest kin: `qk_norm` without `qkv_bias` is dense Qwen3, neither is
Llama.

Layers are stacked on a leading axis and scanned. What belongs to single tokens takes the tokens of any number
of sequences on one axis; only attention knows which sequence a token is of. NNX holds the parameters; callers
`nnx.split` once and `nnx.merge` inside plain jitted functions.

Axis letters: B sequences, T tokens, V vocabulary, E hidden, F intermediate, H heads, K key-value heads,
D per head, L layers, S slots of a segment.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array

from fr3e_jax.models.attention import Attend, Prefix, Segment, attend_sequence
from fr3e_jax.models.rope import Yarn, rotate

Shard = Callable[..., Array]
"""`shard(x, *logical_axes) -> x` with a sharding constraint; the caller owns the mesh and the table."""


Params = dict[str, Any]
"""The model's parameters: nested dicts of arrays, the layers stacked."""


def unsharded(x: Array, *_: str | None) -> Array:
    """The `Shard` of a program without a mesh."""
    return x


def sharded_as_batch(shard: Shard) -> Shard:
    """`shard` where the axis of tokens holds those of a batch of sequences, one after the other."""
    return lambda x, *axes: shard(x, *("batch" if axis == "length" else axis for axis in axes))


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up; of what leads to it, a gradient holds these two and computes the rest again."""
    return jax.nn.silu(gate) * up


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """The architecture; names and meaning of Hugging Face's config.json.

    qkv_bias: query, key and value have biases (Qwen2). qk_norm: query and key are normalised, head by
    head, before they are rotated (Qwen3). yarn: scaling of the context, or None. known_ids: ranges [first,
    end) of the ids that the tokenizer has, where the vocabulary has more; the others have no probability.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool = True
    qk_norm: bool = False
    yarn: Yarn | None = None
    known_ids: tuple[tuple[int, int], ...] = ()

    @property
    def context(self) -> int:
        """The longest sequence, tokens; YaRN extends what the model was trained with."""
        if self.yarn is None:
            return self.max_position_embeddings
        extended = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, extended)


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float) -> nnx.Param:
    """A normally distributed float32 parameter that knows the logical names of its axes."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[..., E] -> [..., E], dtype of x."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)


class Block(nnx.Module):
    """One decoder layer; built stacked ([L, ...] leaves), merged and called one layer at a time."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs, init_scale: float = 0.02) -> None:
        c = config
        layers, hidden = c.num_hidden_layers, c.hidden_size
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        out_scale = init_scale / (2 * layers) ** 0.5

        def stacked(shape: tuple[int, ...], axes: tuple[str, ...], scale: float = init_scale) -> nnx.Param:
            return weight(rngs, (layers, *shape), ("layer", *axes), scale)

        def norm(size: int) -> RMSNorm:
            return RMSNorm((layers, size), ("layer", "norm"), c.rms_norm_eps)

        self.config = c
        self.attention_norm = norm(hidden)
        self.mlp_norm = norm(hidden)
        self.q = stacked((hidden, heads, head_dim), ("embed", "heads", "head_dim"))
        self.k = stacked((hidden, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.v = stacked((hidden, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        if c.qkv_bias:
            self.q_bias = stacked((heads, head_dim), ("heads", "head_dim"), 0.0)
            self.k_bias = stacked((kv_heads, head_dim), ("kv_heads", "head_dim"), 0.0)
            self.v_bias = stacked((kv_heads, head_dim), ("kv_heads", "head_dim"), 0.0)
        if c.qk_norm:
            self.q_norm = norm(head_dim)
            self.k_norm = norm(head_dim)
        self.o = stacked((heads, head_dim, hidden), ("heads", "head_dim", "embed"), out_scale)
        self.gate = stacked((hidden, c.intermediate_size), ("embed", "mlp"))
        self.up = stacked((hidden, c.intermediate_size), ("embed", "mlp"))
        self.down = stacked((c.intermediate_size, hidden), ("mlp", "embed"), out_scale)

    def project(self, x: Array, position: Array, shard: Shard) -> tuple[Array, Array, Array]:
        """Residual stream [T, E] -> rotated query [T, H, D], rotated key and value [T, K, D]."""
        normed = self.attention_norm(x)
        query = jnp.einsum("te,ehd->thd", normed, self.q[...])
        key = jnp.einsum("te,ekd->tkd", normed, self.k[...])
        value = jnp.einsum("te,ekd->tkd", normed, self.v[...])
        if self.config.qkv_bias:
            biases = (self.q_bias[...], self.k_bias[...], self.v_bias[...])
            query, key, value = (x + b[None] for x, b in zip((query, key, value), biases, strict=True))
        query = shard(query, "length", "heads", "head_dim")
        key = shard(key, "length", "kv_heads", "head_dim")
        value = shard(value, "length", "kv_heads", "head_dim")
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        turn = functools.partial(
            rotate, position=position, theta=self.config.rope_theta, yarn=self.config.yarn
        )
        return turn(query), turn(key), value

    def finish(self, x: Array, attended: Array, shard: Shard) -> Array:
        """Add attention's output [T, H, D] and the gated MLP to the residual stream [T, E]."""
        x = x + jnp.einsum("thd,hde->te", attended, self.o[...])
        x = shard(x, "length", "activation")
        normed = self.mlp_norm(x)
        inner = gated(normed @ self.gate[...], normed @ self.up[...])
        inner = shard(inner, "length", "mlp")
        return shard(x + inner @ self.down[...], "length", "activation")


class Qwen2(nnx.Module):
    """Decoder with a (possibly tied) LM head. Parameters are created in float32."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs) -> None:
        self.config = config
        table = (config.vocab_size, config.hidden_size)
        self.embedding = weight(rngs, table, ("vocab", "embed"), 0.02)
        self.layers = Block(config, rngs)
        self.norm = RMSNorm((config.hidden_size,), ("norm",), config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = weight(rngs, table, ("vocab", "embed"), 0.02)

    def embed(self, token: Array, shard: Shard) -> Array:
        """int32 [T] -> [T, E]."""
        # Said of the table too: gathered over fsdp, as every other weight is, and split over the vocabulary
        # also as a gradient, which every device would otherwise hold whole.
        table = shard(self.embedding[...], "vocab", None)
        return shard(table[token], "length", "activation")

    def logits(self, hidden: Array, shard: Shard = unsharded) -> Array:
        """Final hidden states [T, E] -> float32 [T, V], the vocabulary sharded; -inf of unknown ids."""
        table = self.embedding if self.config.tie_word_embeddings else self.lm_head
        # As in `embed`: gathered over fsdp, or XLA may add up logits over it.
        words = shard(table[...], "vocab", None)
        logits = jnp.einsum("te,ve->tv", hidden, words, preferred_element_type=jnp.float32)
        return shard(self.known(logits), "length", "vocab")

    def known(self, logits: Array) -> Array:
        """Logits float32 [T, V] with -inf where the tokenizer has no such id."""
        if not self.config.known_ids:
            return logits
        word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        within = ((word >= first) & (word < end) for first, end in self.config.known_ids)
        return jnp.where(functools.reduce(jnp.logical_or, within), logits, -jnp.inf)

    def __call__(
        self,
        token: Array,
        position: Array,
        length: Array,
        shard: Shard = unsharded,
        remat: bool = False,
        start: Array | int = 0,
        prefix: Prefix | None = None,
        attend: Attend = attend_sequence,
    ) -> tuple[Array, Segment]:
        """Run whole sequences causally: one, or a batch with any axes *B that `attend` takes.

        Args:
          token: int32 [*B, T], padded on the right, and before `start` on the left.
          position: int32 [*B, T], places for the rotary embedding.
          length: int32 [*B], index behind the last real token.
          shard: places activations on the mesh.
          remat: recompute each layer in the backward pass instead of holding it.
          start: int32 [*B], index of the first real token. A sequence that others go on from starts at 0,
            since a segment is read from its first slot.
          prefix: what they follow, of all layers.
          attend: computes the attention of the whole batch; the default, that of one sequence.

        Returns:
          (hidden [*B, T, E] after the final norm, their keys and values: [L, *B, K, T, D] with length [*B]).
        """
        graph, stacked = nnx.split(self.layers)
        index = jnp.broadcast_to(jnp.arange(token.shape[-1]), token.shape)
        first = jnp.broadcast_to(start, token.shape[:-1])
        real = (first[..., None] <= index) & (index < jnp.broadcast_to(length, first.shape)[..., None])
        place = shard if token.ndim == 1 else sharded_as_batch(shard)
        # All tokens on one axis: the products with the weights, and those of their gradients, are then plain
        # ones, which XLA is best at.
        flat_position = position.reshape(-1)

        def layer(x: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
            params, *shared = inputs
            before = prefix._replace(key=shared[0], value=shared[1]) if prefix is not None else None
            block = nnx.merge(graph, params)
            query, key, value = (
                y.reshape(*token.shape, *y.shape[1:]) for y in block.project(x, flat_position, place)
            )
            key, value = jnp.swapaxes(key, -3, -2), jnp.swapaxes(value, -3, -2)
            attended = attend(query, key, value, real, before)
            return block.finish(x, attended.reshape(-1, *query.shape[-2:]), place), (key, value)

        body: Any = jax.checkpoint(layer) if remat else layer
        inputs = (stacked,) if prefix is None else (stacked, prefix.key, prefix.value)
        x, (key, value) = jax.lax.scan(body, self.embed(token.reshape(-1), place), inputs)
        return self.norm(x).reshape(*token.shape, -1), Segment(key, value, length)


def graph_of(config: Qwen2Config) -> nnx.GraphDef[Qwen2]:
    """The static half of the model: `nnx.merge(graph, params)` is a `Qwen2`."""
    return nnx.graphdef(nnx.eval_shape(lambda: Qwen2(config, nnx.Rngs(0))))


def init_params(config: Qwen2Config, seed: int) -> Params:
    """Fresh float32 parameters, a function of `seed`."""
    return nnx.to_pure_dict(nnx.state(Qwen2(config, nnx.Rngs(seed))))


def abstract_params(config: Qwen2Config) -> Params:
    """The parameters as ShapeDtypeStructs, without memory."""
    return jax.eval_shape(lambda: init_params(config, 0))


def logical_axes(config: Qwen2Config) -> Params:
    """The logical axis names of every parameter, a tree of tuples parallel to the parameters."""
    state = nnx.state(nnx.eval_shape(lambda: Qwen2(config, nnx.Rngs(0))))
    flat = {path: variable.get_metadata("axes") for path, variable in nnx.to_flat_state(state)}
    return traverse_util.unflatten_dict(flat)
