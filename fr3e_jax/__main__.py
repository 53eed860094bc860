"""The commands, each with a line: `python -m fr3e_jax`, or `fr3e`. `fr3e COMMAND ...` runs one.

It imports nothing but the command that is asked for, so that the list is there at once.
"""

import collections
import difflib
import importlib
import importlib.metadata
import sys

COMMANDS = {
    "train": "train a model with FR3E, or with grpo or grpo++",
    "sft": "teach a model the worked solutions of a task, before it is trained",
    "evaluate": "score models on benchmarks, and compare two of them",
    "generate": "ask a model, and read its answer as it is written",
    "export": "write the model of a checkpoint as a Hugging Face directory",
    "plan": "say what a run takes on given devices, before it is started there",
    "study": "run arms x tasks x seeds, and say with intervals which arm is better",
    "view": "show runs on a page: their numbers, and every rollout that was kept",
    "bench": "measure rollouts, updates, scorers and loading on this machine",
}
"""Name -> what it does. The command is the module `fr3e_jax.NAME`, or a package's `__main__`."""

MODULES = {
    "bench": "fr3e_jax.bench.__main__",
    "study": "fr3e_jax.study.__main__",
    "view": "fr3e_jax.view.__main__",
}


def usage() -> str:
    """The list of commands, for people."""
    lines = [
        "usage: fr3e COMMAND [--key VALUE ...], or python -m fr3e_jax.COMMAND [--key VALUE ...]",
        "",
        *(f"  {name:<10} {line}" for name, line in COMMANDS.items()),
        "",
        "  --version  versions of fr3e_jax and jax, and the devices that jax finds",
        "",
        "fr3e COMMAND --help lists the settings of a command.",
    ]
    return "\n".join(lines)


def version() -> str:
    """Versions and devices, for reports: one line each."""
    lines = [f"{name} {version_of(name)}" for name in ("fr3e_jax", "jax", "jaxlib")]
    return "\n".join([*lines, f"devices: {devices()}"])


def version_of(distribution: str) -> str:
    """The version that is installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return "(not installed)"


def devices() -> str:
    """The devices that jax finds, how many of each kind; or why it finds none."""
    import jax

    from fr3e_jax.parallel.devices import leave_out_absent_tpu

    leave_out_absent_tpu()
    try:
        kinds = collections.Counter(device.device_kind for device in jax.devices())
    except RuntimeError as error:
        return f"none ({' '.join(str(error).split())})"
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def refusal(name: str) -> str:
    """What is wrong with a first argument that is neither a command nor an option here."""
    near = difflib.get_close_matches(name, [*COMMANDS, "--version", "--help"], n=1)
    meant = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    return f"fr3e_jax: error: there is no {'option' if name.startswith('-') else 'command'} {name!r}; {meant}"


def main() -> None:
    """Run the command of the first argument; a wrong one is one line and exit code 2."""
    name, *others = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
    elif name == "--version":
        print(version())
    elif name in COMMANDS:
        sys.argv = [f"{sys.argv[0]} {name}", *others]
        importlib.import_module(MODULES.get(name, f"fr3e_jax.{name}")).main()
    else:
        print(refusal(name), file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
