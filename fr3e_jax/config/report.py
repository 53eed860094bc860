"""The options of reports that go to other programs than this one."""

import dataclasses
from typing import Literal

from fr3e_jax.config.values import Name

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Where the metrics of each step and a sampled state go, beside metrics.jsonl and samples.jsonl."""

    to: list[TrackerName] = dataclasses.field(default_factory=list)
    """`tensorboard`: event files in RUN/tensorboard. `wandb`, `trackio`: these trackers, with the keys of the
    environment. Each is an extra of the package, and runs in a process of its own. One that fails, hangs or
    has no network is given up with a warning, and the run goes on."""
    project: Name = "fr3e_jax"
    """Project of wandb and trackio that the run is shown in."""
    name: Name | None = None
    """Name that it is shown by; default: that of its directory."""
