"""`python -m fr3e_jax.evaluate`: asks what it should, writes it safely, goes on, and tells the truth."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from etils import epath
from evaluations import PROBLEMS, SAMPLES, answers, by_place, settings, write_suite
from support import mesh_of, two_processes

from fr3e_jax.cli import parse
from fr3e_jax.config import ConfigError, MeshConfig, SourceConfig
from fr3e_jax.evaluate import evaluate
from fr3e_jax.evaluation.record import ANSWERS, SETTINGS, SUMMARY, open_directory
from fr3e_jax.evaluation.settings import EvaluationConfig
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.run.lock import Lock


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="module")
def done(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "evaluation"
    return out, evaluate(settings(suite, out))


def test_every_answer_is_written_once_with_its_verdict(done, suite):
    out, summary = done
    lines = answers(out)
    assert sorted(by_place(lines)) == [(p, s) for p in range(PROBLEMS) for s in range(SAMPLES)]
    assert len(lines) == PROBLEMS * SAMPLES
    asked = [json.loads(line) for line in suite.read_text().splitlines()]
    for line in lines:
        assert asked[line["problem"]] == {"question": line["question"], "answer": line["answer"]}
        said = line["response"].rpartition("=")[2]
        assert line["right"] == (said == line["answer"] and not line["truncated"])
        assert line["length"] > 10
    shares = [[by_place(lines)[p, s]["right"] for s in range(SAMPLES)] for p in range(PROBLEMS)]
    (told,) = summary["benchmarks"]
    assert told["avg"] == pytest.approx(np.mean(shares)) and 0 < told["avg"] < 1
    assert told["pass"]["1"] == pytest.approx(told["avg"])
    assert told["length"] == pytest.approx(np.mean([line["length"] for line in lines]))
    assert json.loads((out / SUMMARY).read_text()) == summary


def test_what_was_asked_of_whom_is_in_the_answers_the_summary_and_the_table(suite, tmp_path, capsys):
    """`auto` and defaults as what they came to, and the prompt as the model saw it."""
    template = "{question}"  # which is not its name, and adds nothing
    changed = {"template": template, "temperature": -1.0, "compute_dtype": "auto", "samples": 1}
    summary = evaluate(settings(suite, tmp_path / "e", **changed))
    shown = capsys.readouterr().out
    asked = {"model": "quickstart", "source": "quickstart", "step": None, "template": template}
    asked |= {"compute_dtype": "float32", "stop": []}
    drawn = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_response": 48, "seed": 0, "success_at": 1.0}
    for line in answers(tmp_path / "e"):
        assert line["prompt"] == line["question"]
        assert line["settings"] == asked | drawn
    assert {name: summary[name] for name in asked} == asked
    assert summary["benchmarks"][0]["settings"] == asked | drawn
    assert (
        shown.count("quickstart; template '{question}', float32") == 2
    )  # before the first answer, and the table


def test_a_prompt_is_written_as_the_model_saw_it(suite, tmp_path, monkeypatch):
    """Special tokens of a chat template and what it adds, out of the tokens themselves."""
    model = tmp_path / "model"
    shutil.copytree(find_model("quickstart"), model)
    file = model / "tokenizer_config.json"
    chat = "{% for m in messages %}<pad>{{ m['content'] }}<eos>{% endfor %}1+"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": chat}))
    changed = {"template": "chat", "model": str(model), "samples": 1, "max_response": 8}
    evaluate(settings(suite, tmp_path / "e", **changed))
    for line in answers(tmp_path / "e"):
        assert line["prompt"] == f"<pad>{line['question']}<eos>1+"


def test_an_evaluation_goes_on_only_where_its_settings_come_to_the_same(done, suite, tmp_path):
    """An accelerator takes `auto` for another type; what it came to may be said instead."""
    out = tmp_path / "evaluation"
    shutil.copytree(done[0], out)
    lines = (out / ANSWERS).read_bytes().splitlines(keepends=True)
    held = yaml.safe_load((out / SETTINGS).read_text())
    assert held["resolved"]["compute_dtype"] == "float32" and held["compute_dtype"] == "auto"
    other = held | {"resolved": held["resolved"] | {"compute_dtype": "bfloat16"}}
    (out / SETTINGS).write_text(yaml.safe_dump(other))
    (out / ANSWERS).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ConfigError, match="other settings: compute_dtype: bfloat16 -> float32;"):
        evaluate(settings(suite, out))
    with pytest.raises(ConfigError, match="other settings: compute_dtype: bfloat16 -> float32;"):
        evaluate(settings(suite, out, compute_dtype="float32"))
    assert (out / ANSWERS).read_bytes() == b"".join(lines[:-1])
    (out / SETTINGS).write_text(yaml.safe_dump(held))
    assert evaluate(settings(suite, out, compute_dtype="float32")) == done[1]


def test_float32_answers_do_not_depend_on_rows_or_mesh(done, suite, tmp_path):
    evaluate(settings(suite, tmp_path / "other", rows=4, mesh=MeshConfig(fsdp=1, data=2, tensor=4)))
    ours, theirs = by_place(answers(tmp_path / "other")), by_place(answers(done[0]))
    assert {place: line["response"] for place, line in ours.items()} == {
        place: line["response"] for place, line in theirs.items()
    }


def test_answers_of_a_problem_differ_by_sample_and_by_seed(done, suite, tmp_path):
    told = by_place(answers(done[0]))
    assert any(len({told[p, s]["response"] for s in range(SAMPLES)}) > 1 for p in range(PROBLEMS))
    evaluate(settings(suite, tmp_path / "other", seed=1))
    other = by_place(answers(tmp_path / "other"))
    assert any(told[place]["response"] != other[place]["response"] for place in told)


RARELY = [pytest.param(kept, marks=pytest.mark.slow) for kept in (0, 1, PROBLEMS * SAMPLES - 1)]


@pytest.mark.parametrize("kept", [9, PROBLEMS * SAMPLES, *RARELY])
def test_a_killed_evaluation_goes_on_with_what_is_missing(done, suite, tmp_path, kept):
    """Whole lines are kept as they are; a part of a line is asked again."""
    out = tmp_path / "evaluation"
    out.mkdir()
    (out / SETTINGS).write_text((done[0] / SETTINGS).read_text())
    lines = (done[0] / ANSWERS).read_bytes().splitlines(keepends=True)
    torn = lines[kept][:40] if kept < len(lines) else b""
    (out / ANSWERS).write_bytes(b"".join(lines[:kept]) + torn)
    assert evaluate(settings(suite, out)) == done[1]
    assert (out / ANSWERS).read_bytes().splitlines(keepends=True)[:kept] == lines[:kept]
    assert sorted(map(json.dumps, answers(out))) == sorted(map(json.dumps, answers(done[0])))


def test_a_directory_of_another_evaluation_is_refused_with_what_differs(done, suite, tmp_path):
    before = (done[0] / ANSWERS).read_bytes()
    with pytest.raises(ConfigError, match="other settings: samples: 3 -> 4, seed: 0 -> 3;"):
        evaluate(settings(suite, done[0], seed=3, samples=4))
    assert (done[0] / ANSWERS).read_bytes() == before
    # One that was ended before its model was found: nothing is what `auto` came to.
    (tmp_path / SETTINGS).write_text(yaml.safe_dump({"stop": ["x"], "model": "quickstart"}))
    with pytest.raises(ConfigError, match=r"other settings: seed: null -> 0, stop: \[x\] -> null;"):
        open_directory(tmp_path, {"stop": None, "model": "quickstart", "seed": 0}, answered=True)
    # Without answers it begins with any settings.
    open_directory(tmp_path, {"stop": None, "model": "quickstart", "seed": 0}, answered=False)
    # What an earlier version did not have is at what that version did.
    open_directory(tmp_path, {"model": "quickstart", "success_at": 1.0}, answered=True)
    with pytest.raises(ConfigError, match=r"other settings: success_at: 1.0 -> 0.5;"):
        open_directory(tmp_path, {"model": "quickstart", "success_at": 0.5}, answered=True)
    assert yaml.safe_load((tmp_path / SETTINGS).read_text())["seed"] == 0


def test_the_same_model_twice_is_not_better_and_the_comparison_is_paired(done, suite, tmp_path):
    summary = evaluate(settings(suite, tmp_path / "again", compare=str(done[0])))
    (row,) = summary["compared_with"]["rows"]
    assert (row["difference"], row["p"], row["better"]) == (0.0, 1.0, "undecided")


def test_settings_are_written_and_shown_with_the_letters_of_all_scripts(tmp_path):
    open_directory(tmp_path, {"template": "问题 {question}", "seed": 0}, answered=False)
    assert "template: 问题 {question}" in (tmp_path / SETTINGS).read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"template: 问题 \{question\} -> boxed;"):
        open_directory(tmp_path, {"template": "boxed", "seed": 0}, answered=True)


def test_a_comparison_of_what_is_asked_differently_is_refused_before_anything_is_asked(done, suite, tmp_path):
    """And leaves no directory, which would then hold other settings."""
    out = tmp_path / "other"
    changed = {"compare": str(done[0]), "template": "{question}+", "max_response": 40}
    with pytest.raises(ConfigError, match=r"template is .*max_response is 40 here and 48 there"):
        evaluate(settings(suite, out, **changed))
    assert not out.exists()


def test_the_answers_of_a_second_process_are_not_mixed_in(suite, tmp_path):
    out = tmp_path / "evaluation"
    with Lock("evaluate", Hosts(mesh_of(), 9)) as lock:
        lock.take(epath.Path(out))
        with pytest.raises(ConfigError, match="is in use by evaluate, process"):
            evaluate(settings(suite, out))
    assert not out.exists()


def test_stored_answers_are_judged_again_and_what_changes_is_shown(done, tmp_path, capsys):
    """Verdicts that were spoilt are as before; nothing is written but where it is wanted."""
    stored = tmp_path / "stored"
    shutil.copytree(done[0], stored)
    lines = answers(done[0])
    right = next(line for line in lines if line["right"])
    wrong = next(line for line in lines if not line["right"] and not line["truncated"])
    spoilt = [
        line | {"right": not line["right"], "extracted": "spoilt"} if line in (right, wrong) else line
        for line in lines
    ]
    (stored / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in spoilt))
    before = (stored / ANSWERS).read_bytes()
    summary = evaluate(EvaluationConfig(rescore=str(stored)))
    shown = " ".join(capsys.readouterr().out.split())
    assert summary["benchmarks"] == done[1]["benchmarks"]
    assert f"problem {right['problem']}, sample {right['sample']}: now right" in shown
    assert "+1" in shown and "-1" in shown and f"{stored} is as it was" in shown
    assert (stored / ANSWERS).read_bytes() == before
    written = evaluate(EvaluationConfig(rescore=str(stored), out=str(tmp_path / "new")))
    assert written["benchmarks"] == done[1]["benchmarks"]
    assert answers(tmp_path / "new") == lines
    with pytest.raises(ConfigError, match="holds an evaluation"):
        evaluate(EvaluationConfig(rescore=str(stored), out=str(tmp_path / "new")))


def test_answers_to_other_problems_are_not_judged_again(done, suite, tmp_path):
    stored, file = tmp_path / "stored", tmp_path / "sums.jsonl"
    shutil.copytree(done[0], stored)
    (stored / SETTINGS).write_text((stored / SETTINGS).read_text().replace(str(suite), str(file)))
    file.write_text('{"question": "1+1=", "answer": "2"}\n' + suite.read_text())
    with pytest.raises(ConfigError, match=r"problem \d+ of sums is not the one"):
        evaluate(EvaluationConfig(rescore=str(stored)))


def test_a_file_of_a_suite_has_columns_and_a_scorer(done, suite, tmp_path):
    """As a source of training has them; the answers are those of the plain file."""
    rows = [json.loads(line) for line in suite.read_text().splitlines()]
    file = tmp_path / "sums.jsonl"
    asked = [{"extra": {"q": row["question"]}, "sum": row["answer"], "kind": "a"} for row in rows]
    asked.insert(1, {"extra": {"q": "1+1="}, "sum": "2", "kind": "b"})
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    source = {"name": str(file), "prompt": "extra.q", "answer": "sum", "scorer": "numeric"}
    source["where"] = {"kind": ["a"]}
    flags = ["--model=quickstart", "--suite", str(file), "--out", str(tmp_path / "e")]
    flags += [f"--suite.{name}={json.dumps(value)}" for name, value in source.items() if name == "where"]
    flags += [f"--suite.{name}={source[name]}" for name in ("prompt", "answer", "scorer")]
    flags += [f"--samples={SAMPLES}", "--temperature=1", "--max_response=48", "--template=plain", "--rows=8"]
    config, _ = parse(EvaluationConfig, "evaluate", None, [*flags, "--compilation_cache=off"])
    assert config.suite == [SourceConfig(**source)]
    evaluate(config)
    ours, theirs = by_place(answers(tmp_path / "e")), by_place(answers(done[0]))
    assert {place: line["response"] for place, line in ours.items()} == {
        place: line["response"] for place, line in theirs.items()
    }
    assert [line["benchmark"] for line in ours.values()] == ["sums"] * len(theirs)
    assert evaluate(config)["benchmarks"]  # it goes on: the list is the same when it is read again


def test_other_problems_than_an_evaluation_began_with_are_refused(done, suite, tmp_path):
    """A row more at the top: answers would be told of other problems."""
    out, file = tmp_path / "evaluation", tmp_path / "sums.jsonl"
    out.mkdir()
    held = (done[0] / SETTINGS).read_text()
    (out / SETTINGS).write_text(held.replace(str(suite), str(file)))
    (out / ANSWERS).write_bytes((done[0] / ANSWERS).read_bytes())
    file.write_text('{"question": "1+1=", "answer": "2"}\n' + suite.read_text())
    with pytest.raises(ConfigError, match="begun with other problems of sums"):
        evaluate(settings(file, out))
    file.write_text("".join(suite.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="begun with other problems of sums"):
        evaluate(settings(file, out))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "aime"}, "aime24"),
        ({"suite": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"step": 3}, "no --step 3"),
        ({"samples": 5000}, "at most 4,096"),
        ({"rows": 3}, "rows is 3"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"max_response": 10_000}, "of 256 tokens for the question"),
        ({"max_response": 250}, "leaves 6 of the model's context"),
        ({"template": "none"}, "template"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"files": {"math5000": "x.jsonl"}}, "math5000"),
        ({"out": "gs://bucket/evaluation"}, "bucket"),
        ({"compare": "/nowhere"}, "no answers.jsonl with answers to sums"),
        ({"model": ""}, "name a model with --model, or stored answers"),
        ({"rescore": "/nowhere"}, "no evaluation.yaml and answers.jsonl with answers"),
        ({"suite": []}, "suite is empty"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(suite, tmp_path, change, message):
    config = dataclasses.replace(settings(suite, tmp_path / "evaluation"), **change)
    with pytest.raises(Exception, match=message) as refused:
        evaluate(config)
    assert isinstance(refused.value, ValueError)
    assert "\n" not in str(refused.value)


def test_a_benchmark_takes_a_file_in_its_place_on_the_command_line():
    flags = ["--model=m", "--files.aime24=a.jsonl", "--files.amc23", "b.csv"]
    config, _ = parse(EvaluationConfig, "evaluate", None, flags)
    assert config.files == {"aime24": "a.jsonl", "amc23": "b.csv"}


SHARE = """
import sys
suite, out, port, number = sys.argv[1:]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
from evaluations import settings
from fr3e_jax.evaluate import evaluate
summary = evaluate(settings(suite, out if number == "0" else out + "-nothing"))
assert bool(summary) == (number == "0")
"""


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one_and_write_once(done, suite, tmp_path):
    """Half of them are there already, which only the first process can see."""
    out = tmp_path / "evaluation"
    out.mkdir()
    (out / SETTINGS).write_text((done[0] / SETTINGS).read_text())
    lines = (done[0] / ANSWERS).read_bytes().splitlines(keepends=True)
    (out / ANSWERS).write_bytes(b"".join(lines[:9]))
    two_processes(SHARE, suite, out)
    ours = by_place(answers(out))
    assert len(answers(out)) == len(ours) == PROBLEMS * SAMPLES
    assert ours == by_place(answers(done[0]))
    assert not (tmp_path / "evaluation-nothing").exists()
