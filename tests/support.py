"""What several test files need: tiny models, meshes of a part of the devices, subprocesses."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import REPOSITORY, of_process
from flax import nnx
from hypothesis import settings
from jax.sharding import AxisType, Mesh

from fr3e_jax.models.decoder import Params, abstract_params, graph_of, init_params, logical_axes
from fr3e_jax.models.hf import config_json, read_config
from fr3e_jax.models.qwen2 import Qwen2Config
from fr3e_jax.parallel.mesh import (
    BATCH_AXES,
    MESH_AXES,
    TRAINING_TABLE,
    Placement,
    place_model,
    table_placement,
)
from fr3e_jax.planning.topology import available
from fr3e_jax.pretrained.weights import read_params
from fr3e_jax.pretrained.write_weights import write_params
from fr3e_jax.run.checkpoints import assemble, read_items, with_arrays
from fr3e_jax.run.reporter import read_metrics
from fr3e_jax.run.saved import saved_at

needs_compiler = pytest.mark.skipif(not available(), reason="needs libtpu: pip install 'fr3e_jax[tpu]'")

# What a command may change of where jax keeps compiled programs.
COMPILATION = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)

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


# A run of the quickstart on few questions and steps, which takes seconds once it is compiled.
SMALL = [
    "--config=configs/quickstart.yaml",  # with other models and problems too
    "--steps=4",
    "--rollout.queries=8",
    "--explore.positions=2",
    "--explore.rollouts=4",
    "--optimizer.batch_states=8",
    "--optimizer.micro_tokens=512",
    "--data.held_out=32",
    "--evaluate.rows=32",
    "--evaluate.every=2",
    "--checkpoint.every=2",
]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Metrics of a run without what depends on the clock and the machine."""
    lines = read_metrics(directory)
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def tiny_params(config: Qwen2Config = TINY, scale: float = 4.0) -> Params:
    """Parameters large enough that distributions are far from uniform, biases included."""
    rng = np.random.default_rng(0)

    def leaf(x: jax.Array) -> np.ndarray:
        x = np.asarray(x) * (scale if x.ndim > 1 else 1.0)
        return x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)

    return jax.tree.map(leaf, init_params(config, 0))


def examples(count: int) -> settings:
    """So many examples of what takes long to try; three times as many where `FR3E_TESTS_EXAMPLES` is deep."""
    return settings(max_examples=count * (3 if settings.get_current_profile_name() == "deep" else 1))


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data x fsdp x tensor devices."""
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def placement(data: int = 1, fsdp: int = 1, tensor: int = 1, table=TRAINING_TABLE) -> Placement:
    """A placement of a model of the sizes of `TINY` over the first data x fsdp x tensor devices."""
    return table_placement(mesh_of(data, fsdp, tensor), table, {"kv_heads": TINY.num_key_value_heads})


def placed(params: Params, config: Qwen2Config, mesh: tuple[int, ...] = (1, 1, 1)) -> Params:
    """Parameters on a mesh, as training has them."""
    axes = logical_axes(config)
    training, _ = place_model(mesh_of(*mesh), axes, params)
    return jax.device_put(params, training.shardings(axes, params))


def read(directory: Path, mesh: tuple[int, ...] = (1, 1, 1), dtype=jnp.float32) -> Params:
    """The parameters of a checkpoint directory on a mesh."""
    config = read_config(directory)
    axes, shapes = logical_axes(config), abstract_params(config)
    training, _ = place_model(mesh_of(*mesh), axes, shapes)
    return read_params(directory, config, training.shardings(axes, shapes), dtype)


def write(directory: Path, config: Qwen2Config, params: Params, **options) -> Path:
    """A checkpoint directory with config.json and weights of host parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = jnp.dtype(options.get("dtype", jnp.float32)).name
    (directory / "config.json").write_text(json.dumps(config_json(config, [1], 0, dtype=dtype)))
    write_params(directory, placed(params, config), **options)
    return directory


def logits(
    config: Qwen2Config, params: Params, token, length=None, start=None, mesh: tuple[int, ...] = (1, 1, 1)
) -> np.ndarray:
    """float32 logits [rows, T, V] of rows of tokens, padded outside [start, length), on a mesh."""
    training, _ = place_model(mesh_of(*mesh), logical_axes(config), params)
    graph, size = graph_of(config), token.shape[1]
    length = np.full(len(token), size) if length is None else np.asarray(length)
    start = np.zeros(len(token), int) if start is None else np.asarray(start)

    @jax.jit
    def forward(params, *rows):
        model = nnx.merge(graph, params)

        def one(token, length, start):
            position = jnp.arange(size) - start
            hidden, _ = model(token, position, length, training.shard, start=start)
            return model.logits(hidden, training.shard)

        return jax.vmap(one, spmd_axis_name=BATCH_AXES)(*rows)

    return np.asarray(forward(params, *training.place_rows((np.asarray(token), length, start))))


def command(module: str, *arguments: str, devices: int = 1, cwd: Path | None = None, **variables: str):
    """Popen arguments of `python -m fr3e_jax.MODULE`, on `devices` CPU devices."""
    return {
        "args": [sys.executable, "-m", f"fr3e_jax.{module}", *map(str, arguments)],
        "env": {**os.environ, **of_process(devices), **variables},
        "cwd": cwd,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def run(module: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a command of the project to its end, in a process of its own."""
    return subprocess.run(**command(module, *arguments, **options), timeout=600)


def call(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command of the project to its end in this process, which has eight devices.

    It takes no seconds to start. What it changes of the process is put back: handlers of signals and the
    place of compiled programs.
    """
    main = importlib.import_module(f"fr3e_jax.{module}").main
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = {name: getattr(jax.config, name) for name in COMPILATION}
    out, error, code = io.StringIO(), io.StringIO(), None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *map(str, arguments)])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                main()
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in settings.items():
            jax.config.update(name, value)
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), error.getvalue())


@contextlib.contextmanager
def files_of_at_most(size):
    """No file grows beyond so many bytes, as `ulimit -f` has it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_port() -> int:
    """A port to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_processes(program: str, *arguments) -> None:
    """Run Python text in two processes of four CPU devices each, to their ends.

    Their arguments are those given, and then the port to meet at and the number of the process.
    """
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    variables = {**os.environ, **of_process(4), "PYTHONPATH": path}
    command = [sys.executable, "-c", program, *map(str, arguments), str(free_port())]
    pipes = {"text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, str(n)], env=variables, **pipes) for n in range(2)]
    try:
        errors = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)


def start_pair(module: str, *arguments: str) -> list[subprocess.Popen]:
    """Start a command as two processes of four CPU devices each, that run one program."""
    port = free_port()
    return [
        subprocess.Popen(
            **command(
                module,
                "--distributed.initialize",
                *arguments,
                devices=4,
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(number),
            )
        )
        for number in range(2)
    ]


def ends_of(processes: list[subprocess.Popen], timeout: float = 400) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(processes, told, strict=True)]


def whole_rows(bundles):
    """(token, length, start, old_logprob, advantage) of every row, what it follows in front."""
    for bundle in bundles:
        for chunk in bundle.chunks:
            parts = 1 if bundle.trunks is None else len(bundle.trunks.token)
            for i in np.flatnonzero(chunk.length > chunk.start):  # the others only fill a chunk up
                before = np.zeros(0, np.int32)
                if bundle.trunks is not None:
                    part, trunk = i // (len(chunk.token) // parts), chunk.trunk[i]
                    assert chunk.prefix[i] <= bundle.trunks.length[part, trunk]
                    before = bundle.trunks.token[part, trunk, : chunk.prefix[i]]
                yield (
                    np.concatenate([before, chunk.token[i]]),
                    len(before) + chunk.length[i],
                    len(before) + chunk.start[i],
                    np.pad(chunk.old_logprob[i], (len(before), 0)),
                    chunk.advantage[i],
                )


def square_arrays(text, size):
    """Types in a compiled program with two axes of at least `size`."""
    found = set(re.findall(r"\b[a-z]+\d*\[[\d,]+\]", text))
    return [x for x in found if sum(int(axis) >= size for axis in re.findall(r"\d+", x.split("[")[1])) > 1]


def changed(config, **settings):
    """A configuration with `section__key` (or `key`) replaced."""
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        if section:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **{key: value})
    return config


def differences(ours, theirs):
    """Settings of two configurations that differ, as `section.key` -> value of the first."""
    found = {}
    for field in dataclasses.fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if dataclasses.is_dataclass(one):
            found |= {f"{field.name}.{key}": value for key, value in differences(one, other).items()}
        elif one != other:
            found[field.name] = one
    return found


def settings_of(config_class, prefix=""):
    """(name as on the command line, type with its limits, class, field name) of every option."""
    types = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, name = types[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from settings_of(kind, f"{name}.")
        else:
            yield name, kind, config_class, field.name


def restored(directory, step, like):
    """(State, carried states, progress) of a checkpoint, in the layout of the state `like`."""
    saved = saved_at(directory, step)
    items = read_items(saved, like)
    saved.verify(items)
    return *assemble(items, like), with_arrays(saved.record.progress, items)
