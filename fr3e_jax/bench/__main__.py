"""The command line of the benchmarks: `python -m fr3e_jax.bench NAME`."""

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import jsonargparse

from fr3e_jax.bench.adaptive import measure_adaptive
from fr3e_jax.bench.load import measure_loading
from fr3e_jax.bench.record import measure_recording
from fr3e_jax.bench.rollout import rollout
from fr3e_jax.bench.rounds import measure_rounds
from fr3e_jax.bench.score import measure_scoring
from fr3e_jax.bench.update import update
from fr3e_jax.cli import ending_in_one_line, plain_error
from fr3e_jax.config import ConfigError
from fr3e_jax.config.checks import check_value
from fr3e_jax.config.values import nearest, unknown_option
from fr3e_jax.parallel.devices import leave_out_absent_tpu
from fr3e_jax.parallel.mesh import PlacementError

BENCHMARK_FUNCTIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "adaptive": measure_adaptive,
    "load": measure_loading,
    "record": measure_recording,
    "rollout": rollout,
    "round": measure_rounds,
    "score": measure_scoring,
    "update": update,
}


def checking_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it refuses arguments that are not of the types of its parameters."""
    kinds = get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def call(**options: Any) -> Any:
        for name, value in options.items():
            check_value(kinds[name], value, (name,))
        return function(**options)

    return call


def refuse_unknown_benchmark(arguments: Sequence[str]) -> None:
    """Refuse a benchmark, or an option of one, that does not exist.

    Raises:
      ConfigError: it names the nearest one.
    """
    if not arguments:
        raise ConfigError(f"name a benchmark: {', '.join(BENCHMARK_FUNCTIONS)}")
    if arguments[0].startswith("-"):
        return
    name, *options = arguments
    if name not in BENCHMARK_FUNCTIONS:
        near = nearest(name, BENCHMARK_FUNCTIONS)
        meant = f"did you mean {near}?" if near else f"choose one of {', '.join(BENCHMARK_FUNCTIONS)}"
        raise ConfigError(f"there is no benchmark {name}; {meant}")
    known = [*inspect.signature(BENCHMARK_FUNCTIONS[name]).parameters, "help"]
    for option in options:
        given = option.removeprefix("--").partition("=")[0]
        if option.startswith("--") and given not in known:
            raise ConfigError(unknown_option(given, known, "--"))


def run_benchmark(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run the benchmark that the arguments name.

    Returns:
      What is printed as JSON, an object a line.

    Raises:
      ConfigError: a benchmark or an option does not exist, or does not take its value.
    """
    refuse_unknown_benchmark(arguments)
    kinds = (
        get_type_hints(BENCHMARK_FUNCTIONS[arguments[0]])
        if arguments and arguments[0] in BENCHMARK_FUNCTIONS
        else {}
    )
    try:
        return jsonargparse.auto_cli(  # type: ignore[no-any-return]
            {name: checking_types(function) for name, function in BENCHMARK_FUNCTIONS.items()},
            args=[f"{argument}=true" if argument == "--json" else argument for argument in arguments],
            as_positional=False,
            allow_abbrev=False,
            exit_on_error=False,
            prog="python -m fr3e_jax.bench",
        )
    except jsonargparse.ArgumentError as error:
        raise ConfigError(plain_error(kinds, str(error))) from None


def main() -> None:
    """Run a benchmark: tables for people, and JSON on stdout."""
    leave_out_absent_tpu()
    with ending_in_one_line("bench", (ConfigError, PlacementError)):
        for line in run_benchmark(sys.argv[1:]):
            print(json.dumps(line))


if __name__ == "__main__":
    main()
