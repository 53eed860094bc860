"""What the names in metrics.jsonl say: the table of the page, and no name of a run without a meaning."""

import json

from environment import REPOSITORY

from fr3e_jax.step.meanings import meaning_of, meanings, page


def test_the_table_of_the_page_is_the_one_that_the_package_prints():
    text = (REPOSITORY / "fr3e_jax" / "step" / "README.md").read_text()
    assert "\n".join(page()) in text


def test_every_name_that_a_run_writes_has_a_meaning(whole_run):
    directory, _ = whole_run
    names = {
        name for line in (directory / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)
    }
    assert len(names) > 30 and [name for name in sorted(names) if meaning_of(name) is None] == []


def test_all_meanings_say_what_they_are_over():
    for name, meaning in meanings().items():
        assert meaning.help and meaning.over, name
    assert meaning_of("flops/utilisation_update") == meanings()["flops/utilisation_STAGE"]
    assert meaning_of("time/verify") == meanings()["time/STAGE"] and meaning_of("reward/mine") is None
