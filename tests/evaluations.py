"""Evaluations of the shipped model on a file of additions, for the tests of evaluate."""

import json
from pathlib import Path

from fr3e_jax.config import DataConfig
from fr3e_jax.evaluation.record import ANSWERS
from fr3e_jax.evaluation.settings import EvaluationConfig
from fr3e_jax.problems.additions import make_addition

PROBLEMS, SAMPLES = 11, 3  # which no number of rows divides


def write_suite(file):
    """Held-out additions of the quickstart as a file; the last number of a response is its answer."""
    problems = make_addition("carry_addition", DataConfig()).held_out(PROBLEMS)
    lines = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    file.write_text("\n".join(lines) + "\n")
    return file


def settings(suite, out, **others):
    return EvaluationConfig(
        **{
            "model": "quickstart",
            "suite": str(suite),
            "samples": SAMPLES,
            "temperature": 1.0,
            "max_response": 48,
            "template": "plain",
            "rows": 8,
            "out": str(out),
            "compilation_cache": "off",
            **others,
        }
    )


def answers(out):
    return [json.loads(line) for line in (Path(out) / ANSWERS).read_text().splitlines()]


def by_place(lines):
    return {(line["problem"], line["sample"]): line for line in lines}
