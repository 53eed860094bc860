"""Stands in for `python -m fr3e_jax.train` in tests of studies: a run directory in milliseconds.

The accuracies are a function of the settings. A run with 5 rollouts fails after its first step, one with 7 is
refused the first time, as where another process is at it. Imports no jax.
"""

import json
import sys
from pathlib import Path

import yaml


def main() -> None:
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    settings = yaml.safe_load(Path(arguments["--config"]).read_text())
    directory, rollouts = Path(arguments["--run_dir"]), settings.get("explore", {}).get("rollouts", 8)
    rate = settings.get("optimizer", {}).get("learning_rate", 2e-6)
    refused = directory.with_suffix(".refused")
    if rollouts == 7 and not refused.exists():
        refused.parent.mkdir(parents=True, exist_ok=True)
        refused.touch()
        sys.exit(refuse(directory))
    (directory / "model").mkdir(parents=True, exist_ok=True)
    (directory / "model" / "config.json").write_text("{}")
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": {"export_dtype": "float32"}, **settings}))
    with (directory / "starts").open("a") as starts:
        starts.write("one\n")
    gain = 0.1 * (1 + (rollouts == 8)) + 0.01 * settings.get("seed", 0) + 1000 * rate
    lines = []
    for step in range(settings["steps"] + 1):
        if rollouts == 5 and step == 2:
            break
        lines.append(
            {
                "step": step,
                "eval/accuracy": min(0.2 + gain * step, 1.0),
                "tokens/total": 100 * step * rollouts,
                "flops/explore": 1e6 * rollouts * (step > 0),
                "flops/update": 2e6 * (step > 0),
                "flops/utilisation_update": 0.5,
                "time/step": 1.5,
                "states/accepted": 10.0 * step,
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rollouts == 5:
        print("a warning\nfr3e_jax.train: error: step 2 has no signal", file=sys.stderr)
        sys.exit(1)
    (directory / "summary.json").write_text(json.dumps({"steps": settings["steps"]}))


def refuse(directory: Path) -> int:
    """End as where the directory has the lock of another process."""
    print(f"fr3e_jax.train: error: {directory} is in use by process 1", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
