"""The settings of an evaluation, and which of them cannot run."""

import dataclasses
from typing import Literal

from fr3e_jax.config import (
    ConfigError,
    DistributedConfig,
    MeshConfig,
    ScoringConfig,
    SourceConfig,
    check_at_least,
    check_filters,
    check_scoring,
    check_seed,
)
from fr3e_jax.evaluation.answers import MOST_SAMPLES

LONGEST = 3072  # tokens of an answer of a model that no run trained


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Ask a model the problems of benchmarks, and tell what share it answers right."""

    model: str = ""
    """Run directory of train (its last whole checkpoint), Hugging Face directory, name on the hub, or
    `quickstart`. Needed, but for --rescore."""
    suite: str | list[SourceConfig] = "math"
    """`math`, or names of benchmarks with commas between (fr3e_jax/evaluation/README.md), or sources of
    problems, such as FILE.jsonl; or a list of these with settings as data.source has them:
    '[{name: FILE.jsonl, prompt: COLUMN, answer: COLUMN, scorer: numeric}]'."""
    step: int | None = None
    """Checkpoint of a run; by default the last."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Benchmark -> a copy of its data here (`--files.aime24 aime24.jsonl`), read instead of the hub's."""
    samples: int = 0
    """Answers to each problem, k; 0 takes each benchmark's own."""
    temperature: float = -1.0
    """Of sampling; 0 takes the most likely token, -1 each benchmark's own."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 from all."""
    max_response: int = 0
    """Longest answer, tokens; one that is cut off is wrong. 0 takes rollout.max_response of a run, and 3072
    for other models."""
    template: str = "auto"
    """What the model sees, as data.template of train; `auto`: as the run was trained, else `boxed_chat` where
    the chat template ends its turns as the model does, and `boxed` for base models."""
    stop: list[str] | None = None
    """Texts that end an answer, as rollout.stop of train; by default those that the run was trained with."""
    limit: int = 0
    """Take the first so many problems of each benchmark; 0 takes all."""
    rows: int = 64
    """Answers decoded at a time, of any problems; bounds memory. In bfloat16 an answer now and then differs
    with other rows."""
    seed: int = 0
    """The random numbers of an answer are a function of it, its problem and its sample's number; in float32
    so is the answer."""
    out: str | None = None
    """Directory for answers and table; by default runs/evaluate-TIME. One that holds an evaluation that was
    ended goes on."""
    compare: str | None = None
    """Directory of another evaluation: tell whether this model is better than that one, with a p-value. Both
    must have been asked the same problems in the same way."""
    compare_anyway: bool = False
    """Compare evaluations that were asked differently too; the table says how they differ."""
    rescore: str | None = None
    """Directory of an evaluation: judge its stored answers again with the scorers of this version, and show
    what changes. No model is asked. The new verdicts are written to --out, if that is given."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and matrix products; `auto` is bfloat16 on accelerators and float32 on CPU."""
    compilation_cache: str = "auto"
    """Where compiled programs are kept, as in train."""
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


HOW_IT_IS_DONE = {
    "out",
    "compare",
    "compare_anyway",
    "rescore",
    "compilation_cache",
    "mesh",
    "distributed",
    "rows",
    "scoring",
    "files",
}
"""Settings with which an evaluation may go on otherwise: they do not change what is asked of whom."""


def check(config: EvaluationConfig, row_parts: int) -> None:
    """Refuse what cannot run.

    Args:
      config: settings of the command.
      row_parts: parts that the mesh splits rows into (data x fsdp).

    Raises:
      ConfigError: with one line that says what to change.
    """
    if not config.model:
        raise ConfigError("name a model with --model, or stored answers to judge again with --rescore DIR")
    least = {"samples": 0, "max_response": 0, "limit": 0, "rows": 1, "seed": 0, "distributed.timeout": 1}
    values = dataclasses.asdict(config) | {"distributed.timeout": config.distributed.timeout}
    check_at_least({name: (values[name], bound) for name, bound in least.items()})
    if config.samples > MOST_SAMPLES:
        raise ConfigError(f"samples is {config.samples}, must be at most {MOST_SAMPLES}")
    check_seed(config.seed)
    if not (config.temperature >= 0 or config.temperature == -1):
        raise ConfigError(
            f"temperature is {config.temperature}, must be at least 0, or -1 for the benchmarks'"
        )
    if config.rows % row_parts:
        raise ConfigError(
            f"rows is {config.rows}, which does not divide by the mesh's data x fsdp = {row_parts}"
        )
    check_filters(config.top_k, config.top_p)
    check_scoring(config.scoring)
