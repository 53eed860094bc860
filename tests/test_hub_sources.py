"""Data sets of the hub, which is a server on this machine: what is fetched, read and refused."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import SECOND, answers_of, serving

from fr3e_jax.problems.sources import of_split


def lines(split, commit, count=2):
    rows = [{"question": f"{split} {i} of {commit[0]}", "answer": i} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(split, commit):
    rows = [{"question": f"{split} {i} of {commit[0]}", "answer": str(i)} for i in range(2)]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def gsm8k(commit):
    sink = pyarrow.BufferOutputStream()
    rows = [{"question": f"q of {commit[0]}", "answer": "so\n#### 5"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


HUB = {
    "tiny/sharded": lambda commit: {
        "README.md": b"---",
        "loader.py": b"raise SystemExit",
        "data/train-00000-of-00002.parquet": table("first", commit),
        "data/train-00001-of-00002.parquet": table("second", commit),
        "data/test-00000-of-00001.parquet": table("test", commit),
        "dataset_infos.json": b"{}",
        "weights.bin": b"x",
    },
    "tiny/subsets": lambda commit: {
        f"{subset}/{split}.jsonl": lines(f"{subset} {split}", commit)
        for subset in ("easy", "hard")
        for split in ("train", "test")
    },
    "tiny/single": lambda commit: {"latest-problems.jsonl": lines("single", commit)},
    "tiny/nothing": lambda commit: {"README.md": b"---"},
    "tiny/gated": lambda commit: {"train.jsonl": lines("train", commit)},
    "tiny/expired": lambda commit: {"train.jsonl": lines("train", commit)},
    "openai/gsm8k": lambda commit: {
        "main/train-00000-of-00001.parquet": gsm8k(commit),
        "main/test-00000-of-00001.parquet": gsm8k(commit),
        "socratic/train-00000-of-00001.parquet": gsm8k(commit),
    },
    "HuggingFaceH4/MATH-500": lambda commit: {"elsewhere.jsonl": b""},
}
FETCHED = set()

ASK = """
import json, sys
from fr3e_jax.config import ConfigError, SourceConfig
from fr3e_jax.problems.sources import read
answers = []
for settings in json.loads(sys.argv[1]):
    try:
        answers.append([[p.question, p.answer] for p in read(SourceConfig(**settings))[0]])
    except ConfigError as error:
        answers.append(f"refused: {error}")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def endpoint():
    with serving({f"datasets/{name}": files for name, files in HUB.items()}, FETCHED) as address:
        yield address


def ask(home, endpoint, *sources, **settings):
    """What `read` gives for each source in a process of its own."""
    return answers_of(ASK, sources, home, endpoint, JAX_PLATFORMS="cpu", **settings)


READ = [
    {"name": "tiny/sharded"},
    {"name": f"tiny/sharded@{SECOND}", "split": "test"},
    {"name": "tiny/subsets", "subset": "hard"},
    {"name": "tiny/subsets@v2", "subset": "easy", "split": "test"},
    {"name": "tiny/single"},
    {"name": "gsm8k"},
]


@pytest.fixture(scope="module")
def cached(tmp_path_factory, endpoint):
    """A cache that holds what READ names, what was read, and the files that were fetched for it."""
    home = tmp_path_factory.mktemp("hub")
    FETCHED.clear()
    answers = ask(home, endpoint, *READ)
    return home, answers, set(FETCHED)


def test_the_files_of_a_split_are_read_in_order(cached):
    _, answers, _ = cached
    assert answers == [
        [["first 0 of a", "0"], ["first 1 of a", "1"], ["second 0 of a", "0"], ["second 1 of a", "1"]],
        [["test 0 of b", "0"], ["test 1 of b", "1"]],
        [["hard train 0 of a", "0"], ["hard train 1 of a", "1"]],
        [["easy test 0 of b", "0"], ["easy test 1 of b", "1"]],
        [["single 0 of a", "0"], ["single 1 of a", "1"]],
        [["q of a", "5"]],
    ]


def test_only_data_is_fetched_and_of_a_named_data_set_only_its_own(cached):
    _, _, fetched = cached
    assert not fetched & {"README.md", "loader.py", "weights.bin", "dataset_infos.json"}
    assert "main/train-00000-of-00001.parquet" in fetched
    assert not fetched & {"main/test-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"}


def test_what_was_fetched_is_read_without_a_network(cached, tmp_path, monkeypatch):
    home, answers, _ = cached
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)  # hides no named data set
    assert ask(home, "http://127.0.0.1:1", *READ, HF_HUB_OFFLINE="1") == answers
    assert ask(home, "http://127.0.0.1:1", READ[0], READ[-1]) == [answers[0], answers[-1]]


REFUSED = [
    ({"name": "tiny/absent"}, ["data set 'tiny/absent' is neither a file nor found at", "hf auth login"]),
    ({"name": "tiny/sharded@v3"}, ["has no revision 'v3'", "/datasets/tiny/sharded"]),
    ({"name": "tiny/gated"}, ["is gated; ask for access at", "/datasets/tiny/gated", "hf auth login"]),
    ({"name": "tiny/expired"}, ["was refused to the token in use"]),
    ({"name": "a b/c"}, ["data set 'a b/c' is neither a file nor a name that the hub could have"]),
    (
        {"name": "tiny/sharded", "split": "validation"},
        [
            "data set 'tiny/sharded' has no files of split 'validation'; there are "
            "data/test-00000-of-00001.parquet, data/train-00000-of-00002.parquet, "
            "data/train-00001-of-00002.parquet; change split or subset"
        ],
    ),
    (
        {"name": "tiny/single", "split": "test"},
        ["has no files of split 'test'; there are latest-problems.jsonl"],
    ),
    (
        {"name": "tiny/sharded", "subset": "hard"},
        ["has no files of split 'train', subset 'hard'; there are data/"],
    ),
    ({"name": "tiny/subsets"}, ["data set 'tiny/subsets' has subsets easy, hard; set subset to one"]),
    ({"name": "tiny/nothing"}, ["has no files of split 'train'; there are none that can be read"]),
    ({"name": "math500"}, ["data set 'HuggingFaceH4/MATH-500' has no test.jsonl"]),
    ({"name": "gsm8k", "subset": "irony"}, ["has no irony/train-*.parquet"]),
    ({"name": "deepscaler", "split": "test"}, ["deepscaler has no split 'test'; leave split out"]),
    ({"name": "math500", "subset": "easy"}, ["math500 has no subset 'easy'; leave subset out"]),
    (
        {"name": "tiny/single", "answer": "target"},
        ["tiny/single/latest-problems.jsonl, line 1: there is no column 'target'"],
    ),
]


def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(tmp_path, endpoint):
    answers = ask(tmp_path, endpoint, *(source for source, _ in REFUSED))
    for answer, (_, named) in zip(answers, REFUSED, strict=True):
        assert answer.startswith("refused: ") and "\n" not in answer
        for part in named:
            assert part in answer


def test_offline_and_absent_names_the_command_that_fetches(tmp_path, endpoint):
    [answer] = ask(tmp_path, endpoint, {"name": "tiny/single@v2"}, HF_HUB_OFFLINE="1")
    assert "data set 'tiny/single@v2' is neither a file nor in the cache" in answer
    assert "`hf download tiny/single --repo-type dataset --revision v2`" in answer


@pytest.mark.parametrize(
    ("files", "split", "subset", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], "train", None, ["train.jsonl"]),
        (["a/train/0.parquet", "a/val/0.parquet"], "validation", "a", ["a/val/0.parquet"]),
        (["contest.jsonl", "training_data.csv"], "test", None, []),
        (["contest.jsonl"], "train", None, ["contest.jsonl"]),
        (["data.jsonl", "dev.jsonl"], "train", None, ["data.jsonl"]),
        (["train.csv", "train.parquet"], "train", None, ["train.parquet"]),
        (["en.jsonl", "de.jsonl"], "train", "de", ["de.jsonl"]),
        (["extended-0.parquet", "default-0.parquet"], "extended", None, ["extended-0.parquet"]),
    ],
)
def test_files_are_chosen_by_the_hubs_conventions(files, split, subset, chosen):
    assert of_split(files, split, subset) == chosen
