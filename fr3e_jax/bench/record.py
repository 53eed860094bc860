"""What it costs to keep every rollout: the time that recording takes of training steps."""

import tempfile
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, resolve, rows_of_state
from fr3e_jax.config.values import Count, Name
from fr3e_jax.learner import groups
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.run.build import build, mesh_of
from fr3e_jax.run.rollout_files import steps_in
from fr3e_jax.run.saved import Progress
from fr3e_jax.run.step_progress import StepProgress
from fr3e_jax.step.record import open_recorder
from fr3e_jax.step.update import train_step


def measure_recording(
    config: Name = "configs/quickstart.yaml", steps: Count = 6, json: bool = False
) -> list[dict[str, Any]]:
    """Measure what recording takes of training steps: the seconds that a step spends on it, and its thread's.

    Of the thread CPU time is counted. The sum is an upper bound: the thread works while the devices do.

    Args:
      config: file of the run whose steps are taken.
      steps: that are measured, behind one that compiles.
      json: print an object a line instead of a table.

    Returns:
      What is printed, an object a line.

    Raises:
      ConfigError: none of the steps is recorded.
    """
    settings, _ = parse(Config, "train", config, [f"--config={config}"])
    lines = recorded_steps(resolve(settings), steps)
    if not lines:
        raise ConfigError(f"{config}: no rollouts are recorded in {steps} steps; set record.every to 1")
    seconds, spent, thread = (sum(line[name] for line in lines) for name in ("seconds", "spent", "thread"))
    ratio = (spent + thread) / seconds
    if json:
        return [*lines, {"ratios": {"record_vs_step": ratio}}]
    table = Table(title=f"recording takes {ratio:.2%} of the steps' time")
    for name in lines[0]:
        table.add_column(name, justify="right")
    for line in lines:
        numbers = (f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" for value in line.values())
        table.add_row(*numbers)
    Console().print(table)
    return []


def recorded_steps(config: Config, steps: int) -> list[dict[str, Any]]:
    """Take steps behind a first one, and measure those that are recorded: an object each.

    Args:
      config: resolved.
      steps: behind the first.
    """
    parts = build(config, Hosts(mesh_of(config.mesh), config.distributed.timeout))
    state, progress = parts.policy.fresh_state(parts.learner), Progress(seed=config.seed)
    sizes = rows_of_state(config), config.rollout.max_prompt, config.rollout.max_response
    carried, shown, lines = groups.empty_groups(*sizes), StepProgress(lambda line: None), []
    with tempfile.TemporaryDirectory() as run:
        opened = open_recorder(config.record, run, 0, parts.verifier.hosts, parts.text, print)
        with opened as recorder:
            assert recorder.files is not None
            for step in range(1, 2 + steps):
                before = recorder.files.thread.submit(time.thread_time).result()
                given = parts, None, state, carried, progress, shown, recorder
                state, carried, progress, metrics, _ = train_step(config, *given)
                recorder.settle()
                after = recorder.files.thread.submit(time.thread_time).result()
                written = steps_in(recorder.files.folder).get(step)
                if step > 1 and written is not None:
                    line = {"step": step, "seconds": metrics["time/step"], "spent": metrics["time/record"]}
                    line |= {"thread": after - before, "tokens": metrics["tokens/generated"]}
                    lines.append(line | {"bytes": written.stat().length})
    parts.verifier.pool.close()
    return lines
