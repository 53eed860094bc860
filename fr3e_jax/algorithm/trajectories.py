"""What a position rule sees of base trajectories: what sampling recorded, and what the rule needs beyond."""

import dataclasses
from typing import Any

from jax import Array
from jaxtyping import Bool, Float32, Int, Key

from fr3e_jax.algorithm.rules import RuleError
from fr3e_jax.types import AnyArray, pytree


@pytree
class Measures:
    """What sampling does not record of N trajectories; a field is None unless a rule needs it.

    A rule names what it needs (`Rule.needs`): the fields' names, of which `attention` brings the two of it.
    """

    gradient: Float32[AnyArray, "N S"] | None = None
    """||W^T (e_y - p)||: norm of the gradient of each token's log-probability with respect to the last hidden
    state, which the LM head W is applied to; 0 from the length on."""
    attention: Float32[AnyArray, "N S"] | None = None
    """Attention that the tokens after each one pay to it, in total: a weight is the mean over layers and
    heads. The last token of a response is never run, so it neither pays nor receives any."""
    attention_at: Float32[AnyArray, "N S"] | None = None
    """The same attention by distance: entry d is the total over all pairs of tokens that are d apart."""
    sentence: Bool[AnyArray, "N S"] | None = None
    """Tokens that a sentence, a line or a step begins with."""
    information: Float32[AnyArray, "N S"] | None = None
    """I(y_t; r), what a token tells about the reward, nats, of the 4 K candidates that pilot rollouts were
    sampled at; -inf at all other tokens."""


NEEDS = ("gradient", "attention", "sentence", "information")
"""What a position rule may need."""


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """N base trajectories as a position rule sees them."""

    entropy: Float32[AnyArray, "N S"]
    """Entropy of the policy before each token was drawn, nats; 0 from the length on."""
    logprob: Float32[AnyArray, "N S"]
    """Of the drawn tokens, nats; 0 from the length on."""
    length: Int[AnyArray, " N"]
    """How many tokens each response has."""
    key: Key[Array, " N"]
    count: int
    """K, the number of positions that are wanted."""
    min_gap: int
    """Least distance of two positions, tokens."""
    wanted: Int[AnyArray, " N"] | None = None
    """How many positions each trajectory gets at most; None: K."""
    measures: Measures = dataclasses.field(default_factory=Measures)
    """What sampling does not record and the rule needs; fields that it does not need are None."""

    def measured(self, name: str) -> Any:
        """A field of `measures`.

        Raises:
          RuleError: the rule uses it and does not say that it needs it.
        """
        if (value := getattr(self.measures, name)) is None:
            raise RuleError(
                f"the position rule uses {name}, which is only computed for rules that say so: in a table "
                f'Rule(function, "help", needs=("{name}",)), of a function of your own function.needs = '
                f'("{name}",)'
            )
        return value
