"""How tests run: eight CPU devices for each, strict, one worker a core, long modules first."""

import collections
import os

import environment

# As a pod has many; single-device programs take the first.
os.environ.update(environment.of_process(devices=8))

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module_go_with_it():
    """Each compiled program maps memory, and a process that has too many maps is aborted."""
    yield
    jax.clear_caches()
