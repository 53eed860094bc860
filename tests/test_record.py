"""Every rollout is kept as a row that says where it belongs, what it says and what became of it."""

import collections
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import metrics
from written_world import (
    BASE_LENGTH,
    PEAKS,
    QUERY_LENGTH,
    REWARD,
    B,
    M,
    R,
    base_id,
    expected_advantage,
    logprob_of,
    own_id,
    own_length,
    prefix_of,
    query_id,
    states_in,
    written_run,
)

from fr3e_jax.config import QUICKSTART_MODEL, ExploreConfig, RolloutConfig
from fr3e_jax.pretrained.spelled import texts_with_ends
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.rewards.verdict import WRONG, Verdict
from fr3e_jax.rewards.verify import Note, notes_on
from fr3e_jax.run.reporter import Stopwatch
from fr3e_jax.run.rollout_files import ROLLOUT_COLUMNS, RolloutFiles, read_rollouts
from fr3e_jax.step.record import Recorder
from fr3e_jax.step.rounds import close_round, open_round


class Numbers(Sequence):
    """A tokenizer's pieces: each id is written as its number."""

    def __len__(self):
        return 10**8

    def __getitem__(self, token):
        return f"{token} ".encode()


def recorded(tmp_path, config, parts, positions=(0,), step=3):
    """The table of a step whose rounds begin at these places in the stream."""
    hosts, watch = parts.verifier.hosts, Stopwatch()
    files = RolloutFiles(tmp_path, 0, 1.0)
    recorder = Recorder(files, 1, hosts, Numbers(), print).begin(step)
    for position in positions:
        opened = open_round(config, parts, {}, step, position, watch, recorded=True)
        close_round(config, parts, opened, watch, recorder)
    recorder.end()
    files.close()
    return read_rollouts(tmp_path, step)


def why_not(rewards):
    return "all right" if all(rewards) else None if any(rewards) else "all wrong"


@pytest.fixture(scope="module")
def written_rows(tmp_path_factory):
    """The table of two rounds of the written world, and its rows."""
    config, parts = written_run()
    table = recorded(tmp_path_factory.mktemp("run"), config, parts, (0, B))
    return table, table.to_pylist()


def test_every_row_is_of_the_place_that_it_names(written_rows):
    """Against the written world, in which each token says where it belongs."""
    seen = collections.Counter()
    for row in written_rows[1]:
        q, b = row["query"], row["trajectory"]
        assert (row["step"], row["round"]) == (3, q // B) and row["stopped"]
        assert (row["question"], row["answer"], row["source"]) == (f"query {q}", f"answer {q}", "")
        assert row["query_token"] == [query_id(q, t) for t in range(QUERY_LENGTH[q])]
        if row["kind"] == "base":
            expected = [base_id(q, b, t) for t in range(BASE_LENGTH[q, b])]
            assert row["reward"] == float(b == 0) and row["right"] == (b == 0)
            names = "state position statistic rollout value alpha advantage accepted rejected".split()
            assert [row[name] for name in names] == [None] * 9
            entropy = np.full(len(expected), 0.1)
            entropy[PEAKS[q, b]], entropy[0] = 2.0, 9.0
            np.testing.assert_allclose(row["entropy"], entropy.astype(np.float32))
            seen["base"] += 1
        else:
            j, m = row["state"], row["rollout"]
            expected = [own_id(q, b, j, m, t) for t in range(own_length(q, b, j, m))]
            assert row["position"] == len(prefix_of(q, b, j))
            assert row["statistic"] == (2.0 if j else None)
            assert row["kept"] and row["reward"] == REWARD[q, b, j, m]
            assert row["value"] == pytest.approx(REWARD[q, b, j].mean())
            assert row["advantage"] == pytest.approx(expected_advantage(q, b, j)[m], abs=1e-6)
            assert row["accepted"] == (row["rejected"] is None)
            assert row["rejected"] == why_not(REWARD[q, b, j])
            seen[q, b] += 1
        assert row["token"] == expected
        np.testing.assert_allclose(row["logprob"], logprob_of(expected))
        assert row["text"] == "".join(f"{token} " for token in expected)
        assert [row["text"][:end].split()[-1] for end in row["ends"]] == list(map(str, expected))
    kept = {place for place in seen if place != "base"}
    assert seen["base"] == 2 * B * R and {q for q, _ in kept} == set(range(2 * B))
    assert {place: seen[place] for place in kept} == {(q, b): states_in(q, b) * M for q, b in kept}
    assert {(r["query"], r["trajectory"]) for r in written_rows[1] if r["kept"]} == kept


def test_rows_stand_trajectory_by_trajectory_behind_their_base(written_rows):
    places = [
        (r["round"], r["query"], r["trajectory"], r["kind"], r["state"] or 0, r["rollout"] or 0)
        for r in written_rows[1]
    ]
    assert places == sorted(places) and len(set(places)) == len(places)


def test_the_types_in_a_file_are_those_that_are_documented(written_rows):
    """None is a dictionary, which the library datasets does not read."""
    for field in written_rows[0].schema:
        kind = ROLLOUT_COLUMNS[field.name].kind
        wanted = {"string": pa.string(), "bool": pa.bool_()}.get(kind) or (
            pa.list_(getattr(pa, kind[5:-1])()) if kind.startswith("list<") else getattr(pa, kind)()
        )
        assert field.type == wanted, field.name
    assert written_rows[0].schema.names == list(ROLLOUT_COLUMNS)


def test_without_positions_the_base_trajectories_are_the_rollouts_of_the_bare_query(tmp_path):
    config, parts = written_run(
        explore=ExploreConfig(positions=0, rollouts=R), rollout=RolloutConfig(queries=B, max_prompt=4)
    )
    rows = recorded(tmp_path, config, parts).to_pylist()
    assert len(rows) == B * R
    for row in rows:
        right = row["trajectory"] == 0
        assert row["kind"] == "base" and not row["kept"] and row["reward"] == right
        assert (row["state"], row["position"], row["rollout"], row["statistic"]) == (0, 0, None, None)
        assert row["value"] == 1 / R and row["alpha"] == 1 and row["accepted"] and row["rejected"] is None
        assert row["advantage"] == pytest.approx(right - 1 / R)


def test_a_step_that_is_not_recorded_keeps_nothing(tmp_path):
    config, parts = written_run()
    for every, step in ((0, 3), (2, 3)):
        files = RolloutFiles(tmp_path, 0, 1.0)
        assert Recorder(files, every, parts.verifier.hosts).begin(step) is None
    opened = open_round(config, parts, {}, 3, 0, Stopwatch())
    assert opened.for_record is None and not any(tmp_path.iterdir())


def test_the_rollouts_of_a_run_add_up_to_its_metrics(whole_run):
    directory, told = whole_run
    lines = {line["step"]: line for line in metrics(directory)}
    table = read_rollouts(directory)
    assert str(directory / "rollouts") in told
    by_step = {s: list(rows) for s, rows in itertools.groupby(table.to_pylist(), lambda row: row["step"])}
    assert list(by_step) == [step for step, line in lines.items() if line.get("rounds")] == [1, 2, 4]
    for step, rows in by_step.items():
        line, partial = lines[step], [row for row in rows if row["kind"] == "partial"]
        assert sum(len(row["token"]) for row in rows) == line["tokens/generated"]
        assert 1 + max(row["round"] for row in rows) == line["rounds"]
        states = {(r["query"], r["trajectory"], r["state"]): r["accepted"] for r in partial}
        assert collections.Counter(states.values()) == {
            True: line["states/accepted"],
            False: line["states/rejected"],
        }
        for row in rows:
            assert row["text"] and row["ends"][-1] == len(row["text"])
            right = row["text"].endswith(f";={row['answer']}") or row["text"] == f"={row['answer']}"
            assert not row["right"] or right or row["position"]
    assert read_rollouts(directory, 2).equals(table.filter(pa.compute.equal(table["step"], 2)))


SPLIT = [b"a", "é".encode()[:1], "é".encode()[1:], b"", "日本".encode(), b"\xff", b"bc"]


def test_a_character_of_several_tokens_ends_with_the_last_of_them():
    rows = [[0, 1, 2, 4, 3], [], [2, 0, 1], [6, 5, 6], [0, 99, 6]]
    texts, ends = texts_with_ends(
        SPLIT, np.concatenate(rows).astype(np.int32), np.array(list(map(len, rows)))
    )
    assert texts == ["aé日本", "", "\ufffda\ufffd", "bc\ufffdbc", "abc"]
    assert ends.tolist() == [1, 1, 2, 4, 4, 1, 2, 3, 2, 3, 5, 1, 1, 3]


@given(st.lists(st.lists(st.integers(0, len(SPLIT)), max_size=8), max_size=5))
def test_texts_are_what_the_bytes_of_each_row_say_alone(rows):
    token = np.array([t for row in rows for t in row], np.int32)
    texts, ends = texts_with_ends(SPLIT, token, np.array([len(row) for row in rows], np.int32))
    spelled = [b"".join(SPLIT[t] if t < len(SPLIT) else b"" for t in row) for row in rows]
    assert texts == [text.decode(errors="replace") for text in spelled]
    for row, text in zip(rows, texts, strict=True):
        own, ends = ends[: len(row)], ends[len(row) :]
        assert (np.diff(own) >= 0).all() and (not row or own[-1] == len(text))


@pytest.mark.parametrize("directory", [QUICKSTART_MODEL, Path(__file__).parent / "qwen2.5_tokenizer_cut"])
def test_texts_are_those_that_the_tokenizer_decodes(directory):
    """Control tokens included, which are left out of both."""
    text = load_text(directory, "plain")
    token = np.random.default_rng(0).integers(0, len(text.tokenizer), (60, 30)).astype(np.int32)
    texts, _ = texts_with_ends(text.spoken, token.reshape(-1), np.full(60, 30))
    assert texts == text.decode(token.tolist())


def test_the_note_on_an_answer_says_why_it_was_judged_so():
    answered = [
        Verdict(True, "7"),
        WRONG._replace(reason="the scorer ran out of time"),
        Verdict(0.5, "x" * 2000, (("form", 0.25), ("sum", -1.0)), "close"),
    ]
    formed = [Verdict(True, ""), Verdict(True, ""), Verdict(False, "")]
    assert notes_on(4, [0, 1, 3], answered, formed) == [
        Note("", "7"),
        Note("the scorer ran out of time", ""),
        Note("cut off by the length limit", ""),
        Note("close; form 0.25, sum -1; not of the form reward.pattern", "x" * 1000),
    ]
