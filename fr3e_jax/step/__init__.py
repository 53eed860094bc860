"""One step of FR3E: the pipeline of the paper."""
