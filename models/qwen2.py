"""The Qwen2 decoder (Qwen2.5 checkpoints), in Flax NNX.

Two flags make it a related decoder: `qk_norm` without `qkv_bias` is dense Qwen3, neither is Llama.

The protocol of a decoder is in decoder.py.

Axis letters: T tokens, V vocabulary, E hidden, H heads, K key-value heads, D per head, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int

from fr3e_jax.models.decoder import Decoder, Shard, unsharded
from fr3e_jax.models.rope import Yarn, rotate


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: Float[Array, "T mlp"], up: Float[Array, "T mlp"]) -> Float[Array, "T mlp"]:
    """Compute silu(gate) * up; the backward pass holds these two and computes silu again."""
    return jax.nn.silu(gate) * up


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """The architecture; names and meaning are those of Hugging Face's config.json."""

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
    """Whether query, key and value have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether query and key are normalised, head by head, before they are rotated (Qwen3)."""
    yarn: Yarn | None = None
    """Scaling of the context, or None."""
    known_ids: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of the ids that the tokenizer has, where the vocabulary has more.

    The others have no probability."""

    @property
    def context(self) -> int:
        """The longest sequence, tokens; YaRN extends that of the training."""
        if self.yarn is None:
            return self.max_position_embeddings
        extended = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, extended)

    def build(self, rngs: nnx.Rngs) -> "Qwen2":
        """Make the decoder with fresh parameters."""
        return Qwen2(self, rngs)

    def forward_flops(self, tokens: float, pairs: float, logits: float) -> float:
        """Count FLOPs of a forward pass; the arguments are those of `DecoderConfig.forward_flops`."""
        heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        attention = 2 * self.num_attention_heads * self.head_dim
        per_layer = layer * tokens + attention * pairs
        return 2.0 * (self.num_hidden_layers * per_layer + self.vocab_size * self.hidden_size * logits)


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float) -> nnx.Param:
    """Make a normally distributed float32 parameter with the logical names of its axes."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """The norm x / rms(x) * scale, computed in float32."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes E"]) -> Float[Array, "*axes E"]:
        """Normalise the last axis; the result has the dtype of x."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)


class Block(nnx.Module):
    """A decoder layer, built stacked ([L, ...] parameters), merged and called one layer at a time."""

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

    def project(
        self, x: Float[Array, "T E"], position: Int[Array, " T"], shard: Shard
    ) -> tuple[Float[Array, "T H D"], Float[Array, "T K D"], Float[Array, "T K D"]]:
        """Compute rotated query, rotated key and value from the residual stream."""
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

    def finish(
        self, x: Float[Array, "T E"], attended: Float[Array, "T H D"], shard: Shard
    ) -> Float[Array, "T E"]:
        """Add attention's output and the gated MLP to the residual stream."""
        x = x + jnp.einsum("thd,hde->te", attended, self.o[...])
        x = shard(x, "length", "activation")
        normed = self.mlp_norm(x)
        inner = gated(normed @ self.gate[...], normed @ self.up[...])
        inner = shard(inner, "length", "mlp")
        return shard(x + inner @ self.down[...], "length", "activation")


class Qwen2(Decoder):
    """Decoder with a (possibly tied) LM head. Parameters are created in float32."""

    config: Qwen2Config

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs) -> None:
        self.config = config
        table = (config.vocab_size, config.hidden_size)
        self.embedding = weight(rngs, table, ("vocab", "embed"), 0.02)
        self.layers = Block(config, rngs)
        self.norm = RMSNorm((config.hidden_size,), ("norm",), config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = weight(rngs, table, ("vocab", "embed"), 0.02)

    def embed(self, token: Int[Array, " T"], shard: Shard) -> Float[Array, "T E"]:
        """Look tokens up in the embedding."""
        # The table is sharded too: gathered over fsdp, as every other weight is, and split over the
        # vocabulary also as a gradient, which every device would otherwise hold whole.
        table = shard(self.embedding[...], "vocab", None)
        return shard(table[token], "length", "activation")

    def logits(self, hidden: Float[Array, "T E"], shard: Shard = unsharded) -> Float32[Array, "T V"]:
        """Compute logits of the final hidden states, the vocabulary sharded; -inf of unknown ids."""
        table = self.embedding if self.config.tie_word_embeddings else self.lm_head
        # As in `embed`: gathered over fsdp, or XLA may add up logits over it.
        words = shard(table[...], "vocab", None)
        logits = jnp.einsum("te,ve->tv", hidden, words, preferred_element_type=jnp.float32)
        return shard(self.known(logits), "length", "vocab")
