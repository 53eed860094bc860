"""The pages for people: links lead somewhere, commands parse, options exist, and nothing is said twice."""

import collections
import dataclasses
import inspect
import re
import shlex

import pytest
from environment import REPOSITORY

from fr3e_jax import evaluate, export, generate, plan
from fr3e_jax.bench import rollout, update
from fr3e_jax.bench.__main__ import BENCHMARK_FUNCTIONS
from fr3e_jax.cli import parse
from fr3e_jax.config import Config, SFTConfig
from fr3e_jax.study.command import StudyOptions, with_named_file
from fr3e_jax.view.command import ViewOptions, with_named_runs

FRONT = REPOSITORY / "README.md"
PAGES = [
    FRONT,
    *(REPOSITORY / folder / "README.md" for folder in ("configs", "models", "launch", "tests", "fr3e_jax")),
    *sorted((REPOSITORY / "fr3e_jax").glob("[!cm]*/README.md")),
]
COMMANDS = {
    "train": (Config, "configs/quickstart.yaml"),
    "sft": (SFTConfig, "configs/quickstart_sft.yaml"),
    "plan": (plan.PlanConfig, "configs/quickstart.yaml"),
    "evaluate": (evaluate.EvaluationConfig, None),
    "generate": (generate.GenerateConfig, None),
    "export": (export.ExportConfig, None),
    "study": (StudyOptions, None),
    "view": (ViewOptions, None),
}
MEASUREMENTS = {"rollout": rollout.ROLLOUT_MEASUREMENTS, "update": update.UPDATE_MEASUREMENTS}


def name_of(page):
    return str(page.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def anchors(text):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]


def commands(text):
    """(name, arguments) of every command of this project that a page shows."""
    blocks = re.findall(r"^    (?:.*&& )?python -m fr3e_jax\.(.*)$", text, re.M)
    inline = re.findall(r"`python -m fr3e_jax\.([^`]*)`", text)
    for line in blocks + inline:
        name, *arguments = shlex.split(line, comments=True)
        yield name, arguments


def prose(text):
    """Sentences and rows of tables, of some length, that are no commands."""
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        parts = [line] if line.startswith("|") else re.split(r"(?<=[.:?]) ", line)
        yield from (part.strip("- ") for part in parts if len(part) > 40)


def test_the_front_page_is_read_in_one_sitting():
    assert len(FRONT.read_text().splitlines()) <= 150


def test_every_page_can_be_reached_from_the_front():
    linked = {(FRONT.parent / link.partition("#")[0]).resolve() for link in links(FRONT.read_text())}
    assert {name_of(page) for page in PAGES if page != FRONT} <= {
        name_of(page) for page in linked if page.name == "README.md"
    }


@every_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in links(page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text()), link


@every_page
def test_files_that_are_named_are_there(page):
    named = re.findall(r"`((?:tests|configs|launch|fr3e_jax)/[\w./]*)`", page.read_text())
    for name in set(named) - {"launch/tpu.env"}:  # the user's own
        if "NAME" not in name:
            assert (REPOSITORY / name).exists(), name


def test_every_command_is_shown():
    shown = {name for page in PAGES for name, _ in commands(page.read_text())}
    assert shown == {*COMMANDS, "bench"}


@every_page
def test_commands_that_are_shown_parse(page):
    for name, arguments in commands(page.read_text()):
        if name == "bench":
            if arguments:
                check_benchmark(*arguments)
        elif name == "study":
            parse(*COMMANDS[name][:1], name, None, with_named_file(arguments))
        elif name == "view":
            parse(*COMMANDS[name][:1], name, None, with_named_runs(arguments))
        elif "--help" in arguments:
            with pytest.raises(SystemExit, match=r"^0$"):
                parse(COMMANDS[name][0], name, COMMANDS[name][1], arguments)
        else:
            parse(COMMANDS[name][0], name, COMMANDS[name][1], arguments)


def check_benchmark(name, *arguments):
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    known = set(inspect.signature(BENCHMARK_FUNCTIONS[name]).parameters)
    assert {flag.removeprefix("--") for flag in flags} <= known
    if "--only" in flags:
        assert set(flags["--only"].split(",")) <= set(MEASUREMENTS[name])


@every_page
def test_options_that_are_named_exist(page):
    sections = {f.name: f.default_factory for f in dataclasses.fields(plan.PlanConfig)}
    known = {
        name: {field.name for field in dataclasses.fields(factory)}
        for name, factory in sections.items()
        if factory is not dataclasses.MISSING and dataclasses.is_dataclass(factory)
    }
    named = re.findall(rf"`(?:--)?({'|'.join(known)})\.([a-z_0-9]+)(?=[` ])", page.read_text())
    for section, option in named:
        assert option in known[section] | {"py", "json", "md"}, f"{section}.{option}"


@every_page
def test_pip_is_not_given_the_lock_as_constraints(page):
    """It has hashes, with which pip installs no directory; uv takes its versions alone."""
    for found in re.findall(r"(\w+ )?pip install([^`\n&]*)", page.read_text()):
        assert found[0] == "uv " or not re.search(r"(-c|--constraint) requirements", found[1]), found


def test_nothing_is_said_twice():
    places = collections.defaultdict(list)
    for page in PAGES:
        for text in prose(page.read_text()):
            places[text].append(name_of(page))
    headings = re.compile(r"^\|[-:| ]+\|$")
    assert not {t: p for t, p in places.items() if len(p) > 1 and not headings.match(t)}


def test_numbers_on_the_front_stand_on_the_pages_that_they_are_from():
    text = FRONT.read_text()
    _, _, measured = text.partition("## What is measured")
    rows = re.findall(r"^\| \[.*?\]\((.*?)\) \| (.*?) \| (.*?) \|", measured.partition("\n## ")[0], re.M)
    assert len(rows) == 6
    for link, number, against in rows:
        page = (REPOSITORY / link.partition("#")[0]).read_text()
        for figure in re.findall(r"\d+\.\d+%?|\b\d{2,}\b", f"{number} {against.partition('estimate')[2]}"):
            assert figure in page, f"{figure}, {link}"
