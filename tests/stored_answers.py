"""Stored answers of an evaluation, and what is shown of them."""

import io
import json

from rich.console import Console

from fr3e_jax.evaluation.scores import scores_of


def line(benchmark="aime24", problem=0, sample=0, right=True, **more):
    return {
        "benchmark": benchmark,
        "problem": problem,
        "sample": sample,
        "right": right,
        "extracted": "7" if right else "8",
        "truncated": False,
        "length": 10,
        "question": f"{benchmark} {problem}?",
        "answer": "7",
        "response": "so \\boxed{7}\u2028\n",
    } | more


def answers(benchmark, *problems, **more):
    """`answers("aime24", "110", "000")`: two problems with three answers each."""
    return [
        line(benchmark, problem, sample, marks[sample] == "1", **more)
        for sample in range(len(problems[0]))
        for problem, marks in enumerate(problems)
    ]


def written(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def only(lines):
    (score,) = scores_of(lines).values()
    return score


def shown(what, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


ASKED = {
    "model": "runs/[a]",
    "step": 3,
    "source": "Org/Name@0f3",
    "template": "boxed",
    "stop": ["###"],
    "compute_dtype": "float32",
}
