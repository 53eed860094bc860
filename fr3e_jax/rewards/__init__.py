"""Verdicts on answers: scorers, the worker processes that they run in, and rewards."""
