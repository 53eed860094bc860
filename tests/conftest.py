"""How tests run: eight CPU devices for each, strict, in two workers that share compiled programs."""

import collections
import os
import re
from pathlib import Path

import checked  # noqa: F401  has annotations checked, before anything of the package is imported
import environment

# As a pod has many; single-device programs take the first.
os.environ.update(environment.of_process(devices=8))

import jax
import pytest
from filelock import FileLock
from hypothesis import settings
from laptop import make_origin, renting
from support import SMALL, run
from xdist.scheduler import LoadScopeScheduling

# The modules that take longest come first, so that both workers end at about the same time.
LONGEST = (
    "test_real_model",
    "test_train",
    "test_filters",
    "test_launch_run",
    "test_shared_prefix",
    "test_evaluate",
    "test_damage",
    "test_moving_rows",
    "test_library",
    "test_decoder",
    "test_hosts",
    "test_bucket_runs",
    "test_checkpoint",
    "test_update",
    "test_hub",
    "test_compiled",
    "test_config",
    "test_stops",
    "test_sampler",
    "test_engine",
    "test_sharded_vocabulary",
    "test_splash",
    "test_qwen2",
    "test_vocabularies",
    "test_engine_processes",
    "test_export",
    "test_sft",
    "test_two_processes",
    "test_plan",
)
# Likewise of the tests marked slow.
LONGEST_SLOW = (
    "test_plan",
    "test_train",
    "test_lost_processes",
    "test_bucket_runs",
    "test_interruption",
    "test_hosts",
    "test_damage",
    "test_update_memory",
    "test_export_versions",
    "test_growth",
    "test_checkpoint",
    "test_full_disk",
    "test_evaluate",
    "test_sampler",
    "test_engine_processes",
    "test_vocabularies",
    "test_compiled",
    "test_engine",
)
# One after the other: they measure time, or wait for processes that do.
CLOCK = ("test_pool", "test_hostile", "test_launch", "test_launch_run", "test_launch_slice")

# Few examples, the same in every run, so that what they compile is kept; `.ci/run` draws more, and new ones.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("deep", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("FR3E_TESTS_EXAMPLES", "default"))


def pytest_collection_modifyitems(config, items):
    """Put the modules that take longest before the others, in the order of the list above."""
    longest = LONGEST_SLOW if config.option.markexpr.startswith("slow") else LONGEST
    order = {name: number for number, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


class Modules(LoadScopeScheduling):
    """A worker takes a whole module, since its tests share what it makes, or all that look at the clock."""

    def _split_scope(self, nodeid):
        module = Path(nodeid.partition("::")[0]).stem
        return "clock" if module in CLOCK else module


def pytest_xdist_make_scheduler(config, log):
    """How tests are shared out to workers."""
    return Modules(config, log)


def pytest_terminal_summary(terminalreporter):
    """How many tests were skipped, and what would run them."""
    reasons = collections.Counter(
        re.sub("^Skipped: ", "", report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture(autouse=True, scope="module")
def programs_go_before_they_are_too_many():
    """Each compiled program maps memory, and Linux aborts a process that has 65,530 maps."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_text().count("\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The repository that laptops clone (laptop.py)."""
    return make_origin(tmp_path_factory.mktemp("origin"))


@pytest.fixture
def rent(tmp_path, origin):
    """A function that gives a laptop with settings, and the cloud behind it."""
    yield from renting(tmp_path, origin)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A run of `SMALL` that nothing interrupts, one for all workers: (its directory, what it printed).

    Nothing is to be written there.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    directory, printed = root / "whole" / "run", root / "whole" / "printed.txt"
    with FileLock(root / "whole.lock"):
        if not printed.exists():
            done = run("train", *SMALL, "--run_dir", directory)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout)
    return directory, printed.read_text()
