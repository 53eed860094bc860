"""Benchmarks by name: what is asked, how often, and how it is sampled."""

import dataclasses
import difflib
from pathlib import PurePath

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.corpus import judging_source, refuse_unread

FILES = (".jsonl", ".json", ".csv", ".parquet", ".py")
SOURCES = ("carry_addition", "word_addition", "commonsense_qa_test")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Problems, and how they are asked.

    name: short. dataset: name of a source (SourceConfig.name). samples: answers to each problem, k.
    temperature: of sampling; 0 takes the most likely token. label: for people. source: where the last two
    come from. columns: how the rows of the source are read, where that was given.
    """

    name: str
    dataset: str
    samples: int
    temperature: float
    label: str
    source: str
    columns: SourceConfig | None = None

    def __hash__(self) -> int:
        return hash(self.name)  # which is the only one of its name


def _sampled(name: str, label: str, source: str) -> Benchmark:
    return Benchmark(name, name, 32, 1.0, label, source)


def _greedy(name: str, label: str, source: str) -> Benchmark:
    return Benchmark(name, name, 1, 0.0, label, source)


# Few problems: one answer to each says little. Beside k and temperature, DAPO (arXiv 2503.14476, section 4.1)
# has top_p 0.7 and SimpleRL-Zoo (arXiv 2503.18892, README) 0.95; 1 samples from the policy that is trained.
_AVG32 = "avg@32 at temperature 1: DAPO, SimpleRL-Zoo"
_AS_AIME = "as AIME 2024, for it has few problems too (ours)"
# evaluation/sh/eval.sh of QwenLM/Qwen2.5-Math: --temperature 0 --n_sampling 1 --top_p 1.
_QWEN = "greedy: Qwen2.5-Math's evaluation"

SUITES: dict[str, tuple[Benchmark, ...]] = {
    "math": (
        _sampled("aime24", "AIME 2024", _AVG32),
        _sampled("aime25", "AIME 2025", _AS_AIME),
        _sampled("aime26", "AIME 2026", _AS_AIME),
        _sampled("amc23", "AMC 2023", _AS_AIME),
        _greedy("math500", "MATH-500", f"{_QWEN}, there on all of MATH"),
        _greedy("minerva", "Minerva Math", _QWEN),
        _greedy("olympiadbench", "OlympiadBench", _QWEN),
        _greedy("gsm8k_test", "GSM8K", _QWEN),
        _greedy("gaokao2023en", "Gaokao 2023 En", _QWEN),
        _greedy("college_math", "College Math", _QWEN),
    )
}
"""Suite -> its benchmarks."""

BENCHMARKS = {benchmark.name: benchmark for suite in SUITES.values() for benchmark in suite}


def benchmarks_of(suite: str | list[SourceConfig]) -> tuple[Benchmark, ...]:
    """Find the benchmarks that a command names.

    Args:
      suite: suites, benchmarks and sources of problems, with commas between; or a list of them with settings
        of their own. A source is a file `*.jsonl`, `*.csv` or `*.parquet`, `gym:NAME`, `FILE.py`, `Org/Name`
        of the hub, or one of SOURCES; it is asked once, greedily.

    Raises:
      ConfigError: there is none of a name, two have the same one, or settings are given to what takes none.
    """
    if isinstance(suite, str):
        found = [benchmark for name in suite.split(",") for benchmark in _named(name.strip())]
    else:
        found = [benchmark for source in suite for benchmark in _with_columns(source)]
    if not found:
        raise ConfigError("suite is empty; name a benchmark or a source of problems")
    names = [benchmark.name for benchmark in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"suite {suite!r} has benchmark {name} twice; leave one out, or rename its file"
                if isinstance(suite, str)
                else f"the suite has benchmark {name} twice; leave one out, or rename its file"
            )
    return tuple(found)


def source_of(benchmark: Benchmark, file: str | None) -> SourceConfig:
    """The source of a benchmark's problems, with what was given of it.

    Args:
      benchmark: one of a suite.
      file: a copy of its data on this machine, read instead of the hub's.
    """
    source = judging_source(benchmark.dataset, file)
    if benchmark.columns is None:
        return source
    refuse_unread(benchmark.columns)
    given = {name: getattr(benchmark.columns, name) for name in _given(benchmark.columns)}
    return dataclasses.replace(source, **given)


def _given(source: SourceConfig) -> list[str]:
    """Names of the settings of a source that are not at their defaults."""
    plain = SourceConfig(source.name)
    return [
        field.name
        for field in dataclasses.fields(source)
        if getattr(source, field.name) != getattr(plain, field.name)
    ]


def _with_columns(source: SourceConfig) -> tuple[Benchmark, ...]:
    """The benchmarks of a name in a list; of one, with the settings that stand beside it."""
    found, given = _named(source.name), _given(source)
    if "weight" in given:
        raise ConfigError(f"{source.name} of the suite has a weight, which only training reads; leave it out")
    if not given:
        return found
    if len(found) > 1:
        raise ConfigError(f"{source.name} is a suite, and takes no {', '.join(given)}; list its benchmarks")
    return (dataclasses.replace(found[0], columns=source),)


def suites_table() -> str:
    """The benchmarks as a table for the page of evaluation."""
    rows = [
        f"| `{b.name}` | {b.label} | {b.samples} | {b.temperature:g} | {b.source} |"
        for b in BENCHMARKS.values()
    ]
    return "\n".join(["| name | benchmark | k | temperature | source |", "|---|---|---|---|---|", *rows])


def _named(name: str) -> tuple[Benchmark, ...]:
    if name in SUITES:
        return SUITES[name]
    if name in BENCHMARKS:
        return (BENCHMARKS[name],)
    is_file = name.endswith(FILES)
    if is_file or "/" in name or name.startswith("gym:") or name in SOURCES:
        short = PurePath(name).stem if is_file else name
        return (Benchmark(short, name, 1, 0.0, short, "one greedy answer (ours)"),)
    known = [*SUITES, *BENCHMARKS, *SOURCES]
    near = difflib.get_close_matches(name, known, 3, 0.5) or [*SUITES, *BENCHMARKS]
    raise ConfigError(
        f"there is no benchmark {name!r}; choose {', '.join(near)}, or a source as FILE.jsonl or gym:NAME"
    )
