"""Data sets that have a name here: where they are on the hub, and how their rows are read."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from fr3e_jax.config import SourceConfig

AnswerIs = Literal["plain", "last_box", "after_hashes"]
ScorerName = Literal["math", "exact", "numeric", "choice"]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set of the hub; the columns are named as in SourceConfig."""

    hub: str
    """Its name on the hub."""
    files: str
    """Its files there, with * for any text and {split} for the split."""
    prompt: str
    """Column of the question."""
    answer: str
    """Column of the answer."""
    rows: int
    """How many it has, for people."""
    licence: str
    """As its page says, or "not stated"."""
    about: str
    """What it is, in a few words."""
    answer_is: AnswerIs = "plain"
    """What the column of the answer holds."""
    scorer: ScorerName = "math"
    """What judges answers."""
    split: str = "train"
    """Its split."""
    subset: str | None = None
    """Its subset, a folder of the repository."""
    where: Mapping[str, list[str | int]] = dataclasses.field(default_factory=dict)
    """Column -> values that a row must have there."""
    choices: str | None = None
    """Column of the choices, which are written below the question as "A) ..."."""
    unanswered: bool = False
    """Some of its rows have no answer; they are left out."""


def simplerl(levels: str, rows: int, about: str) -> DataSet:
    """A difficulty of SimpleRL-Zoo.

    Its column `prompt` has Qwen's chat template written into it; the bare question is another.
    """
    return DataSet(
        hub="hkust-nlp/SimpleRL-Zoo-Data",
        files="{subset}/{split}.parquet",
        subset=f"simplelr_qwen_{levels}",
        prompt="question",
        answer="gt_answer",
        rows=rows,
        licence="Apache-2.0",
        about=about,
        unanswered=True,
    )


DATASETS: dict[str, DataSet] = {
    "deepscaler": DataSet(
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        files="deepscaler.json",
        prompt="problem",
        answer="answer",
        rows=40_315,
        licence="MIT",
        about="competition problems: AIME, AMC, Omni-MATH, STILL",
        unanswered=True,
    ),
    "simplerl_gsm8k_level1": simplerl("gsm8k_level1", 8_000, "easy: GSM8K and MATH level 1 (rows rounded)"),
    "simplerl_level1to4": simplerl("level1to4", 8_000, "medium: MATH levels 1 to 4 (rows rounded)"),
    "simplerl_level3to5": simplerl("level3to5", 8_523, "hard: MATH levels 3 to 5"),
    "math": DataSet(
        hub="DigitalLearningGmbH/MATH-lighteval",
        files="data/{split}-*.parquet",
        prompt="problem",
        answer="solution",
        answer_is="last_box",
        rows=7_500,
        licence="MIT",
        about="MATH's training problems (Hendrycks et al.)",
    ),
    "gsm8k": DataSet(
        hub="openai/gsm8k",
        files="{subset}/{split}-*.parquet",
        subset="main",
        prompt="question",
        answer="answer",
        answer_is="after_hashes",
        rows=7_473,
        licence="MIT",
        about="school problems in words, with whole numbers as answers",
    ),
    "dapo_math_17k": DataSet(
        hub="open-r1/DAPO-Math-17k-Processed",
        files="{subset}/{split}-*.parquet",
        subset="en",
        prompt="prompt",
        answer="solution",
        rows=14_116,
        licence="not stated (its origin: Apache-2.0)",
        about="the English problems of DAPO-Math-17k, each once and without its instructions",
    ),
    "commonsense_qa": DataSet(
        hub="tau/commonsense_qa",
        files="data/{split}-*.parquet",
        prompt="question",
        answer="answerKey",
        scorer="choice",
        choices="choices",
        rows=9_741,
        licence="MIT",
        about="everyday knowledge, five choices",
    ),
    "commonsense_qa_test": DataSet(
        hub="tau/commonsense_qa",
        files="data/{split}-*.parquet",
        split="validation",
        prompt="question",
        answer="answerKey",
        scorer="choice",
        choices="choices",
        rows=1_221,
        licence="MIT",
        about="its validation split, since its test split has no answers",
    ),
    "aime24": DataSet(
        hub="HuggingFaceH4/aime_2024",
        files="data/{split}-*.parquet",
        prompt="problem",
        answer="answer",
        rows=30,
        licence="not stated",
        about="AIME I and II of 2024",
    ),
    "aime25": DataSet(
        hub="math-ai/aime25",
        files="{split}.jsonl",
        split="test",
        prompt="problem",
        answer="answer",
        rows=30,
        licence="not stated",
        about="AIME I and II of 2025",
    ),
    "aime26": DataSet(
        hub="MathArena/aime_2026",
        files="data/{split}-*.parquet",
        prompt="problem",
        answer="answer",
        rows=30,
        licence="CC BY-NC-SA 4.0",
        about="AIME I and II of 2026",
    ),
    "amc23": DataSet(
        hub="math-ai/amc23",
        files="{split}-*.parquet",
        split="test",
        prompt="question",
        answer="answer",
        rows=40,
        licence="not stated",
        about="AMC 12 of 2023",
    ),
    "math500": DataSet(
        hub="HuggingFaceH4/MATH-500",
        files="{split}.jsonl",
        split="test",
        prompt="problem",
        answer="answer",
        rows=500,
        licence="not stated",
        about="500 of MATH's test problems (Lightman et al.)",
    ),
    "minerva": DataSet(
        hub="math-ai/minervamath",
        files="{split}.jsonl",
        split="test",
        prompt="question",
        answer="answer",
        rows=272,
        licence="not stated",
        about="undergraduate science problems of MIT's courses",
    ),
    "olympiadbench": DataSet(
        hub="Hothan/OlympiadBench",
        files="OlympiadBench/{subset}/*.parquet",
        subset="OE_TO_maths_en_COMP",
        prompt="question",
        answer="final_answer",
        rows=674,
        licence="Apache-2.0",
        about="OlympiadBench's English mathematics without pictures and proofs",
    ),
    "gsm8k_test": DataSet(
        hub="openai/gsm8k",
        files="{subset}/{split}-*.parquet",
        subset="main",
        split="test",
        prompt="question",
        answer="answer",
        answer_is="after_hashes",
        rows=1_319,
        licence="MIT",
        about="GSM8K's test problems",
    ),
    "gaokao2023en": DataSet(
        hub="MARIO-Math-Reasoning/Gaokao2023-Math-En",
        files="Gaokao2023-Math-En.jsonl",
        prompt="question",
        answer="answer",
        rows=385,
        licence="MIT",
        about="the Chinese college entrance exam of 2023, in English",
    ),
    "college_math": DataSet(
        hub="di-zhang-fdu/College_Math_Test",
        files="college-math-test.jsonl",
        prompt="question",
        answer="answer",
        rows=2_818,
        licence="Apache-2.0",
        about="exercises of college textbooks (MathScale)",
    ),
}

MIXTURES: dict[str, list[SourceConfig]] = {
    # Weights are the numbers of rows, so that every problem is asked equally often.
    "fr3e_paper": [
        SourceConfig("deepscaler", weight=DATASETS["deepscaler"].rows),
        SourceConfig("simplerl_level3to5", weight=DATASETS["simplerl_level3to5"].rows),
    ],
}


def datasets_table() -> str:
    """The named data sets as a table for the page of problems."""
    lines = ["| name | on the hub | rows | licence | what it is |", "| --- | --- | ---: | --- | --- |"]
    for name, data in DATASETS.items():
        link = f"[{data.hub}](https://huggingface.co/datasets/{data.hub})"
        lines.append(f"| `{name}` | {link} | {data.rows:,} | {data.licence} | {data.about} |")
    return "\n".join(lines) + "\n"
