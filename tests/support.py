"""What several test files need: tiny models, meshes of a part of the devices, subprocesses."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fr3e_jax.models.qwen2 import Params, Qwen2Config, init_params
from fr3e_jax.parallel.mesh import MESH_AXES, TRAINING_TABLE, Placement

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

COMPILED = tempfile.TemporaryDirectory(prefix="fr3e_jax_compiled_")

TINY = Qwen2Config(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)


def tiny_params(config: Qwen2Config = TINY, scale: float = 4.0) -> Params:
    """Parameters large enough that distributions are far from uniform, biases included."""
    rng = np.random.default_rng(0)

    def leaf(x: jax.Array) -> np.ndarray:
        x = np.asarray(x) * (scale if x.ndim > 1 else 1.0)
        return x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)

    return jax.tree.map(leaf, init_params(config, 0))


def placement(data: int = 1, fsdp: int = 1, tensor: int = 1, table=TRAINING_TABLE) -> Placement:
    """A placement over the first data x fsdp x tensor devices."""
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Placement(Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3), table)


def command(module: str, *arguments: str, devices: int = 1, cwd: Path | None = None, **environment: str):
    """Popen arguments of `python -m fr3e_jax.MODULE`, on `devices` CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Many tests run the same programs: each is compiled once a test run.
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    return {
        "args": [sys.executable, "-m", f"fr3e_jax.{module}", *map(str, arguments)],
        "env": environment,
        "cwd": cwd,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def run(module: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a command of the project to its end."""
    return subprocess.run(**command(module, *arguments, **options), timeout=600)
