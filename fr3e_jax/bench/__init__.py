"""Measurements behind this project's claims: `python -m fr3e_jax.bench NAME`.

Each prints ratios of two sides that were measured in one run, in turns; shared machines drift, so nothing
else is to be compared. Every measurement has a process of its own.
"""
