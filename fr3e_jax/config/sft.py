"""The options of supervised warm-up."""

import dataclasses

from fr3e_jax.config.sections import DataConfig, DevicesConfig
from fr3e_jax.config.values import (
    Count,
    Name,
    NonNegativeInt,
    NonNegativeNumber,
    PositiveNumber,
    Seed,
    Size,
    UnitInterval,
)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised warm-up on the task's worked solutions."""

    out: Name = "runs/sft"
    """Directory for the model, in the Hugging Face format."""
    seed: Seed = 0
    """Seed of all random numbers."""
    steps: Count = 300
    """Optimizer steps."""
    batch: Size = 128
    """Solutions per step."""
    learning_rate: PositiveNumber = 2e-3
    """Peak of the cosine schedule of AdamW."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; by default 20, or a quarter of `steps` where that is less."""
    weight_decay: NonNegativeNumber = 0.01
    """AdamW's weight decay of matrices."""
    max_grad_norm: PositiveNumber = 1.0
    """Gradients are scaled down to this global norm."""
    init_path: Name | None = None
    """Hugging Face directory or name on the hub to start from; by default a new model of the shape below is
    drawn."""
    hidden_size: Size = 128
    """Width of the residual stream of a new model."""
    intermediate_size: Size = 512
    """Width of the MLP of a new model."""
    num_hidden_layers: Size = 4
    """Layers of a new model."""
    num_attention_heads: Size = 4
    """Query heads of a new model."""
    num_key_value_heads: Size = 2
    """Key-value heads of a new model."""
    max_position_embeddings: Size = 256
    """Context of a new model, tokens; also the longest question with its solution."""
    dropped_carry: UnitInterval = 0.6
    """carry_addition: probability that a solution forgets a carry between columns, the bad habit that
    reinforcement is to undo."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: DevicesConfig = dataclasses.field(default_factory=DevicesConfig)

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up, as given or by default."""
        return min(20, self.steps // 4) if self.warmup_steps is None else self.warmup_steps
