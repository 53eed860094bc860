"""Numbers of a run's held-out evaluation, from the answers and their verdicts."""

import math
from collections.abc import Sequence

import numpy as np

from fr3e_jax.evaluation.answers import Answer
from fr3e_jax.evaluation.statistics import avg_at_k


def held_out_metrics(answers: Sequence[Answer], samples: int) -> dict[str, float]:
    """Compute the metrics of an evaluation, under their names in metrics.jsonl.

    Answers to one problem depend on each other, so the standard error is over problems: of the means of their
    answers. One problem has none.

    Args:
      answers: the first answers to all problems, then the second ones in the same order, and so on.
      samples: answers to each problem.
    """
    right = np.array([answer.right for answer in answers])
    _, error = avg_at_k(right.reshape(samples, -1).T)
    metrics: dict[str, float] = {
        "eval/accuracy": float(right.mean()),
        "eval/cut": float(np.mean([answer.truncated for answer in answers])),
        "eval/length": float(np.mean([answer.length for answer in answers])),
        "eval/problems": len(answers) // samples,
        "eval/samples": samples,
    }
    return metrics if math.isnan(error) else metrics | {"eval/accuracy_se": error}
