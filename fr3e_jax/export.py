"""A model as a Hugging Face directory: `python -m fr3e_jax.export --run DIR --out DIR`.

Training writes the same at its end. This command does it for a run that is still going on, for an older
checkpoint, in another dtype, or on another machine. `--model` takes a run too, or a Hugging Face directory or
a name on the hub, whose weights are then converted and split into files anew.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from fr3e_jax.cli import ending_in_one_line, parse, warn
from fr3e_jax.config import ConfigError, DevicesConfig, DistributedConfig, check_options
from fr3e_jax.config.values import Name, NonNegativeInt, PositiveNumber
from fr3e_jax.models.decoder import Params
from fr3e_jax.models.hf import CheckpointError
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.parallel.mesh import PlacementError
from fr3e_jax.pretrained.export import check_out, export_model
from fr3e_jax.pretrained.model import PlacedModel, open_model
from fr3e_jax.run.build import mesh_of
from fr3e_jax.run.run_dir import holds_run
from fr3e_jax.run.storage import StorageError, in_bucket, location, writing
from fr3e_jax.run.trained import read_trained


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a model in the Hugging Face format: configuration, tokenizer, safetensors."""

    out: Name
    """Directory to write; it must not exist, or be empty."""
    run: Name | None = None
    """Run directory, as --run_dir of train; it may be `gs://BUCKET/PATH`."""
    model: Name | None = None
    """Without --run, what to write: a run directory, a Hugging Face directory, a name on the hub (`Org/Name`
    or `Org/Name@REVISION`), or `quickstart`. With --run, the model that the run started from, for
    configuration and tokenizer; by default where the run's config.yaml says."""
    step: NonNegativeInt | None = None
    """Checkpoint of a run to write; by default the last one that is whole."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights. Training holds float32; bfloat16 halves the size and rounds to the nearest."""
    max_file_gb: PositiveNumber = 5.0
    """Most gigabytes (10^9 bytes) in a file of weights."""
    mesh: DevicesConfig = dataclasses.field(default_factory=DevicesConfig)
    """Devices that hold the parameters while they are written."""


def export(config: ExportConfig) -> Path:
    """Read the parameters, on whatever mesh is here, and write them.

    Returns:
      The directory.

    Raises:
      ConfigError: there is no such model or checkpoint, the checkpoint is damaged, or `out` holds files.
      CheckpointError: the Hugging Face directory cannot be read.
      StorageError: the disk is full, or the checkpoint cannot be read now.
    """
    out = Path(config.out)
    if in_bucket(config.out):
        raise ConfigError(
            f"out {config.out} is in a bucket; write to a directory and copy that with `gcloud storage cp`"
        )
    check_out(out)
    check_options(config)
    mesh = mesh_of(config.mesh)
    model, params, name = read_model(config, mesh)
    size = int(config.max_file_gb * 10**9)
    with writing(location(config.out)):
        export_model(model.source, out, params, jnp.dtype(config.dtype), size)
    print(f"{name}, {config.dtype}: model in {out}")
    return out


def read_model(config: ExportConfig, mesh: Mesh) -> tuple[PlacedModel, Params, str]:
    """The model that is asked for, with its parameters, and a name for it in messages.

    Raises:
      ConfigError, CheckpointError, StorageError: as `export`.
    """
    run = config.run
    if run is None and config.model is not None and holds_run(location(config.model)):
        run = config.model
    if run is not None:
        base = config.model if run == config.run else None
        hosts = Hosts(mesh, DistributedConfig().timeout)
        trained = read_trained(location(run), config.step, base, hosts)
        for line in trained.messages:
            warn("export", line)
        return trained.model, trained.params, f"step {trained.step} of {run}"
    if config.model is None:
        raise ConfigError("--run or --model says what to write: a run, a Hugging Face directory or a name")
    if config.step is not None:
        raise ConfigError(f"--step is for runs, and {config.model} is none; leave it out")
    model = open_model(config.model).place(mesh)
    return model, model.read_params(model.training), config.model


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, _ = parse(ExportConfig, "export", None)
    mistakes = (ConfigError, PlacementError, CheckpointError)
    # An OSError is one of the disk, which may be full.
    with ending_in_one_line(
        "export", mistakes, (OSError, StorageError), "interrupted; --out was not written"
    ):
        export(config)


if __name__ == "__main__":
    main()
