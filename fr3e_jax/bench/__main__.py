"""The command line of the benchmarks: `python -m fr3e_jax.bench NAME`."""

import json
import sys

import jsonargparse

from fr3e_jax.bench.load import measure_loading
from fr3e_jax.bench.rollout import rollout
from fr3e_jax.bench.score import measure_scoring
from fr3e_jax.bench.update import update
from fr3e_jax.cli import fail
from fr3e_jax.config import ConfigError
from fr3e_jax.parallel.devices import leave_out_absent_tpu
from fr3e_jax.parallel.mesh import PlacementError


def main() -> None:
    """Run a benchmark: tables for people, and JSON on stdout."""
    leave_out_absent_tpu()
    arguments = [f"{argument}=true" if argument == "--json" else argument for argument in sys.argv[1:]]
    try:
        result = jsonargparse.auto_cli(
            {"load": measure_loading, "rollout": rollout, "score": measure_scoring, "update": update},
            args=arguments,
            as_positional=False,
            allow_abbrev=False,
            prog="python -m fr3e_jax.bench",
        )
    except (ConfigError, PlacementError) as error:
        fail("bench", error)
    for line in result:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
