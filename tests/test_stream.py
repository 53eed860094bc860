"""What is held out of training, and the order in which the other problems come."""

import collections

import grain
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problem_files import jsonl

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.overlap import normalised
from fr3e_jax.problems.sources import FileTask, file_task, stream
from fr3e_jax.types import Problem

# --- held-out problems


def labelled(*questions):
    return [{"question": q, "answer": i} for i, q in enumerate(questions)]


questions = st.lists(st.text(alphabet="abAB .", min_size=1).filter(str.strip), min_size=1, max_size=30)


@given(questions, st.integers(1, 8), st.randoms(use_true_random=False))
def test_held_out_questions_are_in_no_training_problem_whatever_the_order(
    tmp_path_factory, texts, count, draw
):
    folder = tmp_path_factory.mktemp("split")
    rows = labelled(*texts)
    name = jsonl(folder, *rows)
    different = {normalised(q.strip()) for q in texts}
    if count >= len(different):
        with pytest.raises(
            ConfigError, match=rf"has {len(different)} different questions, too few to hold {count}"
        ):
            file_task(SourceConfig(name), count)
        return
    task = file_task(SourceConfig(name), count)
    kept, trained = [[normalised(p.question) for p in side] for side in (task.kept, task.problems)]
    assert len(set(kept)) == len(kept) == count
    assert not set(kept) & set(trained)
    assert set(kept) | set(trained) == different
    draw.shuffle(rows)
    again = file_task(SourceConfig(jsonl(folder, *rows, name="a.jsonl")), count)
    assert again.kept == task.kept
    assert sorted(again.problems, key=repr) == sorted(task.problems, key=repr)


def test_training_keeps_the_order_of_the_file_and_more_held_out_contain_fewer(tmp_path):
    name = jsonl(tmp_path, *labelled(*(f"question {i}" for i in range(500))))
    whole, fewer, more = (file_task(SourceConfig(name), count) for count in (0, 20, 50))
    assert len(whole) == 500 and not whole.kept
    assert [p for p in whole.problems if p not in fewer.kept] == fewer.problems
    assert more.kept[:20] == fewer.kept == fewer.held_out(100)
    assert fewer.held_out(3) == fewer.kept[:3]
    assert fewer[479] == fewer.problems[479]
    with pytest.raises(IndexError):
        fewer[480]
    with pytest.raises(ConfigError, match="no problems are held out"):
        whole.held_out(1)


# --- the stream


def task(label, count):
    return FileTask([Problem(f"{label}{i}", "1", "math") for i in range(count)], [])


def taken(problems, start, count):
    part = problems[start : start + count]
    assert len(part) == count
    return [part[i].question for i in range(count)]


def test_one_task_is_drawn_in_the_order_that_earlier_runs_had():
    """As shuffle().repeat() of grain gives it, whatever the weight."""
    alone = task("a", 7)
    expected = grain.MapDataset.source(alone).seed(3).shuffle().repeat()
    assert taken(stream([alone], [5.0], 3), 0, 40) == [expected[i].question for i in range(40)]


@pytest.mark.parametrize("tasks", [[task("a", 90)], [task("a", 90), task("b", 350), task("c", 60)]])
def test_a_stream_goes_on_from_any_position_and_another_seed_gives_another(tasks):
    weights = [2.0, 7.0, 1.0][: len(tasks)]
    through = taken(stream(tasks, weights, 5), 0, 300)
    resumed = stream(tasks, weights, 5)
    assert taken(resumed, 137, 100) == through[137:237]
    assert resumed[42].question == through[42]
    assert taken(resumed, 0, 9) == through[:9]
    assert taken(stream(tasks, weights, 6), 0, 300) != through


def test_every_epoch_of_a_task_has_each_problem_once_in_a_new_order():
    tasks = [task("a", 11), task("b", 50)]
    mixed = taken(stream(tasks, [1.0, 1.0], 0), 0, 220)
    for label, size in (("a", 11), ("b", 50)):
        drawn = [q for q in mixed if q[0] == label]
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs)


@pytest.mark.parametrize("weights", [[40_315, 8_523], [0.1, 0.9], [3, 3], [1e-3, 2e-3]])
def test_tasks_have_their_shares_everywhere_in_the_stream(weights):
    mixed = stream([task("a", 3000), task("b", 1700)], weights, 0)
    for start in (0, 10_007, 10**9):
        counts = collections.Counter(question[0] for question in taken(mixed, start, 1000))
        share = weights[0] / sum(weights)
        assert counts["a"] == pytest.approx(1000 * share, abs=1 + 10 * share)


def test_two_tasks_of_one_length_are_not_shuffled_alike():
    mixed = taken(stream([task("a", 40), task("b", 40)], [1, 1], 0), 0, 80)
    orders = [[int(q[1:]) for q in mixed if q[0] == label] for label in "ab"]
    assert orders[0] != orders[1]
