"""Two real processes with four devices each: each reads what its devices hold, and one writes."""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support import TINY, tiny_params, two_processes, write

from fr3e_jax.pretrained.safetensors_files import INDEX_FILE

CONFIG = dataclasses.replace(TINY, tie_word_embeddings=False)

PROCESS = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, Mesh

directory, root, port, number = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))

from fr3e_jax.pretrained import weights, write_weights
from fr3e_jax.pretrained.export import export_model
from fr3e_jax.models.hf import read_config
from fr3e_jax.models.decoder import abstract_params, logical_axes
from fr3e_jax.parallel.mesh import MESH_AXES, place_model
from test_two_processes import MESHES

seen, written = [], []
read_tensor, save_file = weights.Source.read_tensor, write_weights.save_file
def counting(self, *arguments):
    piece = read_tensor(self, *arguments)
    seen.append(piece.size)
    return piece
def noting(tensors, file, **options):
    written.append(file.name)
    save_file(tensors, file, **options)
weights.Source.read_tensor, write_weights.save_file = counting, noting

config = read_config(Path(directory))
axes, shapes = logical_axes(config), abstract_params(config)
for sizes in MESHES:
    seen.clear()
    written.clear()
    out = Path(root) / "-".join(map(str, sizes))
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    training, _ = place_model(mesh, axes, shapes)
    params = weights.read_params(Path(directory), config, training.shardings(axes, shapes))
    held = 0
    for leaf in jax.tree.leaves(params):
        assert not leaf.is_fully_addressable
        held += sum({str(shard.index): shard.data.size for shard in leaf.addressable_shards}.values())
    export_model(Path(directory), out, params, max_file_bytes=20_000)
    found = {"read": sum(seen), "held": held, "written": written, "seen_after": out.is_dir()}
    Path(f"{out}.{number}.json").write_text(json.dumps(found))
"""


MESHES = [(1, 8, 1), (2, 2, 2), (1, 2, 4)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A checkpoint, and where two processes exported it from each mesh."""
    root = tmp_path_factory.mktemp("two")
    directory = write(root / "model", CONFIG, tiny_params(CONFIG), max_file_bytes=20_000)
    (directory / "tokenizer_config.json").write_text('{"eos_token": null}')
    two_processes(PROCESS, directory, root)
    return directory, root


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_each_process_reads_what_it_holds_and_one_writes_it_all(exports, sizes):
    directory, out = exports[0], exports[1] / "-".join(map(str, sizes))
    first, second = (json.loads(Path(f"{out}.{number}.json").read_text()) for number in range(2))
    whole = sum(x.size for _, x in all_tensors(directory))
    for process in (first, second):
        assert process["read"] == process["held"]
        assert process["seen_after"]  # nobody goes on before the directory is whole
    if sizes == (1, 8, 1):
        assert max(first["read"], second["read"]) < 0.52 * whole  # half, and the norms and biases
    assert second["written"] == []
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert sorted(first["written"]) == files and len(files) > 3
    assert (out / INDEX_FILE).is_file()
    ours, theirs = dict(all_tensors(out)), dict(all_tensors(directory))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not out.with_suffix(".tmp").exists()


def all_tensors(directory: Path):
    for file in directory.glob("*.safetensors"):
        yield from load_file(file).items()
