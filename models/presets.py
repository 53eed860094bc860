"""Configs of published models, for planning and for tests without weights.

A checkpoint is always read by its own config.json. A preset holds what the checkpoints of a size share, and
names the variants (base, Instruct, Math, Coder) that have it. Where base and Instruct differ (the context,
and `rms_norm_eps` of the larger ones), the values are those of Instruct. `parameters` is the count that the
hub shows: the numbers of a checkpoint, a tied matrix once.
"""

import dataclasses

from fr3e_jax.models.qwen2 import Qwen2Config


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of a model: config, exact number of parameters, and the hub's names of its checkpoints."""

    config: Qwen2Config
    parameters: int
    checkpoints: tuple[str, ...]


def qwen25(
    *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool
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
    *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, context: int
) -> Qwen2Config:
    """Make the config of a small model, with the frequencies of a short context."""
    return dataclasses.replace(
        qwen25(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=intermediate,
            vocab=vocab,
            tied=True,
        ),
        max_position_embeddings=context,
        rope_theta=10_000.0,
    )


def math(config: Qwen2Config) -> Qwen2Config:
    """Make the config of a Qwen2.5-Math: another base of the rotary frequencies, and a shorter context."""
    return dataclasses.replace(config, max_position_embeddings=4_096, rope_theta=10_000.0)


def qwen3(
    *, hidden: int, layers: int, heads: int, intermediate: int, tied: bool, kv_heads: int = 8
) -> Qwen2Config:
    """Make the config of a dense Qwen3."""
    return dataclasses.replace(
        qwen25(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=intermediate,
            vocab=151_936,
            tied=tied,
        ),
        head_dim=128,
        max_position_embeddings=40_960,
        qkv_bias=False,
        qk_norm=True,
    )


def smollm2(
    *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, theta: float
) -> Qwen2Config:
    """Make the config of a SmolLM2, a Llama."""
    return dataclasses.replace(
        qwen25(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=intermediate,
            vocab=49_152,
            tied=True,
        ),
        max_position_embeddings=8_192,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        qkv_bias=False,
    )


def hub_names(family: str, size: str, *variants: str) -> tuple[str, ...]:
    """Make the hub's names of a size: `{}` in a variant is the size."""
    return tuple(f"{family}{variant.format(size)}" for variant in variants)


QWEN25, QWEN3, SMOLLM2 = "Qwen/Qwen2.5-", "Qwen/Qwen3-", "HuggingFaceTB/SmolLM2-"
GENERAL = ("{}", "{}-Instruct")
CODER = ("Coder-{}", "Coder-{}-Instruct")
MATH = ("Math-{}", "Math-{}-Instruct")

SHAPE_1_5B = qwen25(
    hidden=1_536, layers=28, heads=12, kv_heads=2, intermediate=8_960, vocab=151_936, tied=True
)
SHAPE_7B = qwen25(
    hidden=3_584, layers=28, heads=28, kv_heads=4, intermediate=18_944, vocab=152_064, tied=False
)
SHAPE_72B = qwen25(
    hidden=8_192, layers=80, heads=64, kv_heads=8, intermediate=29_568, vocab=152_064, tied=False
)

PRESETS = {
    "qwen2.5-0.5b": Preset(
        qwen25(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4_864, vocab=151_936, tied=True),
        494_032_768,
        hub_names(QWEN25, "0.5B", *GENERAL, *CODER),
    ),
    "qwen2.5-1.5b": Preset(SHAPE_1_5B, 1_543_714_304, hub_names(QWEN25, "1.5B", *GENERAL, *CODER)),
    "qwen2.5-math-1.5b": Preset(math(SHAPE_1_5B), 1_543_714_304, hub_names(QWEN25, "1.5B", *MATH)),
    "qwen2.5-3b": Preset(
        qwen25(hidden=2_048, layers=36, heads=16, kv_heads=2, intermediate=11_008, vocab=151_936, tied=True),
        3_085_938_688,
        hub_names(QWEN25, "3B", *GENERAL, *CODER),
    ),
    "qwen2.5-7b": Preset(SHAPE_7B, 7_615_616_512, hub_names(QWEN25, "7B", *GENERAL, *CODER)),
    "qwen2.5-math-7b": Preset(math(SHAPE_7B), 7_615_616_512, hub_names(QWEN25, "7B", *MATH)),
    "qwen2.5-14b": Preset(
        qwen25(hidden=5_120, layers=48, heads=40, kv_heads=8, intermediate=13_824, vocab=152_064, tied=False),
        14_770_033_664,
        hub_names(QWEN25, "14B", *GENERAL, *CODER),
    ),
    "qwen2.5-32b": Preset(
        qwen25(hidden=5_120, layers=64, heads=40, kv_heads=8, intermediate=27_648, vocab=152_064, tied=False),
        32_763_876_352,
        hub_names(QWEN25, "32B", *GENERAL, *CODER),
    ),
    "qwen2.5-72b": Preset(SHAPE_72B, 72_706_203_648, hub_names(QWEN25, "72B", *GENERAL)),
    "qwen2.5-math-72b": Preset(math(SHAPE_72B), 72_706_203_648, hub_names(QWEN25, "72B", *MATH)),
    "qwen3-0.6b": Preset(
        qwen3(hidden=1_024, layers=28, heads=16, intermediate=3_072, tied=True),
        596_049_920,
        hub_names(QWEN3, "0.6B", "{}"),
    ),
    "qwen3-1.7b": Preset(
        qwen3(hidden=2_048, layers=28, heads=16, intermediate=6_144, tied=True),
        1_720_574_976,
        hub_names(QWEN3, "1.7B", "{}"),
    ),
    "qwen3-4b": Preset(
        qwen3(hidden=2_560, layers=36, heads=32, intermediate=9_728, tied=True),
        4_022_468_096,
        hub_names(QWEN3, "4B", "{}"),
    ),
    "qwen3-8b": Preset(
        qwen3(hidden=4_096, layers=36, heads=32, intermediate=12_288, tied=False),
        8_190_735_360,
        hub_names(QWEN3, "8B", "{}"),
    ),
    "qwen3-14b": Preset(
        qwen3(hidden=5_120, layers=40, heads=40, intermediate=17_408, tied=False),
        14_768_307_200,
        hub_names(QWEN3, "14B", "{}"),
    ),
    "qwen3-32b": Preset(
        qwen3(hidden=5_120, layers=64, heads=64, intermediate=25_600, tied=False),
        32_762_123_264,
        hub_names(QWEN3, "32B", "{}"),
    ),
    "smollm2-135m": Preset(
        smollm2(hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1_536, theta=100_000.0),
        134_515_008,
        hub_names(SMOLLM2, "135M", *GENERAL),
    ),
    "smollm2-360m": Preset(
        smollm2(hidden=960, layers=32, heads=15, kv_heads=5, intermediate=2_560, theta=100_000.0),
        361_821_120,
        hub_names(SMOLLM2, "360M", *GENERAL),
    ),
    "smollm2-1.7b": Preset(
        smollm2(hidden=2_048, layers=24, heads=32, kv_heads=32, intermediate=8_192, theta=130_000.0),
        1_711_376_384,
        hub_names(SMOLLM2, "1.7B", *GENERAL),
    ),
}
