"""What jax is told before it starts, in this process and in those that tests start. Imports no jax."""

import os
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# Compiled programs, for all processes of a run of the tests and for the next run.
COMPILED = REPOSITORY / ".pytest_cache" / "compiled"

# Nearly all the time of the tests is XLA compiling programs that run for milliseconds. Without these
# optimisations it takes a third as long. What is done to a program before code is made of it (fusion,
# sharding, layouts) stays as it is. `FR3E_TESTS_XLA=optimised` compiles as for users.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):
    # Later ones have no such choice, and XLA ends a process whose flags it does not know.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
OPTIMISED = os.environ.get("FR3E_TESTS_XLA", "") == "optimised"


def of_process(devices: int) -> dict[str, str]:
    """Environment variables of a process with so many CPU devices."""
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_cpu_multi_thread_eigen=false"]
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags if OPTIMISED else flags + QUICK),
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "HF_HUB_OFFLINE": "1",
    }
