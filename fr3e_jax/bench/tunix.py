"""The update of Tunix, Google's library for reinforcement learning of language models in JAX, as a side."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fr3e_jax.bench.table import TINY

ANSWERS_PER_QUESTION = 4  # the update itself sees no questions


def updating_with_tunix(rows: int, prompt: int, new: int) -> Callable[[], Any]:
    """Make the side that updates `rows` answers with Tunix's GRPO learner, AdamW included.

    The model has the shape of `TINY`, float32, without recomputation. A row has `prompt` tokens, then `new`.

    Raises:
      ImportError: without google-tunix.
    """
    from tunix.models.qwen2 import model as qwen2
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    model = qwen2.Qwen2(
        qwen2.ModelConfig(
            num_layers=TINY.num_hidden_layers,
            vocab_size=TINY.vocab_size,
            embed_dim=TINY.hidden_size,
            hidden_dim=TINY.intermediate_size,
            num_heads=TINY.num_attention_heads,
            head_dim=TINY.head_dim,
            num_kv_heads=TINY.num_key_value_heads,
            rope_theta=int(TINY.rope_theta),
            norm_eps=TINY.rms_norm_eps,
            use_tied_embedding=True,
            remat_config=qwen2.RematConfig.NONE,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        ),
        rngs=nnx.Rngs(0),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = rl_cluster.Role
    settings = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-6), eval_every_n_steps=10**9, max_steps=10**6
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=new, max_prompt_length=prompt, kv_cache_size=prompt + new + 1
        ),
    )
    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=model, reference=None, tokenizer=Numbers(), cluster_config=settings
        )
    algorithm = grpo_learner.GRPOConfig(
        num_generations=ANSWERS_PER_QUESTION, num_iterations=1, beta=0.0, epsilon=0.2
    )
    # It is the learner that gives the cluster its loss.
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster, algo_config=algorithm, reward_fns=lambda prompts, **_: [0.0] * len(prompts)
    )
    rng = np.random.default_rng(0)

    def tokens(count: int) -> jax.Array:
        return jnp.asarray(rng.integers(2, TINY.vocab_size, (rows, count)), jnp.int32)

    example = grpo_learner.TrainExample(
        prompt_ids=tokens(prompt),
        prompt_mask=jnp.ones((rows, prompt), bool),
        completion_ids=tokens(new),
        completion_mask=jnp.ones((rows, new), bool),
        advantages=jnp.asarray(rng.standard_normal(rows), jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.full((rows, new), -8.3, jnp.float32),
    )

    def side() -> None:
        learner.rl_cluster.update_actor([example], None)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.Param))

    return side


class Numbers:
    """A tokenizer whose texts are the ids themselves, with spaces between; the update does not use it."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """Read token ids from a text of numbers."""
        return [int(number) for number in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        """Write token ids as a text of numbers."""
        return " ".join(str(int(number)) for number in ids)

    def bos_id(self) -> int:
        """Return 0, which Tunix takes for having no token that texts begin with."""
        return 0

    def eos_id(self) -> int:
        """Return an end token that no text contains, since the vocabulary ends before it."""
        return TINY.vocab_size

    def pad_id(self) -> int:
        """Return the token that short texts are padded with."""
        return 0
