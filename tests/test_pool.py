"""Workers that judge: whatever an answer does to one, it spoils its own verdict alone."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fr3e_jax.rewards.pool import PIECE, Asked, ScoringPool
from fr3e_jax.rewards.verdict import ScorerError, Verdict

SCORER = """
import ctypes, os, signal, sys, time

def problems(split):
    return [{"question": split, "answer": "5"}]

def score(response, answer):
    if response == "hang":
        while True:
            pass
    if response == "deaf":  # in one long call that no signal of Python's ends
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.CDLL(None).sleep(600)
    if response == "power":
        return len(str(9 ** 9 ** 9)) == 0
    if response == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "leave":
        os._exit(0)
    if response == "grow":
        return len(bytearray(2**36)) > 0
    if response == "deep":
        return score_deep(0)
    if response == "who":
        with open(answer, "a") as file:
            print(os.getpid(), "jax" in sys.modules, file=file)
        return True
    if response == "fail":
        raise KeyError("nothing here")
    return response == answer

def score_deep(n):
    return score_deep(n + 1)
"""


@pytest.fixture
def scorer(tmp_path):
    (tmp_path / "own.py").write_text(SCORER)
    return str(tmp_path / "own.py")


@pytest.fixture
def pool(scorer):
    pool = ScoringPool(["numeric", f"own:{scorer}"], workers=2, time_limit=2.0, memory_gb=1.0)
    yield pool
    pool.close()


def own(scorer, *responses, answer="5"):
    return [Asked(f"own:{scorer}", response, answer, None) for response in responses]


def right(pool, asked):
    return [verdict.right for verdict in pool.begin(asked).result()]


# Each of another kind: ended by the time limit, gone by itself, out of memory.
OFTEN = ("hang", "die", "grow")
RARELY = ("deaf", "power", "leave", "deep")


@pytest.mark.parametrize("bad", [*OFTEN, *(pytest.param(bad, marks=pytest.mark.slow) for bad in RARELY)])
def test_an_answer_that_breaks_its_worker_is_wrong_and_spoils_no_other(pool, scorer, bad):
    around = own(scorer, *(["5", "6"] * PIECE))
    started = time.monotonic()
    half = [True, False] * PIECE
    assert right(pool, [*around, *own(scorer, bad), *around]) == [*half, False, *half]
    assert time.monotonic() - started < 30
    assert pool.timed_out == (bad not in ("grow", "deep"))
    # The workers that were ended have others in their place.
    assert right(pool, own(scorer, "5", "6")) == [True, False]


def test_verdicts_come_in_the_order_of_the_answers_and_others_need_no_worker(pool, scorer):
    asked = [
        *own(scorer, "6"),
        Asked("numeric", "so 5", "5", None),
        *own(scorer, "5"),
        Asked("numeric", "so 6", "5", None),
    ] * 20
    assert right(pool, asked) == [False, True, True, False] * 20
    inline = ScoringPool(["numeric"], workers=1)
    assert inline.begin([Asked("numeric", "so 5", "5", None)]).result() == [Verdict(True, "5")]
    assert inline.begin([]).result() == []


def test_the_caller_goes_on_while_answers_are_judged(pool, scorer):
    right(pool, own(scorer, "5"))  # workers are there
    started = time.monotonic()
    judging = pool.begin(own(scorer, "hang"))
    assert time.monotonic() - started < 0.5
    assert judging.result() == [Verdict(False, "", reason="the scorer ran out of time")]


def test_what_is_asked_twice_is_judged_once_in_a_process_without_jax(pool, scorer, tmp_path):
    told = tmp_path / "told"
    assert right(pool, own(scorer, *["who"] * 40, answer=str(told))) == [True] * 40
    (line,) = told.read_text().splitlines()
    assert line.split()[1] == "False" and int(line.split()[0]) != os.getpid()


def test_a_scorer_of_the_users_that_fails_ends_the_run_with_its_place(pool, scorer):
    with pytest.raises(ScorerError, match=r"own\.py.*nothing here"):
        pool.begin(own(scorer, "5", "fail")).result()


def test_a_module_that_is_slow_to_import_costs_no_verdict(scorer, tmp_path):
    """Workers load it before their time runs."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(1.5)\n" + SCORER)
    pool = ScoringPool([f"own:{slow}"], workers=1, time_limit=1.0)
    assert right(pool, own(slow, "5", "6")) == [True, False]
    assert pool.timed_out == 0
    pool.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_workers_that_are_ended_while_they_rest_are_replaced(scorer, tmp_path, how):
    pool = ScoringPool([f"own:{scorer}"], workers=1)
    for n in range(3):
        told = tmp_path / f"told{n}"
        assert right(pool, own(scorer, "who", answer=str(told))) == [True]
        os.kill(int(told.read_text().split()[0]), how)
        time.sleep(1)
    assert pool.timed_out == 0
    pool.close()


def test_workers_that_end_before_they_are_asked_fail_where_verdicts_are_waited_for(scorer, monkeypatch):
    """There all processes of a run learn of it; where judging begins, one would end alone."""
    pool = ScoringPool([f"own:{scorer}"], workers=1)
    monkeypatch.setattr(pool, "send", lambda piece: (_ for _ in ()).throw(ScorerError("they end")))
    judging = pool.begin(own(scorer, "5"))
    with pytest.raises(ScorerError, match="they end"):
        judging.result()
    pool.close()


def test_workers_that_cannot_start_end_the_run_with_what_to_change(scorer):
    pool = ScoringPool([f"own:{scorer}"], workers=1, memory_gb=0.001)
    with pytest.raises(ScorerError, match=r"raise scoring\.memory_gb"):
        pool.begin(own(scorer, "5")).result()
    pool.close()


def test_a_signal_to_all_of_the_commands_processes_leaves_its_workers(scorer, tmp_path):
    """The command is to end as it wants to, and for that it needs them."""
    told = tmp_path / "told"
    pool = ScoringPool([f"own:{scorer}"], workers=1)
    assert right(pool, own(scorer, "who", answer=str(told))) == [True]
    assert os.getpgid(int(told.read_text().split()[0])) != os.getpgid(0)
    pool.close()


def test_a_scorer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="there is no scorer 'maths'; choose one of"):
        ScoringPool(["maths"])


def test_closing_does_not_wait_for_a_worker_that_hangs(scorer):
    pool = ScoringPool([f"own:{scorer}"], workers=1, time_limit=60.0)
    right(pool, own(scorer, "5"))
    pool.begin(own(scorer, "hang"))
    time.sleep(0.5)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 15


PARENT = """
import sys, time
print("imported", flush=True)
from fr3e_jax.rewards.pool import Asked, ScoringPool
own = f"own:{sys.argv[1]}"
pool = ScoringPool([own], workers=1, time_limit=600.0)
pool.begin([Asked(own, "who", sys.argv[2], None)]).result()
print("judged", flush=True)
if sys.argv[3] == "busy":
    pool.begin([Asked(own, "deaf", "5", None)])
    time.sleep(1)
    print("busy", flush=True)
time.sleep(600)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("at", ["rest", "busy"])
def test_workers_end_with_the_command_that_was_killed(scorer, tmp_path, at):
    """And they do not run its module again when they start."""
    told = tmp_path / "told"
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    command = [sys.executable, str(tmp_path / "parent.py"), scorer, str(told), at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        said = ["imported", "judged", "busy"][: 3 if at == "busy" else 2]
        assert [parent.stdout.readline().strip() for _ in said] == said
        worker = int(told.read_text().split()[0])
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(worker)
