"""What touches text, files and people: data, tasks, checkpoints, metrics."""
