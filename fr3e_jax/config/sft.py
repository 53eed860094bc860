"""The options of supervised warm-up."""

import dataclasses

from fr3e_jax.config.sections import DataConfig, MeshConfig
from fr3e_jax.config.values import (
    Count,
    CountOrNone,
    Fraction,
    Name,
    NonNegativeNumber,
    PositiveNumber,
    Seed,
    Size,
)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised warm-up on the task's worked solutions."""

    out: Name = "runs/sft"
    """Directory for the model, in the Hugging Face format."""
    seed: Seed = 0
    """All randomness is a function of it."""
    steps: Count = 300
    """Optimizer steps."""
    batch: Size = 128
    """Solutions per step."""
    learning_rate: PositiveNumber = 2e-3
    """Peak of the cosine schedule of AdamW."""
    warmup_steps: CountOrNone = 20
    """Steps of linear warm-up."""
    weight_decay: NonNegativeNumber = 0.01
    """AdamW's decay of matrices."""
    max_grad_norm: PositiveNumber = 1.0
    """Gradients are scaled down to this global norm."""
    init_path: Name | None = None
    """Hugging Face directory or name on the hub to start from; by default a new model of the shape below is
    drawn."""
    hidden_size: Size = 128
    """Width of a new model."""
    intermediate_size: Size = 512
    """Width of its MLP."""
    num_hidden_layers: Size = 4
    """Its layers."""
    num_attention_heads: Size = 4
    """Its query heads."""
    num_key_value_heads: Size = 2
    """Its key-value heads."""
    max_position_embeddings: Size = 256
    """Its context, tokens; also the longest solution with its question."""
    dropped_carry: Fraction = 0.6
    """carry_addition: probability that a solution forgets a carry between columns, the bad habit that
    reinforcement is to undo."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
