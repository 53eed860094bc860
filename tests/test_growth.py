"""What a step leaves behind in memory: nothing but programs for shapes that had not come before."""

import json
import os
import subprocess
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from environment import of_process
from scipy.stats import theilslopes
from support import SMALL

STEPS, SETTLED = 40, 10  # the first steps compile most programs, and fill caches

# In a process of its own, since what a worker holds of other tests comes and goes meanwhile.
MEASURED = """
import ctypes, gc, json, sys
from pathlib import Path
import jax
from fr3e_jax import train
out, *sys.argv[1:] = sys.argv[1:]
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

train.train_step = measuring
jax.monitoring.register_event_duration_secs_listener(counting)
train.main()
Path(out).write_text(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_steps(tmp_path):
    flags = [*SMALL, f"--steps={STEPS}", "--evaluate.every=10", "--checkpoint.every=10"]
    program = [sys.executable, "-c", MEASURED, tmp_path / "seen.json", *flags, "--run_dir", tmp_path / "run"]
    done = subprocess.run(
        program, env={**os.environ, **of_process(8)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())[SETTLED:]
    assert len({arrays for _, arrays, _, _ in seen}) == 1, seen
    # The longest stretch in which nothing was compiled; evaluations and saves are in it.
    quiet = max((list(steps) for _, steps in groupby(seen, key=itemgetter(2))), key=len)
    assert len(quiet) >= 15, [programs for _, _, programs, _ in seen]
    # Single steps differ by tens of megabytes, either way: a leak is a slope. Allocators still settle here.
    resident = [megabytes for megabytes, *_ in quiet]
    objects = np.median(np.diff([count for *_, count in quiet]))
    assert theilslopes(resident)[0] < 3.0 and objects < 20, quiet
