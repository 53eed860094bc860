"""Rollouts: first return and exploration, over chains of segments."""
