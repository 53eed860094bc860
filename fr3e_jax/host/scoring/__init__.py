"""Verdicts on answers. Nothing here imports jax: it runs in worker processes, which start in a moment."""
