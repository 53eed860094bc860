"""Studies: `python -m fr3e_jax.study configs/studies/quickstart.yaml --out DIR`."""

import sys

from fr3e_jax.cli import ending_in_one_line, parse
from fr3e_jax.config import ConfigError
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.mesh import PlacementError
from fr3e_jax.run.interruption import exiting_at_sigterm
from fr3e_jax.run.storage import StorageError
from fr3e_jax.study.command import StudyOptions, study, with_named_file


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    options, _ = parse(StudyOptions, "study", None, with_named_file(sys.argv[1:]))
    interrupted = f"interrupted; the same command with --out {options.out} goes on"
    mistakes = (ConfigError, PlacementError, CheckpointError)
    with ending_in_one_line("study", mistakes, (StorageError,), interrupted), exiting_at_sigterm():
        code = study(options)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
