"""Models by name, with the real huggingface_hub and a stand-in for the hub's server on this machine."""

import shutil
from pathlib import Path

import pytest
from hub_server import FIRST, SECOND, answers_of, serving

from fr3e_jax.config import QUICKSTART_MODEL, ConfigError
from fr3e_jax.pretrained.hub import find_model

DESCRIPTION = {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}
WEIGHTS = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
UNWANTED = {"pytorch_model.bin", "modeling_x.py", "README.md", "onnx/model.safetensors"}
FILES = {
    "tiny/model": DESCRIPTION | WEIGHTS | UNWANTED,
    "tiny/pickled": DESCRIPTION | UNWANTED,
    "tiny/gated": DESCRIPTION | WEIGHTS,
    "tiny/expired": DESCRIPTION | WEIGHTS,
}
FETCHED: set[str] = set()  # files that were asked for

ASK = """
import json, sys
from fr3e_jax.config import ConfigError
from fr3e_jax.pretrained.hub import find_model
answers = []
for name, weights in json.loads(sys.argv[1]):
    try:
        answers.append(str(find_model(name, weights)))
    except ConfigError as error:
        answers.append(f"refused: {error}")
print(json.dumps(answers))
"""


def content(commit, file):
    return f"{file} of {commit}"


@pytest.fixture(scope="module")
def endpoint():
    def files(names):
        return lambda commit: {file: content(commit, file).encode() for file in sorted(names)}

    with serving({repository: files(names) for repository, names in FILES.items()}, FETCHED) as address:
        yield address


def ask(home, endpoint, *names, weights=True, **settings):
    """What `find_model` gives for each name in a process of its own, with its cache in `home`."""
    return answers_of(ASK, [(name, weights) for name in names], home, endpoint, **settings)


def files_of(snapshot):
    return {str(file.relative_to(snapshot)) for file in Path(snapshot).rglob("*") if file.is_file()}


def assert_refused(answer, *named):
    assert answer.startswith("refused: model ")
    assert "\n" not in answer
    for part in named:
        assert str(part) in answer


@pytest.fixture(scope="module")
def cached(tmp_path_factory, endpoint):
    """A cache that holds tiny/model, and the snapshot's directory."""
    home = tmp_path_factory.mktemp("hub")
    FETCHED.clear()
    [snapshot] = ask(home, endpoint, "tiny/model")
    return home, Path(snapshot)


# --- names that need no hub


def test_a_directory_wins_over_a_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny" / "model@v2").mkdir(parents=True)
    assert find_model("tiny/model@v2") == Path("tiny/model@v2")
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/tiny") == tmp_path / "tiny"


def test_quickstart_is_the_shipped_model_wherever_a_command_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_model("quickstart") == QUICKSTART_MODEL


NO_NAMES = ["", "nowhere", "./model", "/model", "~/model", "a/b/c", "a/b@", "a--b/c", "a b/c", "x/\0"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError) as refusal:
        find_model(name)
    assert_refused(f"refused: {refusal.value}", repr(name), "is not a directory", "Org/Name", "quickstart")


def test_a_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model").touch()
    with pytest.raises(ConfigError, match="'tiny/model' is not a directory"):
        find_model("tiny/model")


# --- fetching


def test_what_a_model_needs_is_fetched_and_neither_pickles_nor_code(cached):
    _, snapshot = cached
    assert files_of(snapshot) == DESCRIPTION | WEIGHTS == FETCHED
    assert (snapshot / "config.json").read_text() == content(FIRST, "config.json")


def test_without_weights_only_configuration_and_tokenizer_are_fetched(tmp_path, endpoint):
    [snapshot] = ask(tmp_path, endpoint, "tiny/model", weights=False)
    assert files_of(snapshot) == DESCRIPTION


def test_a_revision_is_a_branch_tag_or_commit(tmp_path, endpoint):
    branch, commit = ask(tmp_path, endpoint, "tiny/model@v2", f"tiny/model@{SECOND}", weights=False)
    assert branch == commit
    assert (Path(branch) / "config.json").read_text() == content(SECOND, "config.json")


def test_what_was_fetched_is_found_without_a_network(cached):
    home, snapshot = cached
    names = ["tiny/model", f"tiny/model@{FIRST}"]
    assert ask(home, "http://127.0.0.1:1", *names, HF_HUB_OFFLINE="1") == [str(snapshot)] * 2
    assert ask(home, "http://127.0.0.1:1", *names) == [str(snapshot)] * 2


# --- refusals


def test_offline_and_absent_names_the_cache_and_the_command_that_fetches(tmp_path, endpoint):
    [answer] = ask(tmp_path, endpoint, "tiny/model@v2", HF_HUB_OFFLINE="1")
    assert_refused(answer, "'tiny/model@v2' is neither a directory nor in the cache", tmp_path / "hub")
    assert_refused(answer, "unset HF_HUB_OFFLINE", "`hf download tiny/model --revision v2`")


@pytest.mark.parametrize("name", ["tiny/model", f"tiny/model@{FIRST}"])
def test_offline_and_incomplete_names_the_missing_file(tmp_path, endpoint, cached, name):
    shutil.copytree(cached[0], tmp_path / "home", symlinks=True)
    [weights] = (tmp_path / "home").rglob("snapshots/*/*.safetensors")
    weights.unlink()
    [answer] = ask(tmp_path / "home", endpoint, name, HF_HUB_OFFLINE="1")
    assert_refused(answer, f"{name!r} is only partly in the cache", weights.name, "unset HF_HUB_OFFLINE")


def test_a_cache_in_which_another_program_put_the_tokenizer_alone_is_no_model(tmp_path, endpoint):
    ask(tmp_path, endpoint, "tiny/model", weights=False)
    shutil.rmtree(next(tmp_path.rglob("trees")))  # only whole snapshots have their files listed
    for settings in ({"HF_HUB_OFFLINE": "1"}, {}):
        [answer] = ask(tmp_path, "http://127.0.0.1:1", "tiny/model", **settings)
        assert_refused(answer, "'tiny/model' has no weights in the cache", "hf download tiny/model")


def test_a_server_that_is_not_reached_is_named(tmp_path):
    [answer] = ask(tmp_path, "http://127.0.0.1:1", "tiny/model")
    assert_refused(answer, "'tiny/model' is neither a directory nor in the cache", tmp_path / "hub")
    assert_refused(answer, "http://127.0.0.1:1", "ConnectError", "hf download tiny/model")


REFUSED = {
    "tiny/absent": ["neither a directory nor found at", "hf auth login"],
    "tiny/model@v3": ["has no revision 'v3'"],
    "tiny/gated": ["is gated; ask for access at", "hf auth login"],
    "tiny/expired": ["was refused to the token in use", "hf auth login"],
    "tiny/pickled": ["no safetensors weights in its repository", "can run code"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory, endpoint):
    return dict(zip(REFUSED, ask(tmp_path_factory.mktemp("hub"), endpoint, *REFUSED), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(answers, name):
    assert_refused(answers[name], repr(name), *REFUSED[name])
