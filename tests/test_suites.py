"""Benchmarks by name."""

import dataclasses

import pytest
from environment import REPOSITORY

from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.evaluation.suites import BENCHMARKS, benchmarks_of, source_of, suites_table
from fr3e_jax.problems.corpus import judging_source
from fr3e_jax.problems.datasets import DATASETS
from fr3e_jax.problems.sources import filled, known_files


def asked(suite):
    return [(b.name, b.dataset, b.samples, b.temperature) for b in benchmarks_of(suite)]


def test_the_math_suite_samples_small_benchmarks_and_asks_large_ones_once():
    sampled, greedy = (32, 1), (1, 0)
    assert {name: how for name, _, *how in asked("math")} == {
        "aime24": list(sampled),
        "aime25": list(sampled),
        "aime26": list(sampled),
        "amc23": list(sampled),
        "math500": list(greedy),
        "minerva": list(greedy),
        "olympiadbench": list(greedy),
        "gsm8k_test": list(greedy),
        "gaokao2023en": list(greedy),
        "college_math": list(greedy),
    }


def test_names_are_taken_in_their_order():
    assert [b.name for b in benchmarks_of("math500, aime24")] == ["math500", "aime24"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/own.jsonl", "own"),
        ("own.v2.csv", "own.v2"),
        ("/there/own.parquet", "own"),
        ("tasks/own.py", "own"),
        ("gym:chain_sum", "gym:chain_sum"),
        ("carry_addition", "carry_addition"),
        ("Org/Name-v1.5", "Org/Name-v1.5"),
        ("Org/Name@main", "Org/Name@main"),
    ],
)
def test_a_source_is_asked_once_greedily(source, name):
    assert asked(source) == [(name, source, 1, 0)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_asked_of_the_files_that_its_data_set_has(name):
    """As evaluate asks for it: of no other split than the one that the table of data sets counts."""
    dataset = BENCHMARKS[name].dataset
    source = filled(judging_source(dataset), DATASETS[dataset])
    assert source.split == DATASETS[dataset].split
    assert "{" not in known_files(source, DATASETS[dataset])


def test_another_data_set_is_asked_of_its_test_split():
    assert judging_source("Org/Name").split == "test"


def test_benchmarks_suites_and_sources_go_together():
    names = [b.name for b in benchmarks_of("own.jsonl,math,gym:chain_sum")]
    assert names[0] == "own" and names[1] == "aime24" and names[-1] == "gym:chain_sum" and len(names) == 12


@pytest.mark.parametrize(
    ("suite", "near"),
    [
        ("aime2024", "aime24"),
        ("gsm8k", "gsm8k_test"),
        ("maths", "math"),
        ("", "olympiadbench"),
        ("a,", "math"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(suite, near):
    with pytest.raises(ConfigError, match=f"there is no benchmark .*{near}.*FILE.jsonl"):
        benchmarks_of(suite)


@pytest.mark.parametrize(
    "suite", ["aime24,aime24", "math,amc23", "a/own.jsonl,b/own.csv", "data/aime24.jsonl,aime24"]
)
def test_two_benchmarks_of_one_name_are_refused(suite):
    """Their answers would be told as one's."""
    with pytest.raises(ConfigError, match="twice"):
        benchmarks_of(suite)


def test_a_list_names_benchmarks_and_sources_with_settings_of_their_own():
    sources = [SourceConfig("amc23"), SourceConfig("own.csv", prompt="q", scorer="exact")]
    plain, own, hub = benchmarks_of([*sources, SourceConfig("Org/Name", split="validation")])
    assert (plain.name, plain.samples, plain.columns) == ("amc23", 32, None)
    assert (own.name, own.samples) == ("own", 1)
    assert source_of(own, None) == dataclasses.replace(sources[1], split="test")
    assert source_of(hub, None).split == "validation"
    (named,) = benchmarks_of([SourceConfig("math500", where={"level": [5]})])
    assert source_of(named, "copy.jsonl") == SourceConfig("math500", file="copy.jsonl", where={"level": [5]})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SourceConfig("own.csv", weight=2), "own.csv of the suite has a weight"),
        (SourceConfig("math", prompt="q"), "math is a suite, and takes no prompt"),
    ],
)
def test_settings_that_a_suite_does_not_read_are_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        benchmarks_of([source])


def test_a_scorer_that_is_not_there_is_refused_with_those_that_are():
    (own,) = benchmarks_of([SourceConfig("own.csv", scorer="maths")])
    with pytest.raises(ConfigError, match=r"scorer of source own.csv is 'maths'; did you mean math"):
        source_of(own, None)


def test_the_table_says_how_each_is_asked():
    lines = suites_table().splitlines()
    rows = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines
    }
    assert rows["aime24"][:3] == ["AIME 2024", "32", "1"] and "DAPO" in rows["aime24"][3]
    assert rows["math500"][:3] == ["MATH-500", "1", "0"] and "Qwen2.5-Math" in rows["math500"][3]
    assert {len(line.split("|")) for line in lines} == {7} and len(lines) == 12


def test_the_page_of_evaluation_has_the_table_of_the_benchmarks():
    assert suites_table() in (REPOSITORY / "fr3e_jax" / "evaluation" / "README.md").read_text()
