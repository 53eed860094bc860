"""Eight CPU devices for every test, as a pod has many; single-device programs take the first."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module_go_with_it():
    """Each compiled program maps memory, and a process that has too many maps is aborted."""
    yield
    jax.clear_caches()
