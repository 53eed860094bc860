"""launch/tpu.sh starts runs, watches them, and brings them through preemptions; what it shows of them."""

import json
import shlex
import signal
import stat
import subprocess
import time

import pytest
from laptop import SECRET, TRAINING, needs_tools, tpus

pytestmark = needs_tools


# ---- running

AWKWARD = ["--name", "two  words", "it's", '"$HOME"', "a\\b", "", ";&|", "*", "#x", "héllo", "`id`"]


def test_arguments_and_names_reach_training_unchanged(rent):
    laptop = rent().ready()
    laptop.call("run", "my first run", "--", *AWKWARD)
    for number in range(2):
        laptop.until((laptop.worker(number) / "argv").exists)
        assert json.loads((laptop.worker(number) / "argv").read_text()) == [
            *("-m", "fr3e_jax.train", "--distributed.initialize", "true"),
            *("--run_dir", "gs://my-bucket/runs/my first run", *AWKWARD),
        ]


def test_a_run_outlives_the_ssh_session_and_keeps_its_exit_code(rent):
    laptop = rent().ready()
    laptop.plan("exit=7")
    laptop.call("run", "my run", *TRAINING)
    code = laptop.worker(1) / ".fr3e" / "runs" / "my run" / "exit_code"
    laptop.until(code.exists)
    assert code.read_text() == "7\n"
    shown = laptop.call("status", "my run")
    assert "worker 1: ended with exit code 7, run my run" in shown
    assert "metrics: none yet" in shown and "complete: no" in shown


def test_a_run_that_is_going_on_is_not_started_twice(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    laptop.forget()
    assert "going on already" in laptop.call("run", "first", *TRAINING)
    assert "'first' is going on" in laptop.call("run", "second", *TRAINING, expect=1)
    assert not laptop.said("worker.sh start")
    # gcloud repeats a command whose connection broke, with nothing left on its standard input.
    (laptop.cloud / "started-0").write_text("0")
    start = tpus("tpu-vm", "ssh", "--worker=0", "--command=bash fr3e_jax/launch/worker.sh start first")
    again = subprocess.run(["gcloud", *start], env=laptop.environment(), stdin=subprocess.DEVNULL)
    assert again.returncode == 0 and (laptop.cloud / "started-0").read_text() == "0"


def test_input_that_broke_off_starts_nothing(rent):
    laptop = rent().ready()
    start = tpus("tpu-vm", "ssh", "--worker=0", "--command=bash fr3e_jax/launch/worker.sh start first")
    broken = subprocess.run(
        ["gcloud", *start], env=laptop.environment(), input=b"HF_TOKEN=hf", capture_output=True
    )
    assert broken.returncode == 1 and b"broke off" in broken.stderr
    assert not (laptop.cloud / "started-0").exists()


def test_a_run_that_one_worker_cannot_start_is_ended_on_the_others(rent):
    laptop = rent().ready()
    (laptop.worker(1) / ".fr3e" / "runs" / "first").mkdir()
    (laptop.worker(1) / ".fr3e" / "runs" / "first" / "log.txt").mkdir()  # cannot be written to
    shown = laptop.call("run", "first", *TRAINING, expect=1)
    assert "worker 1 failed to start the run" in shown
    laptop.until(lambda: "worker 0: ended with exit code" in laptop.call("status"))


def test_what_training_leaves_behind_does_not_count_as_a_run(rent):
    laptop = rent().ready()
    laptop.plan("leave,exit=1")
    laptop.call("run", "first", *TRAINING)
    laptop.until(lambda: laptop.call("status").count("ended with exit code 1") == 2)
    laptop.plan("hold")
    laptop.call("run", "first", *TRAINING)
    assert laptop.call("status").count("running") == 2


def test_stop_lets_training_save(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    laptop.until(lambda: (laptop.worker(1) / "argv").exists() and (laptop.worker(0) / "argv").exists())
    time.sleep(0.2)  # until its handler is there
    laptop.call("stop")
    laptop.until(lambda: laptop.call("status").count("stopped with exit code 0") == 2)
    laptop.call("run", "first", *TRAINING)
    assert laptop.call("status").count("running") == 2


def test_logs_of_any_worker(rent):
    laptop = rent().ready()
    laptop.plan("exit=0")
    laptop.call("run", "my run", *TRAINING)
    assert "training 0" in laptop.call("logs", "my run", "--worker", "1", "--no-follow")
    assert "training 0" in laptop.call("logs", "--no-follow")
    assert "was not started here" in laptop.call("logs", "other", "--no-follow", expect=1)
    following = laptop.start("logs", "--lines=1")
    assert following.stdout is not None and following.stdout.readline()
    following.kill()
    following.wait()
    following.stdout.close()  # what it started holds the other end for a while
    laptop.forget()
    laptop.call("logs", "my run", "--lines=7", "--no-follow")
    assert laptop.commands() == [
        tpus(
            "tpu-vm",
            "ssh",
            "--worker=0",
            "--command=bash fr3e_jax/launch/worker.sh logs 7 no 'my run'",
        )
    ]


# ---- watching


def test_watch_ends_when_the_run_is_complete_and_fetch_brings_the_model(rent):
    laptop = rent().ready()
    laptop.plan("complete")
    assert "my run is complete" in laptop.call("run", "my run", "--watch", *TRAINING)
    laptop.forget()
    assert "is complete" in laptop.call("run", "my run", *TRAINING)
    assert not laptop.said("worker.sh start")
    assert 'metrics: {"step": 2}' in laptop.call("status", "my run")
    laptop.forget()
    laptop.call("fetch", "my run", "a copy")
    assert (laptop.path / "a copy" / "config.json").exists()
    assert laptop.commands()[-1] == [
        *("storage", "rsync", "--recursive", "gs://my-bucket/runs/my run/model"),
        *("a copy", "--project=my-project"),
    ]


def test_fetch_refuses_a_run_that_is_not_complete(rent):
    laptop = rent()
    assert "not complete" in laptop.call("fetch", "first", expect=1)
    assert not laptop.said("rsync") and not (laptop.path / "runs").exists()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "state", ["SUSPENDED", pytest.param("FAILED", marks=slow), pytest.param("ACTIVE", marks=slow)]
)
def test_a_preempted_slice_is_created_again_and_the_run_goes_on(rent, state):
    laptop = rent().ready()
    laptop.plan(f"checkpoint=5,preempt={state}", "complete")
    shown = laptop.call("run", "first", "--watch", "--", "--steps", "9", HF_TOKEN=SECRET)
    assert "was preempted" in shown and "first is complete" in shown
    assert laptop.said(" delete ") == [tpus("queued-resources", "delete", "--force")]
    assert len(laptop.said(" create ")) == 1
    deeds = [
        c
        for c in laptop.commands()
        if c[3] in ("create", "delete") or "git fetch" in c[-2] or " start " in c[-2]
    ]
    kinds = [c[3] if c[3] != "ssh" else "start" if " start " in c[-2] else "install" for c in deeds]
    assert kinds == ["start", "start", "delete", "create", "install", "install", "start", "start"]
    starts = laptop.said(" start ")
    assert sorted(starts[:2]) == sorted(starts[2:])  # the same run, with the same arguments
    assert (laptop.worker(0) / "token").read_text() == SECRET  # on the new slice too


def test_an_on_demand_slice_that_was_lost_is_created_again(rent):
    laptop = rent(CAPACITY="on-demand").ready()
    laptop.plan("preempt", "complete")
    laptop.call("run", "first", "--watch", *TRAINING)
    assert laptop.said(" delete ") == [tpus("tpu-vm", "delete")]


def test_watch_does_not_bring_back_a_slice_that_a_person_deleted(rent):
    laptop = rent().ready()
    watch = laptop.start("run", "first", "--watch", *TRAINING)
    laptop.until((laptop.worker(1) / "argv").exists)
    laptop.call("delete", "--yes")
    shown, _ = watch.communicate(timeout=20)
    assert watch.returncode == 1 and "somebody deleted it" in shown
    assert not laptop.said(" create ")


def test_a_run_whose_options_are_wrong_is_not_started_again(rent):
    laptop = rent().ready()
    laptop.plan("exit=2")
    shown = laptop.call("run", "first", "--watch", *TRAINING, expect=2)
    assert "options are at fault" in shown and "training 0" in shown
    assert (laptop.cloud / "started-0").read_text() == "1"
    laptop.plan("exit=2", "complete")  # corrected, and started again by the person
    laptop.call("run", "first", "--watch", *TRAINING)


def test_a_run_that_fails_without_progress_is_given_up(rent):
    laptop = rent(MAX_FAILURES="2").ready()
    laptop.plan("checkpoint=1,exit=1", "checkpoint=10,exit=1", "exit=1")
    shown = laptop.call("run", "first", "--watch", *TRAINING, expect=1)
    # Two checkpoints were new; the third end is the second in a row without one.
    assert (laptop.cloud / "started-0").read_text() == "3"
    assert "giving up" in shown and "exit codes 1 1" in shown and "training 2" in shown


def test_a_run_that_saved_and_ended_is_started_again(rent):
    laptop = rent().ready()
    laptop.plan("checkpoint=1,exit=0", "complete")
    laptop.call("run", "first", "--watch", *TRAINING)
    assert (laptop.cloud / "started-1").read_text() == "2"
    assert not laptop.said(" delete ")


def test_watch_leaves_a_run_that_was_stopped_by_hand_stopped(rent):
    laptop = rent().ready()
    watch = laptop.start("run", "first", "--watch", *TRAINING)
    laptop.until(lambda: all((laptop.worker(n) / "argv").exists() for n in range(2)))
    time.sleep(0.2)
    laptop.call("stop")
    shown, _ = watch.communicate(timeout=20)
    assert watch.returncode == 3 and "stopped by hand" in shown
    assert (laptop.cloud / "started-0").read_text() == "1"
    laptop.plan("complete")
    laptop.call("run", "first", "--watch", *TRAINING)


def test_a_watch_that_is_taken_up_again_starts_nothing(rent):
    laptop = rent().ready()
    laptop.call("run", "first", *TRAINING)
    laptop.forget()
    watch = laptop.start("run", "first", "--watch", *TRAINING)
    laptop.until(lambda: len(laptop.said("worker.sh state")) >= 4)
    watch.send_signal(signal.SIGTERM)
    watch.communicate(timeout=20)
    assert not laptop.said("worker.sh start") and laptop.call("status").count("running") == 2


@slow
def test_watch_reports_a_worker_that_stays_out_of_reach(rent):
    laptop = rent(TYPE="v5p-8", CAPACITY="on-demand", MAX_FAILURES="1", POLL_SECONDS="0").ready()
    (laptop.cloud / "unreachable").write_text("0")
    assert "cannot reach worker(s) 0" in laptop.call("run", "first", "--watch", *TRAINING, expect=1)
    assert not laptop.said("worker.sh start") and not laptop.said(" delete ")


def test_watch_gives_up_where_no_new_slice_can_be_had(rent):
    laptop = rent(MAX_FAILURES="2").ready()
    laptop.plan("preempt=SUSPENDED")
    (laptop.cloud / "no_capacity").touch()
    shown = laptop.call("run", "first", "--watch", *TRAINING, expect=1)
    assert "no more capacity" in shown and "could not be created (2 of 2" in shown


# ---- secrets


def test_no_secret_leaves_the_one_file_for_it(rent):
    laptop = rent().ready()
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "wandb_secretsecret"}
    laptop.plan("exit=0", "hold")
    shown = "".join(
        laptop.call(*words, **secrets)
        for words in (
            ["run", "first", "--dry-run", *TRAINING],
            ["run", "first", *TRAINING],
            ["status", "first"],
            ["logs", "--no-follow"],
            ["install"],
            ["run", "first", *TRAINING],
            ["stop"],
        )
    )
    assert "with HF_TOKEN WANDB_API_KEY" in shown
    holders = {str(f) for f in laptop.cloud.rglob("*") if f.is_file() and b"secretsecret" in f.read_bytes()}
    homes = [laptop.worker(n) for n in range(2)]
    for home in homes:
        assert (home / "token").read_text() == SECRET
        assert stat.S_IMODE((home / ".fr3e" / "secrets").stat().st_mode) == 0o600
    # "token" is what the stand-in of training writes down for this test.
    assert holders == {str(h / name) for h in homes for name in ("token", ".fr3e/secrets")}
    assert "secretsecret" not in shown and "secretsecret" not in json.dumps(laptop.commands())


def test_a_secret_among_the_arguments_is_refused(rent):
    laptop = rent()
    shown = laptop.call("run", "first", "--", f"--key={SECRET}", HF_TOKEN=SECRET, expect=2)
    assert "HF_TOKEN" in shown and SECRET not in shown
    assert not laptop.commands()


# ---- dry runs


@pytest.mark.parametrize(
    "words",
    [
        ["install"],
        ["run", "my run", "--", *AWKWARD],
        ["status", "my run"],
        ["stop"],
        ["fetch", "done", "a copy"],
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_runs_nothing_and_can_be_pasted(rent, words):
    laptop = rent().ready()
    (laptop.cloud / "bucket" / "my-bucket" / "runs" / "done" / "model").mkdir(parents=True)
    (laptop.cloud / "bucket" / "my-bucket" / "runs" / "done" / "summary.json").touch()
    shown = laptop.call(words[0], "--dry-run", *words[1:], HF_TOKEN=SECRET)
    assert not laptop.commands()
    laptop.call(*words)
    really = laptop.commands()
    laptop.forget()
    # From standard input, as a paste is: a command that reads it would swallow the ones behind.
    subprocess.run(["bash"], input=shown, text=True, cwd=laptop.path, env=laptop.environment(), check=False)
    assert sorted(laptop.commands()) == sorted(really)


def test_a_dry_run_of_create_and_delete_shows_the_commands(rent):
    laptop = rent()
    shown = laptop.call("create", "--dry-run")
    lines = [shlex.split(line) for line in shown.splitlines() if not line.startswith("#")]
    assert ["gcloud", *tpus("queued-resources", "describe", "--format=value(state.state)")] in lines
    create = [line for line in lines if "create" in line]
    laptop.call("create")
    assert create == [["gcloud", *c] for c in laptop.said(" create ")]
    shown = laptop.call("delete", "--dry-run")
    laptop.forget()
    laptop.call("delete", "--yes")
    assert [shlex.split(shown)] == [["gcloud", *c] for c in laptop.said(" delete ")]
