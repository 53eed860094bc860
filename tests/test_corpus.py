"""The problems of a run: sources from a config file, mixed, held out, and within their length."""

import json
from collections import Counter

import pytest
import yaml
from environment import REPOSITORY
from support import mesh_of

from fr3e_jax.cli import parse
from fr3e_jax.config import Config, ConfigError, DataConfig, SourceConfig, dump
from fr3e_jax.parallel.hosts import Hosts
from fr3e_jax.pretrained.hub import find_model
from fr3e_jax.pretrained.text import load_text
from fr3e_jax.problems.corpus import (
    fitting,
    judging_problems,
    make_corpus,
    names_of,
    sources_of,
)
from fr3e_jax.problems.stream import QueryStream
from fr3e_jax.types import Problem


@pytest.fixture(scope="module")
def text():
    """One token for each character of additions, and none for others."""
    return load_text(find_model("quickstart"), "plain")


@pytest.fixture(scope="module")
def bytes_text():
    """A tokenizer that can say everything."""
    return load_text(REPOSITORY / "tests" / "qwen2.5_tokenizer_cut", "plain")


@pytest.fixture
def files(tmp_path):
    """Two files of sums: 40 short ones, and 20 of which every fourth is long."""
    for name, count, long in (("short", 40, 100), ("long", 20, 4)):
        rows = [
            {"question": f"{i}+{1000 if (i + 1) % long else 10**20}=", "answer": str(i)} for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "short.jsonl"), str(tmp_path / "long.jsonl")


def corpus(text, source, max_prompt=40, seed=0, **settings):
    return make_corpus(DataConfig(source, **settings), seed, text, max_prompt)


def test_every_source_gives_its_share_of_the_held_out_problems_and_none_is_trained_on(text, files):
    found = corpus(text, [SourceConfig(files[0]), SourceConfig(files[1])], held_out=9)
    assert len(found.held_out) == 9
    held_out = {problem.question for problem in found.held_out}
    trained = [{task[i].question for i in range(len(task))} for task in found.tasks]
    assert len(trained[0]) + len(trained[1]) < 60 - 9  # some are in both files
    assert not held_out & (trained[0] | trained[1])
    assert "of 9 held-out problems none shares" in found.messages[-1]


def test_a_held_out_source_leaves_all_of_the_others_to_training(text, files):
    found = corpus(text, files[0], held_out=7, held_out_source=files[1])
    assert len(found.tasks[0]) == 40 - 6  # of the seven, six are in the other file too
    assert [p.question for p in found.held_out] == [
        p.question for p in judging_problems(SourceConfig(files[1]), 0, 7)[0]
    ]
    assert found.messages[0] == f"{files[0]}: 6 problems that are held out are left out of training"
    assert "of 7 held-out problems none shares" in found.messages[1]


def test_a_query_may_fill_its_width_and_no_more(text):
    """Of a stream, whose problems a task makes and nobody has measured before."""
    stream = QueryStream(None, text, 8, Hosts(mesh_of(), 1))
    queries = stream.encode([Problem("123+456=", "579", "exact"), Problem("1+2=", "3", "exact")])
    assert queries.length.tolist() == [8, 4] and text.query("123+456=") == queries.token[0].tolist()
    with pytest.raises(ConfigError, match=r"'123\+4567=' has 9 tokens, more than rollout.max_prompt 8"):
        stream.encode([Problem("123+4567=", "4690", "exact")])


def test_queries_that_are_too_long_are_refused_with_their_number_or_dropped_and_told(text, files):
    with pytest.raises(ConfigError, match=r"long\.jsonl: \d of 1\d queries have more than") as refused:
        corpus(text, files[1], max_prompt=12, held_out=1, held_out_source=files[0])
    assert "--data.too_long drop" in str(refused.value)
    found = corpus(text, files[1], max_prompt=12, held_out=1, held_out_source=files[0], too_long="drop")
    assert len(found.tasks[0]) == 14  # and one is held out
    assert all(len(found.tasks[0][i].question) <= 12 for i in range(14))
    assert f"{files[1]}: 5 problems of more than 12 tokens are left out of training" in found.messages
    with pytest.raises(ConfigError, match="20 of 20 queries"):
        fitting([Problem(f"{i}+1000=", "1", "math") for i in range(20)], text, 3, "drop", "long")


def test_held_out_problems_that_are_too_long_are_refused_also_where_training_drops_them(text, files):
    with pytest.raises(ConfigError, match="held-out problem"):
        corpus(text, files[0], max_prompt=12, held_out=20, held_out_source=files[1], too_long="drop")


def test_the_stream_has_every_source_by_its_weight(bytes_text, files):
    found = corpus(bytes_text, [SourceConfig(files[0], 3.0), SourceConfig("word_addition", 1.0)], held_out=4)
    problems = found.stream(0)[0:200]
    count = Counter(problems[i].source for i in range(200))
    assert count["word_addition"] == 50
    assert found.scorers == ["math", "word_addition"]


def test_a_mixture_among_sources_has_its_weight_between_its_parts():
    found = sources_of([SourceConfig("word_addition", 3.0), SourceConfig("fr3e_paper", 1.0)])
    assert [one.name for one in found] == ["word_addition", "deepscaler", "simplerl_level3to5"]
    assert found[0].weight == 3.0
    assert found[1].weight + found[2].weight == pytest.approx(1.0)
    assert found[1].weight / found[2].weight == pytest.approx(40_315 / 8_523)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": []}, "is empty"),
        ({"source": ""}, "is empty"),
        ({"source": [SourceConfig("carry_addition", 0.0)]}, "weight of source carry_addition is 0.0"),
        ({"source": "nowhere"}, "nowhere"),
        ({"source": [SourceConfig("carry_addition", parameters={"x": 1})]}, "reads no parameters"),
        ({"source": [SourceConfig("gym:gcd", prompt="q", where={"a": [1]})]}, "reads no prompt, where"),
        ({"source": [SourceConfig("a.jsonl", parameters={"x": 1})]}, "reads no parameters"),
        ({"source": "nowhere.csv"}, "nowhere.csv"),
        ({"min_digits": 1, "max_digits": 1, "held_out": 50}, r"is 50, but carry_addition has only \d+ held"),
    ],
)
def test_sources_that_cannot_be_are_refused_in_one_line(text, settings, message):
    with pytest.raises(ConfigError, match=message) as refused:
        corpus(text, **{"source": "carry_addition", **settings})
    assert "\n" not in str(refused.value)


def test_a_mixture_in_a_config_file_is_read_and_written_as_it_was(tmp_path):
    sources = [
        {"name": "short.jsonl", "weight": 2.5, "prompt": "extra.question", "where": {"level": [3, "4"]}},
        {"name": "gym:basic_arithmetic", "parameters": {"min_terms": 2}},
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"source": sources}}))
    config, _ = parse(Config, "train", "configs/quickstart.yaml", ["--config", str(tmp_path / "run.yaml")])
    first, second = config.data.source
    assert first == SourceConfig(
        "short.jsonl", 2.5, prompt="extra.question", where={"level": [3, "4"]}
    ) and second == SourceConfig("gym:basic_arithmetic", parameters={"min_terms": 2})
    assert names_of(config.data) == ["short.jsonl", "gym:basic_arithmetic"]
    (tmp_path / "again.yaml").write_text(dump(config))
    assert (
        parse(Config, "train", "configs/quickstart.yaml", ["--config", str(tmp_path / "again.yaml")])[0]
        == config
    )


def test_a_source_on_the_command_line_is_a_name():
    config, _ = parse(Config, "train", "configs/quickstart.yaml", ["--data.source", "fr3e_paper"])
    assert config.data.source == "fr3e_paper"


def test_a_run_knows_its_problems_again_by_their_checksum(bytes_text, files, tmp_path):
    """A run that goes on counts in the same problems, or is told."""
    settings = {"held_out": 4, "held_out_source": "word_addition"}
    one = corpus(bytes_text, files[0], **settings)
    assert 0 < one.checksum < 2**31
    assert one.checksum == corpus(bytes_text, files[0], seed=5, **settings).checksum
    # Also of what it is judged by.
    assert one.checksum != corpus(bytes_text, files[0], held_out=4, held_out_source="carry_addition").checksum
    lines = (tmp_path / "short.jsonl").read_text().splitlines(keepends=True)
    for changed in (
        lines[1:],
        [*lines[1:], lines[0]],
        [lines[0].replace('"answer": "0"', '"answer": "1"'), *lines[1:]],
    ):
        (tmp_path / "short.jsonl").write_text("".join(changed))
        assert corpus(bytes_text, files[0], **settings).checksum != one.checksum
    # And of the first problems that a source makes.
    first, second = (
        corpus(bytes_text, name, held_out=4, held_out_source="word_addition").checksum
        for name in ("carry_addition", "word_addition")
    )
    assert first != second


def write_sums(path, count):
    path.write_text("question,answer\n" + "".join(f"{i}+1=,{i + 1}\n" for i in range(count)))
    return str(path)


@pytest.mark.parametrize(("rows", "kept"), [(300, 30), (2, 1), (19, 1), (4000, 256)])
def test_a_tenth_of_a_file_is_held_out_by_default_and_at_most_256(text, tmp_path, rows, kept):
    found = corpus(text, write_sums(tmp_path / "sums.csv", rows))
    assert (len(found.held_out), len(found.tasks[0])) == (kept, rows - kept)
    assert not any("are held out, and" in line for line in found.messages)


def test_many_that_are_held_out_by_hand_are_told(text, tmp_path):
    """256 of 300, as it once was without a word."""
    name = write_sums(tmp_path / "sums.csv", 300)
    line = (
        f"{name}: 256 of 300 different questions are held out, and 44 are left to train on; data.held_out 30 "
        "would be a tenth"
    )
    found = corpus(text, name, held_out=256)
    assert len(found.held_out) == 256 and line in found.messages
    assert not any("are held out, and" in told for told in corpus(text, name, held_out=75).messages)


def test_the_default_takes_what_a_made_source_has_and_256_where_there_are_more(text, tmp_path):
    held_out = corpus(text, "carry_addition").held_out
    assert len(held_out) == 256 and held_out == corpus(text, "carry_addition", held_out=256).held_out
    few = corpus(text, "carry_addition", min_digits=1, max_digits=1).held_out
    assert 4 < len(few) < 30
    name = write_sums(tmp_path / "sums.csv", 300)
    both = corpus(text, [SourceConfig(name), SourceConfig("carry_addition")]).held_out
    assert [sum(p.source == source for p in both) for source in (name, "carry_addition")] == [30, 128]
    assert len(corpus(text, "carry_addition", held_out_source=name).held_out) == 256
