"""Run directories that no model made, with metrics, alarms and rollouts, for tests of what shows runs.

`python tests/made_up_run.py DIRECTORY [STEPS]` writes one to look at.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        *((name, pa.int32()) for name in ("step", "round")),
        ("query", pa.int64()),
        *((name, TEXT) for name in ("question", "answer", "source")),
        ("query_token", pa.list_(pa.int32())),
        ("kind", TEXT),
        ("trajectory", pa.int32()),
        ("kept", pa.bool_()),
        *((name, pa.int32()) for name in ("state", "position")),
        ("statistic", pa.float32()),
        ("rollout", pa.int32()),
        ("token", pa.list_(pa.int32())),
        *((name, pa.list_(pa.float32())) for name in ("logprob", "entropy")),
        ("text", pa.string()),
        ("ends", pa.list_(pa.int32())),
        *((name, pa.bool_()) for name in ("stopped", "right")),
        *((name, pa.string()) for name in ("reason", "extracted")),
        *((name, pa.float32()) for name in ("reward", "value", "alpha", "advantage")),
        ("accepted", pa.bool_()),
        ("rejected", pa.string()),
    ]
)
HOSTILE = (
    "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">",
    "admin\u202edrow\u202c and zero\u200bwidth\ufeff \u2066isolated\u2069 \x00\x1b[31m bell\x07 \r end",
    "a" * 50_000,
    "broken UTF-8: \ufffd\ufffd, beyond the plane: \U0001d53d\U0001d7db 👩‍🔬, "
    "Arabic: مرحبا بالعالم, Hebrew: שלום",
)
"""Texts that a model may write: markup, bidi controls, no space, what is hard to show."""
OPENINGS = ("Let me work this out.", "We need the total.", "First, write down what is known.")
MIDDLES = (
    "There are {a} boxes with {b} apples each, so {a} times {b} is {p}.",
    "Multiply {a} by {b}: that makes {p} apples before any are eaten.",
    "Each of the {a} boxes holds {b}, hence {p} in all.",
)
ENDINGS = ("After {c} are eaten, {r} remain.", "Taking {c} away leaves {r}.", "{p} minus {c} equals {r}.")


def answer_text(rng, numbers, right):
    """A response that works a question out; a wrong one goes astray in the product."""
    a, b, c = numbers
    p = a * b if right else a * b + int(rng.integers(1, 12))
    said = [rng.choice(some).format(a=a, b=b, c=c, p=p, r=p - c) for some in (OPENINGS, MIDDLES, ENDINGS)]
    return " ".join(said) + f"\n\nThe answer is \\boxed{{{p - c}}}.", str(p - c)


def pieces_of(text):
    """Tokens of a text: words with the space before them, and all other characters alone."""
    return re.findall(r" ?\w{1,12}|\s|[^\w\s]", text) or [text]


def token_columns(rng, text):
    """Token, logprob, entropy, text and ends of a response; an end token, which has no text, is the last."""
    pieces = pieces_of(text)
    size = np.concatenate([np.cumsum([len(piece) for piece in pieces]), [len(text)]])
    entropy = np.where(
        rng.random(len(size)) < 0.12, rng.uniform(0.5, 2.4, len(size)), rng.exponential(0.06, len(size))
    )
    logprob = -rng.exponential(entropy + 1e-3)
    return {
        "token": [sum(map(ord, piece)) % 50_000 for piece in pieces] + [2],
        "logprob": logprob.astype(np.float32).tolist(),
        "entropy": entropy.astype(np.float32).tolist(),
        "text": text,
        "ends": size.tolist(),
    }


def judged(right, extracted):
    """Columns of a verdict."""
    reason = "equal" if right else "not equal to the gold answer"
    return {"right": bool(right), "reason": reason, "extracted": extracted, "reward": float(right)}


def question_rows(rng, step, query, success, trajectories=4, positions=3, rollouts=6, restarts=True):
    """All rows of a question: base trajectories, two of them kept, and partial rollouts of their states."""
    numbers = [int(n) for n in rng.integers(3, 30, 3)]
    a, b, c = numbers
    question = {
        "step": step,
        "round": 0,
        "query": query,
        "question": f"A shop has {a} boxes with {b} apples each. {c} apples are eaten. How many are left?",
        "answer": str(a * b - c),
        "source": ("word_problems", "gym:basic_arithmetic")[query % 2],
        "query_token": list(range(30)),
    }
    rows, base = [], []
    for r in range(trajectories):
        right = r == 0 if r < 2 else rng.random() < success
        text, extracted = answer_text(rng, numbers, right)
        base.append(
            {**question, "kind": "base", "trajectory": r, "kept": r < 2 and restarts, "stopped": True}
        )
        base[-1] |= token_columns(rng, text) | judged(right, extracted)
    rows += base
    for row in base[:2] if restarts else ():
        candidates = np.argsort(np.asarray(row["entropy"][1:-8]))[::-1][:positions] + 1
        before = 1.0
        for j, position in enumerate([0, *sorted(candidates.tolist())]):
            chance = success if j == 0 else np.clip(success + (0.2 if row["right"] else -0.2) * j, 0, 1)
            rights = rng.random(rollouts) < chance
            value = float(rights.mean())
            alpha = float(np.exp(-(value - before))) if j else 1.0
            before, accepted = value, bool(0 < value < 1)
            for m, right in enumerate(rights):
                text, extracted = answer_text(rng, numbers, right)
                cut = max(0, row["ends"][position - 1] if position else 0)
                columns = token_columns(rng, text[min(cut, len(text) - 12) :])
                stopped = bool(rng.random() < 0.95)
                rows.append({**question, "kind": "partial", "trajectory": row["trajectory"], "kept": True})
                rows[-1] |= columns | judged(right, extracted)
                rows[-1] |= {
                    "state": j,
                    "position": position,
                    "statistic": row["entropy"][position] if position else None,
                    "rollout": m,
                    "stopped": stopped,
                    "value": value,
                    "alpha": alpha,
                    "advantage": alpha * (float(right) - value),
                    "accepted": accepted,
                    "rejected": None if accepted else ("all right" if value else "all wrong"),
                }
    if not restarts:
        value = float(np.mean([row["reward"] for row in base]))
        for row in base:
            row |= {"state": 0, "value": value, "alpha": 1.0, "advantage": row["reward"] - value}
            row |= {"accepted": 0 < value < 1, "rejected": None if 0 < value < 1 else "equal rewards"}
    return rows


def long_rows(rng, step, questions, rollouts, tokens):
    """Rows of questions with many long partial rollouts of one state each, of words that mean nothing."""
    words = np.array([f" {''.join(rng.choice(list('abcdefghijklmnop'), 5))}" for _ in range(2000)])
    lengths, rows = np.char.str_len(words), []
    for query in range(questions):
        shared = {"step": step, "round": 0, "query": query, "question": f"Question {query}", "answer": "7"}
        shared |= {"source": "long", "query_token": [1], "trajectory": 0, "kept": True, "stopped": True}
        for m in range(-1, rollouts):
            drawn = rng.integers(0, len(words), tokens)
            entropy = rng.exponential(0.4, tokens).astype(np.float32)
            rows.append({**shared, "kind": "base" if m < 0 else "partial"} | judged(m % 2, "7"))
            rows[-1] |= {"token": drawn, "logprob": -entropy, "entropy": entropy}
            rows[-1] |= {"text": "".join(words[drawn]), "ends": np.cumsum(lengths[drawn])}
            if m >= 0:
                rows[-1] |= {"state": 0, "position": 0, "rollout": m, "value": 0.5, "alpha": 1.0}
                rows[-1] |= {"advantage": m % 2 - 0.5, "accepted": True}
    return rows


def with_hostile_texts(rng, rows):
    """Put hostile texts into the first rows of each kind, into the question, the answer and the reason."""
    for row in rows:
        row["question"], row["answer"] = row["question"] + HOSTILE[0] + HOSTILE[1], HOSTILE[1]
    for kind in ("base", "partial"):
        for row, text in zip([row for row in rows if row["kind"] == kind], HOSTILE, strict=False):
            row |= token_columns(rng, text) | {"reason": HOSTILE[0], "extracted": HOSTILE[1]}
    return rows


def write_rollouts(directory, step, rows):
    """Write the file of a step."""
    folder = directory / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in SCHEMA.names}
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMA}, schema=SCHEMA)
    pq.write_table(table, folder / f"step-{step:06d}.parquet", compression="zstd")


def step_metrics(rng, step, share):
    """Metrics of a step, `share` of the way through the run."""
    value = float(np.clip(0.3 + 0.5 * share + rng.normal(0, 0.03), 0, 1))
    accepted = int(40 + rng.integers(-8, 8))
    found = {
        "step": step,
        "reward/base_mean": value - 0.05,
        "reward/root_mean": value,
        "value/mean": value + 0.02,
        "value/accepted_mean": 0.5,
        "advantage/accepted_mean": float(rng.normal(0, 0.01)),
        "advantage/accepted_std": 0.42,
        "entropy/mean": 0.3 * (1 - 0.8 * share),
        "entropy/positions": 1.4 * (1 - 0.5 * share),
        "response/length": 60 + 30 * share,
        "response/cut": 0.01 + 0.2 * share**3,
        "response/continuation": 35 + 20 * share,
        "states/accepted": accepted,
        "states/rejected": 64 - accepted,
        "states/all_wrong": int((64 - accepted) * (1 - share)),
        "states/all_right": 64 - accepted - int((64 - accepted) * (1 - share)),
        "modulation/mean": 1.0,
        "update/loss": float(rng.normal(0, 0.01)),
        "update/grad_norm": float(0.3 + rng.exponential(0.05)),
        "update/clip_low": 0.002,
        "update/clip_high": float(rng.exponential(0.004)),
        "update/abs_log_ratio": 0.003,
        "update/approx_kl": float(rng.exponential(0.0005)),
        "update/ratio_max": 1.9,
        "update/ratio_min": 0.4,
        "tokens/generated": 20_000,
        "tokens/total": 20_000 * step,
        "rows/occupancy": 0.75,
        "flops/first_return": 4.6e12,
        "flops/explore": 3.9e13,
        "flops/update": 7.5e13,
        "time/first_return": 1.2,
        "time/explore": 4.2,
        "time/verify": 0.3,
        "time/update": 5.5,
        "time/step": 11.4,
        "reward/part/own": float("nan"),
    }
    return found


def made_up_run(directory, steps=12, kept=(), questions=6, hostile=False, seed=0, restarts=True):
    """Write a run directory.

    Args:
      directory: to write into.
      steps: of the run.
      kept: steps whose rollouts are kept; None for all.
      questions: of each of them.
      hostile: whether the first question of each is full of hostile texts.
      seed: of all that is drawn.
      restarts: whether there are positions.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    settings = f"algorithm: {'fr3e' if restarts else 'grpo'}\nsteps: {steps}\nseed: {seed}\n"
    settings += "data:\n  source: word_problems\n  held_out: 200\nreward:\n  success_at: 1.0\n"
    (directory / "config.yaml").write_text(settings)
    judged_of = {"eval/problems": 200, "eval/samples": 1}  # one answer to each: the error says no more
    lines = [{"step": 0, "eval/accuracy": 0.3, "time/evaluate": 1.0} | judged_of]
    for step in range(1, steps + 1):
        line = step_metrics(rng, step, step / steps)
        if step % max(steps // 6, 1) == 0:
            accuracy = round(float(np.clip(0.3 + 0.5 * step / steps, 0, 1)) * 200) / 200
            line |= {"eval/accuracy": accuracy} | judged_of
        if step == steps * 2 // 3:
            line["alarms"] = {
                "entropy_collapse": "Entropy fell below a third of its start. Raise loss.clip_high."
            }
        if step == steps:
            line["alarms"] = {
                "truncation": "21% of answers are cut off. Raise rollout.max_response, or shorten answers.",
                "entropy_collapse": "Entropy stays below a third of its start. <b>Raise</b> loss.clip_high.",
            }
        lines.append(line)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(1, steps + 1) if kept is None else kept:
        rows = []
        for i in range(questions):
            success = 0.25 + 0.5 * step / steps
            some = question_rows(rng, step, (step - 1) * questions + i, success, restarts=restarts)
            rows += with_hostile_texts(rng, some) if hostile and i == 0 else some
        write_rollouts(directory, step, rows)
    return directory


if __name__ == "__main__":
    made_up_run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 24, kept=None, hostile=True)
