"""What a step leaves behind in memory: nothing but programs for shapes that had not come before."""

import ctypes
import gc
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from support import SMALL, call

from fr3e_jax import train

STEPS, SETTLED = 40, 10  # the first steps compile most programs, and fill caches


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_steps(tmp_path, monkeypatch):
    programs, seen, step = [], [], train.train_step

    def counting(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            programs.append(name)

    def measuring(*arguments):
        result = step(*arguments)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else it counts what malloc holds for later
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        seen.append((resident, len(jax.live_arrays()), len(programs), len(gc.get_objects())))
        return result

    monkeypatch.setattr(train, "train_step", measuring)
    jax.monitoring.register_event_duration_secs_listener(counting)
    try:
        more = [f"--steps={STEPS}", "--evaluate.every=10", "--checkpoint.every=10"]
        done = call("train", *SMALL, *more, "--run_dir", tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(counting)
    assert done.returncode == 0, done.stderr
    seen = seen[SETTLED:]
    assert len({arrays for _, arrays, _, _ in seen}) == 1, seen
    # Where nothing was compiled, or is new to a cache; evaluations and saves are among these steps.
    quiet = np.array([(b[0] - a[0], b[3] - a[3]) for a, b in pairwise(seen) if a[2] == b[2]])
    assert len(quiet) >= 5
    # What a worker holds of other tests comes and goes by megabytes from step to step: a leak adds up.
    megabytes, objects = np.mean(quiet[:, 0]), np.median(quiet[:, 1])
    assert megabytes < 3.0 and objects < 20, quiet.tolist()
