"""Texts that end an answer: found on the device as in the text, cut before it, and no other token changed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from environment import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, TINY, call, metrics, placement, tiny_params
from texts import TEXTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fr3e_jax.config import QUICKSTART_MODEL, ConfigError
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import Sampling
from fr3e_jax.engine.stops import is_complete, state_after, states_along
from fr3e_jax.models.decoder import graph_of
from fr3e_jax.parallel.mesh import SAMPLING_TABLE
from fr3e_jax.pretrained.stops import before_stop, cut_answer, make_table, token_bytes
from fr3e_jax.pretrained.text import Text, load_text
from fr3e_jax.types import Queries, States

QWEN = REPOSITORY / "tests" / "qwen2.5_tokenizer_cut"
WORDS = st.text("ab\né", min_size=1, max_size=4)


# --- the automaton


@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=1, max_size=5), st.data())
def test_a_stop_text_is_complete_exactly_where_the_text_holds_one(stop, pieces, data):
    """Whatever the borders of tokens are; once it is, it stays so."""
    tokens = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=8))
    table = make_table([piece.encode() for piece in pieces], stop)
    state = 0
    for i, token in enumerate(tokens):
        state = table.following[state, table.group[token]]
        text = "".join(pieces[token] for token in tokens[: i + 1])
        assert (state == len(table.following) - 1) == any(end in text for end in stop)


def test_states_along_a_response_are_those_of_its_beginnings():
    pieces = [b"a", b"b", b"ab", b"ba"]
    table = make_table(pieces, ["aba", "bb"])
    token = np.random.default_rng(0).integers(0, 4, (3, 6)).astype(np.int32)
    along = np.asarray(jax.jit(lambda x: states_along(table, x))(token))
    for row, states in zip(token, along, strict=True):
        state = np.int32(0)
        for i, each in enumerate([*row, None]):
            assert states[i] == state
            text = b"".join(pieces[t] for t in row[:i])
            assert bool(is_complete(table, state)) == (b"aba" in text or b"bb" in text)
            if each is not None:
                state = np.asarray(state_after(table, state, each))


# --- what tokens add to a text


def test_the_bytes_of_qwens_tokens_make_the_text():
    text = load_text(QWEN, "plain")
    pieces = token_bytes(text.tokenizer)
    for line in [*TEXTS, "a<|im_end|>b<tool_call>"]:
        ids = text.query(line)
        whole = text.tokenizer.decode(ids, skip_special_tokens=False)
        assert b"".join(pieces[i] for i in ids) == whole.encode()


def test_the_bytes_of_tokens_that_begin_words_hold_their_space():
    """As SentencePiece writes them, and the first of a text is decoded without it."""
    words = {"<s>": 0, "\u2581the": 1, "\u2581answer": 2, "s": 3, "\u2581": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert token_bytes(fast) == [b"<s>", b" the", b" answer", b"s", b" "]


# --- where an answer is cut


@pytest.mark.parametrize(
    "pieces, stop, kept, text",
    [
        (["70", "\n\n", "Q", ":"], ["\n\nQ:"], 1, "70"),
        (["{70", "}\n\n", "Q"], ["\n\n"], 2, "{70}"),  # the token that closes the bracket is kept
        (["{70", "}\n", "\nQ", "x"], ["\n\nQ"], 2, "{70}"),
        (["7", "\n", "0", "\n\n"], ["\n\n"], 3, "7\n0"),  # what only looks like a beginning is kept
        (["\n\n", "70"], ["\n\n"], 0, ""),
        (["a", "b", "a"], ["x"], 3, "aba"),
        (["a", "bc", "d"], ["cd", "b"], 1, "a"),  # the first of several
    ],
)
def test_an_answer_is_cut_before_the_first_stop_text(pieces, stop, kept, text):
    vocabulary = sorted({piece.encode() for piece in pieces})
    numbers = [vocabulary.index(piece.encode()) for piece in pieces]
    count, tail = cut_answer(vocabulary, numbers, stop)
    assert count == kept
    assert b"".join(vocabulary[i] for i in numbers[:kept]).removesuffix(tail).decode() == text


@pytest.mark.parametrize(
    "text, shown",
    [("70}\n\nQ: 2", "70}"), ("70}\n", "70}"), ("70}\n\nQ", "70}"), ("70}\nQ", "70}\nQ"), ("", "")],
)
def test_a_growing_answer_is_shown_up_to_where_a_stop_text_may_begin(text, shown):
    assert before_stop(text, ["\n\nQ:"]) == shown


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ConfigError, match="stop text is empty"):
        load_text(QUICKSTART_MODEL, "plain", ["x", ""])


# --- while answers are generated


LETTERS = [chr(ord("A") + i) for i in range(TINY.vocab_size - 1)]  # a text for each id of TINY but the last
END = TINY.vocab_size - 1


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of one letter for each id of TINY, and two stop texts that are likely enough."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<end>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return Text(fast, (END,), "plain", ("C", "FG", "ZY", *(f"KA{x}" for x in LETTERS[:30])))


def sampled(letters, mesh, stops, states=None):
    """Answers of TINY to two queries, or what goes on from states of them; without their stop texts."""
    place = placement(*mesh, table=SAMPLING_TABLE)
    engine = Engine(graph_of(TINY), place, 16, (END,), stops=stops)
    token = np.random.default_rng(0).integers(0, END, (2, 4)).astype(np.int32)
    queries = place.place_rows(Queries(token, np.full(2, 4, np.int32), np.arange(2, dtype=np.int32)))
    key, params, policy = jax.random.key(2), tiny_params(scale=1.0), Sampling()
    if states is None:
        return jax.device_get(engine.sample(params, queries, key, 0, 32, policy)[0])
    how = {"seed_key": key, "step": 0, "rollouts": 32, "sampling": policy, "after": 32}
    return jax.device_get(engine.explore(params, queries, place.place_rows(states), **how)[0])


def text_of(letters, tokens):
    return letters.tokenizer.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 4)], ids=["1", "8"])
def test_answers_end_with_stop_texts_and_have_otherwise_the_same_tokens(letters, mesh):
    whole, stopping = sampled(letters, mesh, None), sampled(letters, mesh, letters.stops)
    trimmed = letters.trimmed(stopping)
    by_text = 0
    for at in np.ndindex(whole.length.shape):
        tokens = whole.token[at][: whole.length[at]].tolist()
        text = text_of(letters, tokens)
        places = [place for end in letters.stop if (place := text.find(end)) >= 0]
        assert stopping.stopped[at] == (whole.stopped[at] or bool(places))
        length = max(1, min(places)) if places else len(tokens)
        assert trimmed.length[at] == length
        for name in ("token", "logprob", "sampled_logprob", "entropy"):
            ours, theirs = getattr(trimmed, name)[at], getattr(whole, name)[at]
            np.testing.assert_allclose(ours[:length], theirs[:length], atol=1e-5)
            assert not ours[length:].any()
        row = stopping.token[at][: stopping.length[at]]
        (judged,) = letters.answers([row], [stopping.stopped[at]])
        assert judged == (text[: min(places)] if places else text.removesuffix("<end>"))
        by_text += bool(places)
    assert 5 < by_text < whole.length.size  # of both kinds


@pytest.mark.slow
def test_a_stop_text_may_begin_before_a_state(letters):
    """Partial rollouts end where their whole answers hold a stop text, and keep a token of their own."""
    response = np.zeros((1, 16), np.int32)
    response[0, :4] = [LETTERS.index(letter) for letter in "QKAW"]
    prefix = np.array([[0, 3]], np.int32)  # behind "QKA", most letters complete a stop text
    nothing = np.zeros(1, np.int32)
    states = States(nothing, nothing, response, prefix, np.ones((1, 2), bool))
    whole = sampled(letters, (1, 1, 1), None, states)
    stopping = sampled(letters, (1, 1, 1), letters.stops, states)
    trimmed, crossed = letters.trimmed(stopping, states), 0
    for c in range(64):
        before = response[0, : prefix[0, c // 32]].tolist()
        tokens = before + whole.token[0, c, : whole.length[0, c]].tolist()
        text = text_of(letters, tokens)
        places = [place for end in letters.stop if (place := text.find(end)) >= 0]
        wanted = max(1, min(places) - len(before)) if places else len(tokens) - len(before)
        assert trimmed.length[0, c] == wanted
        crossed += bool(places) and min(places) < len(before)
    assert crossed  # that some did begin before


@pytest.mark.slow
def test_a_command_cuts_the_answer_it_shows():
    asked = ["--model=quickstart", "--raw", "--prompt=347+285="]
    whole = call("generate", *asked).stdout.rstrip("\n")
    end = whole[4:6]
    done = call("generate", *asked, f'--stop=["{end}"]')
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == whole[: whole.find(end)]


@pytest.mark.slow
def test_a_run_trains_on_answers_that_end_by_text(tmp_path):
    """They are cut before the sum and rewarded for a carry. A resumed run must have the same stop texts."""
    flags = [
        *SMALL,
        f"--run_dir={tmp_path}",
        "--reward.answer=0",
        "--reward.format=1",
        "--reward.pattern=,1;",
    ]
    done = call("train", *flags, "--steps=2", '--rollout.stop=[";="]')
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    written = [text for sample in samples for text in (sample["prefix"], *sample["continuations"])]
    assert len(written) == 6 and any(",1;" in text for text in written)
    assert not any(";=" in text for text in written)
    assert {reward for sample in samples for reward in sample["rewards"]} == {0.0, 1.0}
    last = metrics(tmp_path)[-1]
    assert last["response/cut"] == 0.0 and last["update/abs_log_ratio"] < 0.1
    other = call("train", *flags, "--steps=3")
    assert other.returncode == 2 and "rollout.stop" in other.stderr


def test_the_table_is_small_for_a_real_vocabulary():
    """A few groups of tokens, whatever the size of the vocabulary."""
    text = dataclasses.replace(load_text(QWEN, "plain"), stop=("\n\nQuestion:", "<|im_end|>"))
    states, groups = text.stops.following.shape
    assert states == len("\n\nQuestion:") + len("<|im_end|>") and groups < 100
