"""Benchmarks: which there are, answers to them, and what their verdicts say."""
