"""The parts of a page: what runs are, and of each step that is kept an index, its texts and its questions.

A part has a name: `runs`, `RUN/STEP/index`, `RUN/STEP/texts` or `RUN/STEP/QUESTION`. RUN counts the runs from
0, and QUESTION the questions of the step.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from fr3e_jax.view.packing import cut_short, pack, thousandths
from fr3e_jax.view.rollouts import (
    RESPONSE_COLUMNS,
    DamagedRolloutsError,
    StepRollouts,
    disagree,
    read_quantiles,
    read_step,
    rows_by_state,
    size_of,
    steps_kept,
)
from fr3e_jax.view.runs import ShownRun, effective_answers, meanings_for, shown_settings

RUNS_PART = "runs"
PART_NAME = re.compile(r"(\d+)/(\d+)/(index|texts|\d+)")
INDEX_COLUMNS = (
    "kind trajectory state rollout reward right stopped value advantage accepted kept tokens"
).split()
"""Columns of each response that questions are found by."""
LONGEST_IN_INDEX = 240  # characters of a question or an answer
PartsOfScript = list[tuple[str, bytes]]
"""Parts that are handed over together, where parts are apart from the page: name and packed part."""
SMALL_STEP = 100_000  # tokens of a step whose questions are handed over with its index, about 500 kB


class PageParts:
    """The parts of the runs of a page. What is damaged is left out, and said in `warnings`."""

    def __init__(self, runs: Sequence[ShownRun]) -> None:
        self.runs = runs
        self.steps: list[dict[int, epath.Path]] = []
        self.warnings: list[str] = []
        self.quantiles: list[dict[int, dict[str, list[float]]]] = []
        for run in runs:
            kept, quantiles = {}, {}
            for step, file in steps_kept(run.place).items():
                try:
                    quantiles[step] = read_quantiles(file)
                except DamagedRolloutsError as error:
                    self.warnings.append(f"warning: {error}, and is left out")
                else:
                    kept[step] = file
            self.steps.append(kept)
            self.quantiles.append(quantiles)

    def rollout_bytes(self) -> int:
        """Add up the files of rollouts, bytes."""
        return sum(size_of(file) for steps in self.steps for file in steps.values())

    def all_scripts(self, step_done: Callable[[], None]) -> Iterator[PartsOfScript]:
        """Go through all parts but that of the runs, those of a script together.

        A step whose file was deleted since, or is damaged where texts are, is left out from then on.

        Args:
          step_done: is called when a step is packed.
        """
        for number, steps in enumerate(self.steps):
            for step in list(steps):
                try:
                    yield from self.scripts_of(number, step)
                except DamagedRolloutsError as error:
                    self.warnings.append(f"warning: {error}, and is left out")
                    del steps[step], self.quantiles[number][step]
                step_done()

    def scripts_of(self, number: int, step: int) -> Iterator[PartsOfScript]:
        """Pack a step of a run: with the index of a small one all of its questions, else each apart.

        Raises:
          DamagedRolloutsError: its file cannot be read.
        """
        rollouts, folder = read_step(self.steps[number][step]), f"{number}/{step}"
        index, texts = (f"{folder}/index", pack_index(rollouts)), (f"{folder}/texts", pack_texts(rollouts))
        questions = ((f"{folder}/{i}", pack_question(rollouts, i)) for i in range(len(rollouts.first)))
        if sum(rollouts.columns["tokens"]) <= SMALL_STEP:
            yield [index, texts, *questions]
        else:
            yield [index]
            yield [texts]
            yield from ([question] for question in questions)

    def part(self, name: str) -> bytes | None:
        """Pack a part; None where there is none of that name."""
        if name == RUNS_PART:
            return self.pack_runs()
        parsed = PART_NAME.fullmatch(name)
        if parsed is None or int(parsed[1]) >= len(self.steps):
            return None
        file = self.steps[int(parsed[1])].get(int(parsed[2]))
        if file is None:
            return None
        step = read_step(file)
        if parsed[3] == "index":
            return pack_index(step)
        if parsed[3] == "texts":
            return pack_texts(step)
        return pack_question(step, int(parsed[3])) if int(parsed[3]) < len(step.first) else None

    def script(self, name: str) -> PartsOfScript:
        """Pack the parts of a script; none where there is no part of that name."""
        parsed = PART_NAME.fullmatch(name)
        if parsed is not None and parsed[3] == "index" and int(parsed[1]) < len(self.steps):
            number, step = int(parsed[1]), int(parsed[2])
            return next(self.scripts_of(number, step)) if step in self.steps[number] else []
        part = self.part(name)
        return [] if part is None else [(name, part)]

    def pack_runs(self) -> bytes:
        """Pack settings, metrics and alarms of all runs, and which steps are kept."""
        runs = [
            {
                "name": run.name,
                "place": str(run.place),
                "settings": shown_settings(run),
                "columns": run.columns,
                "alarms": run.alarms,
                "effective": effective_answers(run),
                "kept": list(steps),
                "quantiles": [[step, found] for step, found in quantiles.items()],
            }
            for run, steps, quantiles in zip(self.runs, self.steps, self.quantiles, strict=True)
        ]
        return pack({"runs": runs, "meanings": meanings_for(self.runs)})


def pack_index(step: StepRollouts) -> bytes:
    """Pack what questions and responses of a step are found by, without texts of responses."""
    states = rows_by_state(step)
    questions = []
    for number, (first, count) in enumerate(zip(step.first, step.count, strict=True)):
        own = {key: rows for key, rows in states.items() if key[0] == number}
        questions.append(
            {
                "query": step.columns["query"][first],
                "round": step.columns["round"][first],
                "question": cut_short(step.columns["question"][first] or "", LONGEST_IN_INDEX),
                "answer": cut_short(step.columns["answer"][first] or "", LONGEST_IN_INDEX),
                "source": step.columns["source"][first] or "",
                "first": first,
                "count": count,
                "split": [
                    [trajectory, state]
                    for (_, trajectory, state), rows in own.items()
                    if disagree(step, rows)
                ],
            }
        )
    return pack({"questions": questions, "rows": {name: step.columns[name] for name in INDEX_COLUMNS}})


def pack_texts(step: StepRollouts) -> bytes:
    """Pack the texts of all questions and responses of a step, which are searched many steps at a time."""
    questions = [step.columns["question"][first] or "" for first in step.first]
    return pack({"questions": questions, "texts": [text or "" for text in step.columns["text"]]})


def pack_question(step: StepRollouts, number: int) -> bytes:
    """Pack a question with its responses, and the numbers of all their tokens."""
    first, rows = step.first[number], range(step.first[number], step.first[number] + step.count[number])
    columns = step.columns
    head: dict[str, Any] = {
        name: columns[name][first] for name in ("query", "round", "question", "answer", "source")
    }
    head["query_tokens"] = columns["query_tokens"][first]
    head["rows"] = [{name: columns[name][i] for name in (*RESPONSE_COLUMNS, "tokens")} for i in rows]
    texts, counts = ([columns[name][i] for i in rows] for name in ("text", "tokens"))
    ends = step.token_numbers(number, "ends")
    arrays = {
        "token": step.token_numbers(number, "token")[0].astype(np.int32),
        "logprob": thousandths(step.token_numbers(number, "logprob")[0]),
        "entropy": thousandths(step.token_numbers(number, "entropy")[0]),
        "width": widths([text or "" for text in texts], *ends, np.array(counts, np.int64)),
    }
    return pack(head, arrays)


def widths(texts: Sequence[str], ends: np.ndarray, known: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Count the UTF-16 units of each token's part of its text, as JavaScript counts.

    Args:
      texts: of responses.
      ends: characters up to the end of each token, those of all responses one behind the other; what lies
        outside of the text or goes back is put right, and nan is the end of the text.
      known: bool of each response: whether it has ends. Tokens of one without have no text.
      counts: tokens of each response.

    Returns:
      uint32, a number for each of `ends`.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    start = np.cumsum(lengths) - lengths  # of each text in all texts
    most = np.repeat(np.where(known, lengths, 0), counts)
    own = np.clip(np.where(np.isnan(ends), most, ends), 0, most).astype(np.int64)
    place = np.maximum.accumulate(own + np.repeat(start, counts))  # a text begins behind the one before it
    before = np.concatenate([place[:1], place[:-1]])
    first = (np.cumsum(counts) - counts)[counts > 0]
    before[first] = start[counts > 0]
    code_points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    units = np.concatenate([[0], np.cumsum(1 + (code_points > 0xFFFF))])
    return (units[place] - units[before]).astype(np.uint32)
