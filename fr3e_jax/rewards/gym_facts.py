"""What is known of reasoning-gym without it: data sets that are not used, and what a verdict needs."""

from typing import Any, NamedTuple

RUNS_TEXT = "its verifier runs the model's text as a program"
NOT_BY_SEED = "its problems differ from one process to the next"

REFUSED = {
    "binary_matrix": RUNS_TEXT,
    "intermediate_integration": RUNS_TEXT,
    "n_queens": RUNS_TEXT,
    "polynomial_multiplication": RUNS_TEXT,
    "simple_integration": RUNS_TEXT,
    "spiral_matrix": RUNS_TEXT,
    "string_insertion": RUNS_TEXT,
    "codeio": NOT_BY_SEED,
    "isomorphic_strings": NOT_BY_SEED,
    "knight_swap": NOT_BY_SEED,
    "list_functions": NOT_BY_SEED,
    "ransom_note": NOT_BY_SEED,
    "word_ladder": NOT_BY_SEED,
    "coin_flip": "its verifier takes the first digits of a number for right",
    "decimal_arithmetic": "its verifier takes numbers that are nearly right for right",
    "gsm_symbolic": "its verifier takes the first number of a text without its sign",
    "complex_arithmetic": "its verifier takes nan for right",
    "figlet_font": "its verifier takes any word with ten right letters for right",
    "game_of_life_halting": "its verifier takes any text for yes, no too",
    "number_sorting": "its verifier takes numbers that are off by one, and nan, for right",
    "propositional_logic": "its verifier takes a premise copied from the question for right",
    "composite": "its problems come from other data sets; name those as sources",
}
"""Data sets that are not used, and why."""


class GymFacts(NamedTuple):
    """What the verdict on an answer of reasoning-gym needs.

    name: of the data set. parameters: its settings, as JSON. entry: the problem as reasoning-gym has it.
    """

    name: str
    parameters: str
    entry: dict[str, Any]
