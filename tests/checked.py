"""Importing this has the annotations of the package checked: beartype, and jaxtyping for shapes and dtypes.

It comes before anything of the package is imported, and imports no jax. An axis has one size within a call:
two arguments that are annotated "N J" and " N" have as many rows. Under jit the check is of what is traced,
so that it costs nothing when the program runs. Processes that tests start check nothing.
"""

from jaxtyping import install_import_hook

ROOMS = ("algorithm", "cost", "engine", "learner", "library", "models", "parallel", "step", "types")
CHECKED = [f"fr3e_jax.{name}" for name in ROOMS]

# As for type checkers, an int is good for a float.
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
