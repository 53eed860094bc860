"""How the losses of tokens become one number: by how much a token of each sequence counts.

A sequence is a partial rollout's own tokens. The loss is the sum over tokens of share x loss, divided by the
number N of trained tokens. So there is one denominator for all micro-batches and hosts, whichever mean it is.
The functions here run on the host, once for a whole minibatch.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, Int

from fr3e_jax.algorithm.rules import Chosen, Rule, function_of, of_shape

AggregateFunction = Callable[[Int[np.ndarray, "G M"], Int[np.ndarray, " G"], int], Float[np.ndarray, "G M"]]
"""(Tokens of each sequence, the query of each state, rollout.max_response) -> how much a token of each
sequence counts, relative to N tokens that count 1 each."""

Aggregate = Chosen[AggregateFunction]


def by_token(
    length: Int[np.ndarray, "G M"], query: Int[np.ndarray, " G"], limit: int
) -> Float[np.ndarray, "G M"]:
    """Count every token alike: sum / N. DAPO (arXiv 2503.14476), and the paper's."""
    return np.ones(length.shape)


def by_sequence(
    length: Int[np.ndarray, "G M"], query: Int[np.ndarray, " G"], limit: int
) -> Float[np.ndarray, "G M"]:
    """Count every sequence alike: the mean over its tokens, then over sequences. GRPO (arXiv 2402.03300).

    A token of a long answer counts less, so that long wrong answers are punished less for each token.
    """
    return length.sum() / (np.maximum((length > 0).sum(), 1) * np.maximum(length, 1))


def by_prompt(
    length: Int[np.ndarray, "G M"], query: Int[np.ndarray, " G"], limit: int
) -> Float[np.ndarray, "G M"]:
    """Count every query alike: the mean over all tokens of its sequences, then over queries.

    The prompt average of ScaleRL (arXiv 2510.13786). The sequences are those of all states of the query that
    are in the minibatch.
    """
    queries, number = np.unique(query, return_inverse=True)
    tokens = np.bincount(number, weights=length.sum(axis=1), minlength=len(queries))
    share = length.sum() / (np.maximum((tokens > 0).sum(), 1) * np.maximum(tokens, 1))
    return np.broadcast_to(share[number][:, None], length.shape)


def by_constant(
    length: Int[np.ndarray, "G M"], query: Int[np.ndarray, " G"], limit: int
) -> Float[np.ndarray, "G M"]:
    """Divide by a constant: sum / (sequences x rollout.max_response). Dr. GRPO (arXiv 2503.20783).

    A token counts the same in every step, however long the answers of its minibatch are. The gradient is
    smaller by the share that answers are of the limit.
    """
    return np.full(length.shape, length.sum() / (np.maximum((length > 0).sum(), 1) * limit))


AGGREGATES: dict[str, Rule[AggregateFunction]] = {
    "token": Rule(by_token, "the mean over tokens (paper; DAPO)"),
    "sequence": Rule(by_sequence, "the mean over a sequence's tokens, then over sequences (GRPO)"),
    "prompt": Rule(by_prompt, "the mean over a query's tokens, then over queries (ScaleRL)"),
    "constant": Rule(by_constant, "the sum by sequences x rollout.max_response (Dr. GRPO)"),
}


def aggregate_shares(
    aggregate: str | AggregateFunction,
    length: Int[np.ndarray, "G M"],
    query: Int[np.ndarray, " G"],
    limit: int,
) -> Float32[np.ndarray, "G M"] | None:
    """Compute by how much a token of each sequence counts; None where all count 1.

    Args:
      aggregate: a name in AGGREGATES, or a function.
      length: tokens of each sequence.
      query: of each state.
      limit: rollout.max_response.

    Raises:
      RuleError: there is no such rule, or it gives something else.
    """
    function = function_of(AGGREGATES, aggregate)
    if function is by_token:
        return None
    shares = of_shape(function(length, query, limit), length.shape, "shares [G, M], one for each sequence,")
    return np.asarray(shares, np.float32)
