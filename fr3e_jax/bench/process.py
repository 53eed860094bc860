"""A fresh process for every measurement, and the programs that jax compiles in it."""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

COMPILATION = "/jax/core/compile/backend_compile_duration"
"""The event of jax for every program that it compiles, or takes from its cache on disk."""


def in_fresh_process(function: Callable[..., Any], *arguments: Any, devices: int) -> Any:
    """Call a function in a new process with `devices` CPU devices, and return what it returns."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=fresh) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def compilations(*functions: str) -> Iterator[list[str]]:
    """Collect which of some jitted functions are compiled in this block: a name for each program.

    The cache of a jitted function holds more: an entry for every call signature, of which several may share
    a program.

    Args:
      functions: their names.
    """
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILATION:
            compiled.extend(name for name in functions if about.get("fun_name") == f"jit({name})")

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
