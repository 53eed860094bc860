"""What base models do that spoils runs: how it is read, rewarded and counted."""

import json
import time

import numpy as np
import pytest
from support import mesh_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import ConfigError, RewardConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import INSTRUCTION, Text, load_text
from fr3e_jax.rewards.pool import ScoringPool
from fr3e_jax.rewards.verify import Verifier
from fr3e_jax.types import Problem, Rollouts, States

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def text():
    """One token for each byte, and the special tokens of Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=[START, STOP]
    )
    return Text(fast, (fast.eos_token_id,), "plain")


@pytest.fixture(scope="module")
def pool():
    pool = ScoringPool(["math"], workers=1)
    yield pool
    pool.close()


def rollouts_of(text, responses, stopped, drop=0):
    """Base trajectories [1, R] of one query, the last `drop` tokens of each left out."""
    rows = [text.encoded(response) for response in responses]
    rows = [row[: len(row) - drop] for row in rows]
    token = np.zeros((1, len(rows), max(map(len, rows)) + 1), np.int32)
    for i, row in enumerate(rows):
        token[0, i, : len(row)] = row
    nothing = np.zeros(token.shape, np.float32)
    length = np.array([[len(row) for row in rows]], np.int32)
    return Rollouts(token, nothing, nothing, nothing, length, np.array([stopped]))


FIVE = Problem("2+3", "5", "math")


def rewards(text, pool, responses, stopped=True, drop=0, config=None):
    verifier = Verifier(text, Hosts(mesh_of(), 1), pool, config or RewardConfig())
    rollouts = rollouts_of(text, responses, [stopped] * len(responses), drop)
    return verifier.base(rollouts, [FIVE])()[0].tolist()


BOX = r"The sum is \boxed{5}."


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (BOX + END, 1),
        # No end token, and running on: the last box is the answer, whatever was right before.
        (BOX + "\n\nQuestion: What is 1+1?\nAnswer: \\boxed{2}" + END, 0),
        (BOX + "\n\n\n\n" + "Let me check. " * 50 + END, 1),
        # Several boxes.
        (r"\boxed{4} is wrong, so \boxed{5}" + END, 1),
        (r"\boxed{5} is wrong, so \boxed{4}" + END, 0),
        (r"\boxed{5} or \boxed{5}" + END, 1),
        # Chat tokens echoed: as the special tokens, and a second turn after them.
        (f"{START}assistant\n{BOX}{STOP}\n{END}", 1),
        (f"{BOX}{STOP}\n{START}user\nAnd 1+1?{STOP}\n{START}assistant\n\\boxed{{2}}{END}", 0),
        # As ordinary text.
        ("<|im_start |>assistant\n" + BOX + "</s><eos>[/INST]" + END, 1),
        # Nothing.
        ("", 0),
        (END, 0),
        (" \n" + END, 0),
        ("\ufffd" + BOX + END, 1),
    ],
)
def test_a_habit_of_base_models_earns_what_its_last_answer_does(text, pool, response, reward):
    assert rewards(text, pool, [response]) == [reward]


@pytest.mark.parametrize("drop", [1, 2, 3])
def test_a_stop_in_the_middle_of_a_character_spoils_nothing(text, pool, drop):
    """A character of four bytes, of which so many are missing."""
    response = BOX + " \U0001f600"
    assert rewards(text, pool, [response], drop=drop) == [1.0]
    (decoded,) = text.decode([text.query(response)[:-drop]])
    assert decoded.startswith(BOX) and "\ufffd" in decoded
    assert json.loads(json.dumps(decoded)) == decoded and decoded.encode()


def test_a_box_cut_in_the_middle_of_a_character_is_no_answer(text, pool):
    assert rewards(text, pool, ["\\boxed{5\u00e9"], drop=1) == [0.0]


def test_answers_that_are_cut_off_are_wrong_unless_they_are_to_be_judged(text, pool):
    assert rewards(text, pool, [BOX, "5"], stopped=False) == [0.0, 0.0]
    assert rewards(text, pool, [BOX, "4"], stopped=False, config=RewardConfig(cut="judged")) == [1.0, 0.0]


def test_continuations_that_are_cut_off_are_wrong(text, pool):
    """Two rollouts of one state that say the same; one of them came to its end."""
    base = rollouts_of(text, ["The sum"], [True])
    own = rollouts_of(text, [BOX[7:]] * 2, [True, False])
    zero = np.zeros(1, np.int32)
    size = np.array([[len("The sum")]], np.int32)
    states = States(zero, zero, base.token[:, 0], size, np.array([[True]]))
    reward = Verifier(text, Hosts(mesh_of(), 1), pool).whole(states, own, [FIVE])()
    assert reward.tolist() == [[[1.0, 0.0]]]


def test_rewards_are_weighted_means_of_their_parts(text, pool):
    config = RewardConfig(answer=3, format=1)
    responses = [BOX, "It is 5", r"\boxed{4}", "It is 4"]
    assert rewards(text, pool, responses, config=config) == [1.0, 0.75, 0.25, 0.0]
    form = RewardConfig(answer=0, format=2, pattern="^It")
    assert rewards(text, pool, responses, config=form) == [0.0, 1.0, 0.0, 1.0]


TAGS = r"(?s)<think>.*?</think>.*?<answer>.*?</answer>"


def test_a_pattern_that_would_search_for_years_costs_the_response_its_form_alone(text):
    """In a worker: here nothing could end it."""
    hostile, good = "<think></think><answer>" * 2000, "<think>a</think>\n<answer>5</answer>"
    pool = ScoringPool(["math"], workers=1, time_limit=1.0)
    config = RewardConfig(answer=1, format=1, pattern=TAGS)
    verifier = Verifier(text, Hosts(mesh_of(), 1), pool, config)
    begun = time.process_time()
    try:
        reward = verifier.base(rollouts_of(text, [good, hostile, good + BOX], [True] * 3), [FIVE])()
    finally:
        pool.close()
    assert reward.tolist() == [[1.0, 0.0, 1.0]]
    assert pool.timed_out == 1
    assert time.process_time() - begun < 5


def test_a_point_in_the_pattern_matches_a_new_line_only_where_the_pattern_says_so(text, pool):
    two_lines = "<think>a\nb</think>"
    for pattern, reward in ((r"<think>.*</think>", 0.0), (r"(?s)<think>.*</think>", 1.0)):
        config = RewardConfig(answer=0, format=1, pattern=pattern)
        assert rewards(text, pool, [two_lines], config=config) == [reward]


def test_a_response_that_was_cut_off_has_not_the_form_either(text, pool):
    config = RewardConfig(answer=0, format=1)
    assert rewards(text, pool, [BOX], stopped=False, config=config) == [0.0]


# --- what the model sees


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        ("plain", "2+3"),
        ("boxed", f"2+3\n{INSTRUCTION}"),
        ("Q: {question}\nA: {x}", "Q: 2+3\nA: {x}"),
        ("chat", "<u>2+3</u>"),
        ("boxed_chat", f"<u>2+3\n{INSTRUCTION}</u>"),
    ],
)
def test_a_template_makes_what_the_model_sees(text, template, seen):
    tokenizer = text.tokenizer
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    one = Text(tokenizer, text.end_tokens, template)
    assert one.rendered("2+3") == seen
    assert tokenizer.decode(one.query("2+3")) == seen
    assert one.query_lengths(["2+3", "longer"]) == [len(one.query(q)) for q in ("2+3", "longer")]


def test_a_chat_template_that_ends_turns_otherwise_than_the_model_is_told_apart(text):
    """As that of Qwen2.5's base models, which never end an answer with <|im_end|>."""
    one = Text(text.tokenizer, text.end_tokens, "plain")
    for template, chats in (
        (None, False),
        ("{{ m.content }};", False),
        (f"{{{{ m.content }}}}{END}", True),
        ("{{ m.content + eos_token }}", True),
    ):
        one.tokenizer.chat_template = template and f"{{% for m in messages %}}{template}{{% endfor %}}"
        assert one.chats == chats


def test_the_instruction_is_the_papers():
    assert INSTRUCTION == "Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize("template", ["Chat", "{q}", ""])
def test_a_template_without_a_place_for_the_question_is_refused(template):
    with pytest.raises(ConfigError, match=r"data\.template"):
        load_text(find_model("quickstart"), template)
