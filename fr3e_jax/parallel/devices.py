"""The choice of accelerators that jax looks for."""

import glob
import os
from typing import NoReturn

import jax
from jax.extend.backend import register_backend_factory

TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Set by jax where it sees no TPU, and by libtpu wherever it is installed.
NO_SIGN = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")


def leave_out_absent_tpu() -> None:
    """Keep jax from starting the TPU library on a machine without a TPU, where it prints a stack trace.

    All other devices are found as before. Call it before jax looks for devices.
    """
    # jax sets jax_platforms where it sees a TPU on the PCI bus, and users set it to choose.
    if jax.config.jax_platforms or tpu_signs():  # type: ignore[attr-defined]
        return
    register_backend_factory("tpu", refuse_tpu, priority=300, fail_quietly=True)


def tpu_signs() -> list[str]:
    """List what hints at a TPU that jax did not see: device files, and environment variables."""
    files = [file for pattern in TPU_FILES for file in glob.glob(pattern)]
    return files + [name for name in os.environ if name.startswith("TPU_") and name not in NO_SIGN]


def refuse_tpu() -> NoReturn:
    """Fail in place of the TPU library, so that jax goes on with the other devices."""
    raise RuntimeError("this machine has no sign of a TPU; with JAX_PLATFORMS=tpu it is started all the same")
