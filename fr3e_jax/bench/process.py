"""A process of its own for every measurement."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from typing import Any


def measure(function: Callable[..., Any], *arguments: Any, devices: int) -> Any:
    """Call a function in a fresh process with `devices` CPU devices, and return what it returns."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=fresh) as pool:
        return pool.submit(function, *arguments).result()
