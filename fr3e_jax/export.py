"""A run's model as a Hugging Face directory: `python -m fr3e_jax.export --run DIR --out DIR`.

Training writes the same at its end; this command does it for a run that is still going on, for an older
checkpoint, in another type, or on another machine.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from fr3e_jax.cli import one_line, parse, warn
from fr3e_jax.config import ConfigError, DistributedConfig, MeshConfig, check_options
from fr3e_jax.config.values import CountOrNone, Name, PositiveNumber
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import PlacementError, make_mesh
from fr3e_jax.pretrained.export import check_out, export_model
from fr3e_jax.run.storage import StorageError, in_bucket, location, writing
from fr3e_jax.run.trained import read_trained


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a run's model in the Hugging Face format: configuration, tokenizer, safetensors."""

    run: Name
    """Run directory, as --run_dir of train; it may be `gs://BUCKET/PATH`."""
    out: Name
    """Directory to write; it must not exist, or be empty."""
    model: Name | None = None
    """The model that the run started from, for configuration and tokenizer; by default where the run's
    config.yaml says."""
    step: CountOrNone | None = None
    """Checkpoint to write; by default the last one that is whole."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Training holds float32; bfloat16 halves the size and rounds to the nearest."""
    max_file_gb: PositiveNumber = 5.0
    """Most gigabytes (10^9 bytes) in a file of weights."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices that hold the parameters while they are written."""


def export(config: ExportConfig) -> Path:
    """Read the parameters of a checkpoint, on whatever mesh is here, and write them.

    Returns:
      The directory.

    Raises:
      ConfigError: the run directory holds no such checkpoint, or it is damaged, or `out` holds files.
      StorageError: the disk is full, or the checkpoint cannot be read now.
    """
    run, out = location(config.run), Path(config.out)
    if in_bucket(config.out):
        raise ConfigError(
            f"out {config.out} is in a bucket; write to a directory and copy that with `gcloud storage cp`"
        )
    check_out(out)
    check_options(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    trained = read_trained(run, config.step, config.model, Hosts(mesh, DistributedConfig().timeout))
    for line in trained.told:
        warn("export", line)
    size = int(config.max_file_gb * 10**9)
    with writing(location(config.out)):
        export_model(trained.model.source, out, trained.params, jnp.dtype(config.dtype), size)
    print(f"step {trained.step} of {run}, {config.dtype}: model in {out}")
    return out


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, _ = parse(ExportConfig, "export", None)
    mistakes = (ConfigError, PlacementError, CheckpointError)
    # An OSError is one of the disk, which may be full.
    with one_line("export", mistakes, (OSError, StorageError), "interrupted; --out was not written"):
        export(config)


if __name__ == "__main__":
    main()
