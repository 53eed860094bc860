"""The entropy of the policy before a token is drawn: H_t of arXiv 2507.07017."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32


def token_entropy(total: Float32[Array, "*axes"], moment: Float32[Array, "*axes"]) -> Float32[Array, "*axes"]:
    """Compute H = -sum_v pi(v) log pi(v), in nats, of the distribution at temperature 1.

    Paper (first return). The sampler has two sums over the vocabulary, of the logits x less the largest one.
    With them H = log Z - (sum_v x e^x) / Z.

    Args:
      total: Z, the sum of e^x.
      moment: the sum of x e^x; a token of probability 0 adds 0.
    """
    return jnp.log(total) - moment / total
