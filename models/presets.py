"""The shapes of the family, for planning and for tests without weights.

A checkpoint is always read by its own config.json. These are what the checkpoints of a size share, with
the variants (base, Instruct, Math, Coder) that have that shape; where base and Instruct differ (the context,
and `rms_norm_eps` of the larger ones), the values are those of Instruct. `parameters` is the count that the
hub shows: the numbers of a checkpoint, a tied matrix once.
"""

import dataclasses

from fr3e_jax.models.qwen2 import Qwen2Config


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size: its shape, its exact number of parameters, and the hub's names of its checkpoints."""

    config: Qwen2Config
    parameters: int
    checkpoints: tuple[str, ...]


def qwen25(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool
) -> Qwen2Config:
    """Make the config of a Qwen2.5."""
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32_768,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )


def small(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, context: int
) -> Qwen2Config:
    """Make the config of a small model, with the frequencies of a short context."""
    return dataclasses.replace(
        qwen25(hidden, layers, heads, kv_heads, intermediate, vocab, tied=True),
        max_position_embeddings=context,
        rope_theta=10_000.0,
    )


def math(config: Qwen2Config) -> Qwen2Config:
    """Make the config of a Qwen2.5-Math: another base of the rotary frequencies, and a shorter context."""
    return dataclasses.replace(config, max_position_embeddings=4_096, rope_theta=10_000.0)


def qwen3(
    hidden: int, layers: int, heads: int, intermediate: int, tied: bool, kv_heads: int = 8
) -> Qwen2Config:
    """Make the config of a dense Qwen3."""
    return dataclasses.replace(
        qwen25(hidden, layers, heads, kv_heads, intermediate, 151_936, tied),
        head_dim=128,
        max_position_embeddings=40_960,
        qkv_bias=False,
        qk_norm=True,
    )


def smollm2(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, theta: float
) -> Qwen2Config:
    """Make the config of a SmolLM2, a Llama."""
    return dataclasses.replace(
        qwen25(hidden, layers, heads, kv_heads, intermediate, 49_152, tied=True),
        max_position_embeddings=8_192,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        qkv_bias=False,
    )


def names(family: str, size: str, *variants: str) -> tuple[str, ...]:
    """Make the hub's names of a size: `{}` in a variant is the size."""
    return tuple(f"{family}{variant.format(size)}" for variant in variants)


QWEN25, QWEN3, SMOLLM2 = "Qwen/Qwen2.5-", "Qwen/Qwen3-", "HuggingFaceTB/SmolLM2-"
GENERAL = ("{}", "{}-Instruct")
CODER = ("Coder-{}", "Coder-{}-Instruct")
MATH = ("Math-{}", "Math-{}-Instruct")

SHAPE_1_5B = qwen25(1_536, 28, 12, 2, 8_960, 151_936, tied=True)
SHAPE_7B = qwen25(3_584, 28, 28, 4, 18_944, 152_064, tied=False)
SHAPE_72B = qwen25(8_192, 80, 64, 8, 29_568, 152_064, tied=False)

PRESETS = {
    "qwen2.5-0.5b": Preset(
        qwen25(896, 24, 14, 2, 4_864, 151_936, tied=True),
        494_032_768,
        names(QWEN25, "0.5B", *GENERAL, *CODER),
    ),
    "qwen2.5-1.5b": Preset(SHAPE_1_5B, 1_543_714_304, names(QWEN25, "1.5B", *GENERAL, *CODER)),
    "qwen2.5-math-1.5b": Preset(math(SHAPE_1_5B), 1_543_714_304, names(QWEN25, "1.5B", *MATH)),
    "qwen2.5-3b": Preset(
        qwen25(2_048, 36, 16, 2, 11_008, 151_936, tied=True),
        3_085_938_688,
        names(QWEN25, "3B", *GENERAL, *CODER),
    ),
    "qwen2.5-7b": Preset(SHAPE_7B, 7_615_616_512, names(QWEN25, "7B", *GENERAL, *CODER)),
    "qwen2.5-math-7b": Preset(math(SHAPE_7B), 7_615_616_512, names(QWEN25, "7B", *MATH)),
    "qwen2.5-14b": Preset(
        qwen25(5_120, 48, 40, 8, 13_824, 152_064, tied=False),
        14_770_033_664,
        names(QWEN25, "14B", *GENERAL, *CODER),
    ),
    "qwen2.5-32b": Preset(
        qwen25(5_120, 64, 40, 8, 27_648, 152_064, tied=False),
        32_763_876_352,
        names(QWEN25, "32B", *GENERAL, *CODER),
    ),
    "qwen2.5-72b": Preset(SHAPE_72B, 72_706_203_648, names(QWEN25, "72B", *GENERAL)),
    "qwen2.5-math-72b": Preset(math(SHAPE_72B), 72_706_203_648, names(QWEN25, "72B", *MATH)),
    "qwen3-0.6b": Preset(qwen3(1_024, 28, 16, 3_072, True), 596_049_920, names(QWEN3, "0.6B", "{}")),
    "qwen3-1.7b": Preset(qwen3(2_048, 28, 16, 6_144, True), 1_720_574_976, names(QWEN3, "1.7B", "{}")),
    "qwen3-4b": Preset(qwen3(2_560, 36, 32, 9_728, True), 4_022_468_096, names(QWEN3, "4B", "{}")),
    "qwen3-8b": Preset(qwen3(4_096, 36, 32, 12_288, False), 8_190_735_360, names(QWEN3, "8B", "{}")),
    "qwen3-14b": Preset(qwen3(5_120, 40, 40, 17_408, False), 14_768_307_200, names(QWEN3, "14B", "{}")),
    "qwen3-32b": Preset(qwen3(5_120, 64, 64, 25_600, False), 32_762_123_264, names(QWEN3, "32B", "{}")),
    "smollm2-135m": Preset(
        smollm2(576, 30, 9, 3, 1_536, 100_000.0), 134_515_008, names(SMOLLM2, "135M", *GENERAL)
    ),
    "smollm2-360m": Preset(
        smollm2(960, 32, 15, 5, 2_560, 100_000.0), 361_821_120, names(SMOLLM2, "360M", *GENERAL)
    ),
    "smollm2-1.7b": Preset(
        smollm2(2_048, 24, 32, 32, 8_192, 130_000.0), 1_711_376_384, names(SMOLLM2, "1.7B", *GENERAL)
    ),
}
