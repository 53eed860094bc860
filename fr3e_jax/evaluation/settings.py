"""The settings of an evaluation, and which of them cannot run."""

import dataclasses
from typing import Annotated, Literal

from fr3e_jax.config import (
    ConfigError,
    DevicesConfig,
    DistributedConfig,
    ScoringConfig,
    SourceConfig,
    check_options,
)
from fr3e_jax.config.values import Bounds, Name, NonNegativeInt, RowCount, Seed, TopK, TopP
from fr3e_jax.evaluation.answers import MOST_SAMPLES

LONGEST = 3072  # tokens of an answer of a model that no run trained


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Ask a model the problems of benchmarks, and tell what share it answers right."""

    model: str = ""
    """Run directory of train (its last whole checkpoint), Hugging Face directory, name on the hub, or
    `quickstart`. Needed, but for --rescore."""
    suite: Name | list[SourceConfig] = "math"
    """`math`, or names of benchmarks with commas between (fr3e_jax/evaluation/README.md), or sources of
    problems, such as FILE.jsonl; or a list of these with settings as data.source has them:
    '[{name: FILE.jsonl, prompt: COLUMN, answer: COLUMN, scorer: numeric}]'."""
    step: NonNegativeInt | None = None
    """Checkpoint of a run; by default the last."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Benchmark -> a copy of its data here (`--files.aime24 aime24.jsonl`), read instead of the hub's."""
    samples: Annotated[int, Bounds(least=0, most=MOST_SAMPLES)] = 0
    """Answers to each problem, k; 0 takes each benchmark's own."""
    temperature: Annotated[float, Bounds(least=0, besides=-1, why="-1 takes each benchmark's own")] = -1.0
    """Of sampling; 0 takes the most likely token, -1 each benchmark's own."""
    top_k: TopK = 0
    """Draw from this many of the most likely tokens; 0 from all."""
    top_p: TopP = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 from all."""
    max_response: Annotated[int, Bounds(least=0, most=2**20)] = 0
    """Longest answer, tokens; one that is cut off is wrong. 0 takes rollout.max_response of a run, and 3072
    for other models."""
    template: Name = "auto"
    """What the model sees, as data.template of train; `auto`: as the run was trained, else `boxed_chat` where
    the chat template ends its turns as the model does, and `boxed` for base models."""
    stop: list[str] | None = None
    """Texts that end an answer, as rollout.stop of train; by default those that the run was trained with."""
    success_at: Annotated[float, Bounds(least=0, most=1)] = 0.0
    """Least score of an answer that counts as right, for scorers that give numbers. 0 takes reward.success_at
    of a run, and 1 for other models."""
    limit: NonNegativeInt = 0
    """Take the first so many problems of each benchmark; 0 takes all."""
    rows: RowCount = 64
    """Answers decoded at a time, of any problems; bounds memory. In bfloat16 an answer now and then differs
    with other rows."""
    seed: Seed = 0
    """The random numbers of an answer are a function of it, its problem and its sample's number; in float32
    so is the answer."""
    out: Name | None = None
    """Directory for answers and table; by default runs/evaluate-TIME. One that holds an evaluation that was
    ended goes on."""
    compare: Name | None = None
    """Directory of another evaluation: tell whether this model is better than that one, with a p-value. Both
    must have been asked the same problems in the same way."""
    compare_anyway: bool = False
    """Compare evaluations that were asked differently too; the table says how they differ."""
    rescore: Name | None = None
    """Directory of an evaluation: judge its stored answers again with the scorers of this version, and show
    what changes. No model is asked. The new verdicts are written to --out, if that is given."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and matrix products; `auto` is bfloat16 on accelerators and float32 on CPU."""
    compilation_cache: Name = "auto"
    """Where compiled programs are kept, as in train."""
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    mesh: DevicesConfig = dataclasses.field(default_factory=DevicesConfig)
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

NEWER = {"success_at": 1.0}
"""Settings that evaluations of earlier versions do not have, with what those versions did."""


def check_evaluation(config: EvaluationConfig, row_parts: int) -> None:
    """Refuse what cannot run.

    Args:
      config: settings of the command.
      row_parts: parts that the mesh splits rows into (data x fsdp).

    Raises:
      ConfigError: with one line that says what to change.
    """
    if not config.model:
        raise ConfigError("name a model with --model, or stored answers to judge again with --rescore DIR")
    check_options(config)
    if config.rows % row_parts:
        raise ConfigError(
            f"rows is {config.rows}, which does not divide by the mesh's data x fsdp = {row_parts}"
        )
