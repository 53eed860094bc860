"""What a run keeps: its directory, checkpoints, log and metrics, and how it is stopped."""
