"""Whether a run fits a slice of TPUs, and how long its steps take: `python -m fr3e_jax.plan --config
configs/slices/qwen2.5_7b_v5e16.yaml --topology v5e-16`.

Every program of a step is compiled for the slice, on any Linux machine with libtpu (`pip install
'fr3e_jax[tpu]'`) and without a TPU, in minutes. `--quick` estimates by arithmetic in seconds. The exit code
is 0 where the run fits, 1 where it does not, 2 for a mistake in the settings, 3 where the compiler fails for
another reason than memory.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

import jax
from rich.console import Console

from fr3e_jax.cli import ending_in_one_line, fail, parse
from fr3e_jax.config import Config, ConfigError, check_options
from fr3e_jax.config.values import Name, NonNegativeNumber
from fr3e_jax.models.decoder import DecoderConfig
from fr3e_jax.models.hf import CheckpointError, read_config
from fr3e_jax.models.presets import PRESETS
from fr3e_jax.parallel.mesh import PlacementError
from fr3e_jax.planning.as_json import as_json
from fr3e_jax.planning.fit import Plan
from fr3e_jax.planning.make import Question, compiled_plan, quick_plan
from fr3e_jax.planning.show import MARKDOWN_HEAD, markdown_row, show_plan
from fr3e_jax.planning.workload import Assumptions
from fr3e_jax.pretrained.hub import local_model

PLANS = {
    "qwen2.5_0.5b_v5e1": "v5e-1",
    "qwen2.5_0.5b_v5e8": "v5e-8",
    "qwen2.5_1.5b_v5e8": "v5e-8",
    "qwen2.5_7b_v5e16": "v5e-16",
    "qwen2.5_7b_v5p16": "v5p-16",
    "qwen2.5_math_7b_v5e16": "v5e-16",
    "qwen2.5_math_7b_v5p16": "v5p-16",
    "qwen2.5_7b_16k_v5p16": "v5p-16",
    "qwen2.5_14b_v6e16": "v6e-16",
    "qwen2.5_32b_v5p128": "v5p-128",
    "qwen2.5_32b_v5e256": "v5e-256",
    "qwen2.5_72b_v5p256": "v5p-256",
}
"""The shipped configurations that are planned -> the slice that each is for."""


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """Compile a step's programs for a slice of TPUs, without one, and say what they need. The options of
    training are taken too.
    """

    topology: Name | None = None
    """The slice as it is rented, such as v5litepod-16, v5e-16, v5p-128, v6e-256, v4-64, or as jax has it,
    such as v5p:2x2x1."""
    quick: bool = False
    """Estimate by arithmetic in seconds, and compile nothing: it needs no libtpu, and it is less exact."""
    peak: bool = False
    """Compile only the programs that may not fit by the estimate, and estimate the others: it says whether
    the run fits in a fraction of the time, and not how long a step takes."""
    json: bool = False
    """Print one object instead of tables."""
    markdown: bool = False
    """Print rows of the table in fr3e_jax/planning/README.md instead."""
    all: bool = False
    """Plan all shipped configurations, each for its slice: an hour or more, or half a minute with --quick."""
    price_per_chip_hour: NonNegativeNumber | None = None
    """In any currency; the cost of 1,000 steps is given in it."""
    assume: Assumptions = dataclasses.field(default_factory=Assumptions)
    """Numbers that cannot be known before the run."""


def model_of(name: str) -> DecoderConfig:
    """The architecture of a model, without a look at the hub.

    Args:
      name: as `model.path`.

    Raises:
      ConfigError: it is neither a directory nor a model whose architecture is known.
      CheckpointError: its config.json is not one of a supported model.
    """
    repository = name.partition("@")[0]
    for preset in PRESETS.values():
        if repository in preset.checkpoints:
            return preset.config
    if (directory := local_model(name)) is not None:
        return read_config(directory)
    known = [preset.checkpoints[0] for preset in PRESETS.values()]
    raise ConfigError(
        f"model.path {name!r} is no directory, and its shape is not known here; known are "
        f"{', '.join(known)} and their variants"
    )


def questions(options: PlanConfig, name: str) -> Iterator[Question]:
    """The plans that are asked for: of one configuration, or with `--all` of all shipped ones.

    Raises:
      ConfigError: there is no slice, an option is out of range, or options exclude each other.
    """
    check_options(options)
    if options.quick and options.peak:
        raise ConfigError("--quick compiles nothing, and --peak compiles some programs; choose one of them")
    if options.all:
        for shipped, topology in PLANS.items():
            config, _ = parse(Config, "plan", f"configs/slices/{shipped}.yaml", [], lambda _: None)
            yield question(options, shipped, config, topology)
        return
    if options.topology is None:
        raise ConfigError("--topology says for which slice: v5e-16, v5p-128, ...")
    config = Config(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Config)})
    yield question(options, name, config, options.topology)


def question(options: PlanConfig, name: str, config: Config, topology: str) -> Question:
    """The question whether a configuration fits a slice."""
    model = model_of(config.model.path)
    return Question(name, config, model, topology, options.assume, options.price_per_chip_hour)


def print_plan(plan: Plan, options: PlanConfig, first: bool) -> None:
    """Print a plan as an object, as a row of a table, or for people.

    Args:
      first: whether it is the first, before which a table has its head.
    """
    if options.json:
        print(json.dumps(as_json(plan)), flush=True)
    elif options.markdown:
        print("\n".join([*(MARKDOWN_HEAD if first else ()), markdown_row(plan)]), flush=True)
    else:
        show_plan(plan, Console(width=None if sys.stdout.isatty() else 160))


def main() -> None:
    """Parse the command line, compile, report; a user's mistake is one line and exit code 2."""
    applied: list[str] = []
    options, name = parse(PlanConfig, "plan", "configs/quickstart.yaml", None, applied.append)
    all_fit, console = True, Console(stderr=True)
    with ending_in_one_line("plan", (ConfigError, PlacementError, CheckpointError)):
        try:
            for number, asked in enumerate(questions(options, name)):
                plan = quick_plan(asked) if options.quick else compiled_plan(asked, console, options.peak)
                all_fit &= plan.fits
                if number == 0 and not options.all:
                    print(*applied, file=sys.stderr)
                print_plan(plan, options, first=number == 0)
        except jax.errors.JaxRuntimeError as error:
            fail("plan", f"the compiler failed: {error}", 3)
    raise SystemExit(0 if all_fit else 1)


if __name__ == "__main__":
    main()
