"""The page of runs: `python -m fr3e_jax.view RUN [RUN2 ...] [--out page.html | --serve]`."""

import sys

from fr3e_jax.cli import ending_in_one_line, parse, warn
from fr3e_jax.config import ConfigError
from fr3e_jax.run.storage import StorageError
from fr3e_jax.view.command import ViewOptions, view, with_named_runs


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    options, _ = parse(ViewOptions, "view", None, with_named_runs(sys.argv[1:]))
    with ending_in_one_line("view", (ConfigError,), (StorageError,)):
        view(options, lambda line: print(line, flush=True), lambda line: warn("view", line))


if __name__ == "__main__":
    main()
