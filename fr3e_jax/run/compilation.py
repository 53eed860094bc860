"""Compiled programs on disk, so that a run that is started again does not compile them again."""

import os
from pathlib import Path

import jax

from fr3e_jax.run.storage import absolute, in_bucket, location

ENVIRONMENT = "JAX_COMPILATION_CACHE_DIR"


def keep_compiled(setting: str, run_dir: str | None) -> str | None:
    """Keep the programs that jax compiles from now on, and use those that are kept already.

    Args:
      setting: a directory or a place in a bucket; `off`; `auto`: what `JAX_COMPILATION_CACHE_DIR` says, else
        beside a run directory in a bucket, which all hosts and the next machine see, else in the cache of the
        user.
      run_dir: of the run.

    Returns:
      The directory or place in a bucket; None where none are kept.

    Raises:
      ConfigError: a bucket that cannot be reached from here.
    """
    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if setting != "auto":
        place = str(absolute(location(setting)))
    elif os.environ.get(ENVIRONMENT):
        place = str(location(os.environ[ENVIRONMENT]))
    elif run_dir is not None and in_bucket(run_dir):
        place = str(location(run_dir).parent / "compiled")
    else:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        place = str(Path(user) / "fr3e_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", place)
    # jax leaves out what compiles in less than a second, and a run has many of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return place
