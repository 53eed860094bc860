"""The page of runs, without a browser: what is read of runs, how it is packed, what is refused."""

import base64
import re

import numpy as np
import pytest
from etils import epath
from made_up_run import HOSTILE, SCHEMA, made_up_run, question_rows, write_rollouts
from page_parts import part_of, unpacked
from support import call

import fr3e_jax.view.parts as parts_of_a_page
from fr3e_jax.evaluation.answers import Answer
from fr3e_jax.evaluation.held_out import held_out_metrics
from fr3e_jax.run.rollout_files import ROLLOUT_COLUMNS
from fr3e_jax.view.command import ViewOptions, page_of, view, with_named_runs
from fr3e_jax.view.document import page_script
from fr3e_jax.view.packing import NO_NUMBER, pack, thousandths
from fr3e_jax.view.parts import PageParts, widths
from fr3e_jax.view.rollouts import quantiles_of, read_rows, read_step
from fr3e_jax.view.runs import ShownRun, effective_answers, metric_columns, read_run, run_names


def written(folder, **options):
    """The page of a run, and what was shown on the way."""
    lines = []
    page = folder / "page.html"
    run = made_up_run(folder / "run", **options)
    view(ViewOptions(runs=[str(run)], out=str(page)), lines.append, lines.append)
    return page.read_text(encoding="utf-8"), lines


def test_made_up_rollouts_have_the_columns_of_real_ones():
    short = {"list<item: int32>": "list<int32>", "list<item: float>": "list<float32>", "float": "float32"}
    kinds = {
        field.name: "string"
        if "dictionary" in str(field.type)
        else short.get(str(field.type), str(field.type))
        for field in SCHEMA
    }
    assert kinds == {name: column.kind for name, column in ROLLOUT_COLUMNS.items()}


def test_a_part_is_read_as_it_was_packed():
    arrays = {"a": np.array([1, 2, 65535], np.uint16), "b": np.array([-7, 8], np.int32)}
    head, read = unpacked(pack({"text": "ß \u2028 </script>", "half": "\ud800"}, arrays))
    assert (head["text"], head["half"]) == ("ß \u2028 </script>", "?")
    assert {name: array.tolist() for name, array in read.items()} == {"a": [1, 2, 65535], "b": [-7, 8]}


def test_thousandths_keep_three_decimals_and_say_what_is_missing():
    values = np.array([0.0004, 1.2346, -2.5, 1e9, np.nan, -np.inf], np.float32)
    assert thousandths(values).tolist() == [0, 1235, 2500, NO_NUMBER - 1, NO_NUMBER, NO_NUMBER]


@pytest.mark.parametrize(
    ("text", "ends", "parts"),
    [
        ("ab c", [2, 4, 4], ["ab", " c", ""]),
        ("a\U0001f600b", [1, 2, 3], ["a", "\U0001f600", "b"]),  # two UTF-16 units
        ("abc", [2, 1, 99], ["ab", "", "c"]),  # ends that go back, or beyond the text
        ("abc", None, ["", "", ""]),
        ("abc", [1], ["a", "bc", ""]),
        ("", [0, 0], ["", ""]),
    ],
)
def test_widths_cut_a_text_as_javascript_counts(text, ends, parts):
    count = len(parts)
    own = [np.nan] * count if ends is None else (ends + [np.nan] * count)[:count]
    # Behind another text and before one without tokens, which change nothing.
    found = widths(
        ["\U0001f600b", text, "x"],
        np.array([1, 2, *own]),
        np.array([True, ends is not None, False]),
        np.array([2, count, 0]),
    )
    assert found[:2].tolist() == [2, 1]
    found, units, start = found[2:], text.encode("utf-16-le"), 0
    for width, part in zip(found.tolist(), parts, strict=True):
        assert units[2 * start : 2 * (start + width)].decode("utf-16-le") == part
        start += width


def test_the_page_holds_every_response_with_its_tokens(tmp_path):
    page, _ = written(tmp_path, steps=3, kept=(2,), questions=2, hostile=True)
    rng = np.random.default_rng(5)
    rows = question_rows(rng, 3, 7, 0.5)
    write_rollouts(tmp_path / "run", 3, rows)
    parts = PageParts([read_run(str(tmp_path / "run"), "run")])
    head, arrays = unpacked(parts.part("0/3/0"))
    assert (head["question"], head["answer"], head["query"]) == (rows[0]["question"], rows[0]["answer"], 7)
    expected = {(r["trajectory"], r.get("state"), r.get("rollout")): r for r in rows}
    assert len(head["rows"]) == len(rows)
    start = 0
    for row in head["rows"]:
        wanted = expected[row["trajectory"], row["state"], row["rollout"]]
        stop = start + row["tokens"]
        assert row["text"] == wanted["text"] and row["rejected"] == wanted.get("rejected")
        assert arrays["token"][start:stop].tolist() == wanted["token"]
        np.testing.assert_allclose(arrays["entropy"][start:stop] / 1000, wanted["entropy"], atol=5.1e-4)
        np.testing.assert_allclose(arrays["logprob"][start:stop] / -1000, wanted["logprob"], atol=5.1e-4)
        assert np.cumsum(arrays["width"][start:stop]).tolist() == wanted["ends"]
        start = stop
    index, _ = part_of(page, "0/2/index")
    assert len(index["rows"]["reward"]) == sum(one["count"] for one in index["questions"])


def test_states_whose_rewards_differ_are_marked(tmp_path):
    rows = question_rows(np.random.default_rng(1), 1, 0, 0.6)
    run = made_up_run(tmp_path / "run", steps=1)
    write_rollouts(run, 1, rows)
    index, _ = unpacked(PageParts([read_run(str(run), "run")]).part("0/1/index"))
    rewards = {}
    for row in rows:
        if row["kind"] == "partial":
            rewards.setdefault((row["trajectory"], row["state"]), set()).add(row["reward"])
    assert {tuple(key) for key in index["questions"][0]["split"]} == {
        key for key, found in rewards.items() if len(found) == 2
    }


def test_quantiles_are_of_each_state_once_and_of_what_is_trained(tmp_path):
    rows = question_rows(np.random.default_rng(2), 1, 0, 0.5)
    write_rollouts(tmp_path, 1, rows)
    found = quantiles_of(read_step(epath.Path(tmp_path / "rollouts/step-000001.parquet")))
    values = {(r["trajectory"], r["state"]): r["value"] for r in rows if r["kind"] == "partial"}
    trained = [r["advantage"] for r in rows if r.get("accepted")]
    np.testing.assert_allclose(found["value"][2], np.median(list(values.values())), atol=1e-4)
    np.testing.assert_allclose(found["advantage"][4], np.quantile(trained, 0.9), atol=1e-4)


def test_grpo_rows_are_the_rollouts_of_the_query(tmp_path):
    run = made_up_run(tmp_path / "run", steps=1, kept=None, questions=2, restarts=False)
    parts = PageParts([read_run(str(run), "run")])
    index, _ = unpacked(parts.part("0/1/index"))
    assert all(one["split"] in ([], [[0, 0]]) for one in index["questions"])
    assert parts.quantiles[0][1]["value"]


def test_a_file_of_a_bucket_says_what_one_here_does(tmp_path, monkeypatch):
    file = epath.Path(made_up_run(tmp_path / "run", steps=1, kept=None) / "rollouts/step-000001.parquet")
    here = read_step(file)
    read_rows.cache_clear()
    monkeypatch.setattr("fr3e_jax.view.rollouts.in_bucket", lambda _: True)
    there = read_step(file)
    assert there is not here and there.columns == here.columns


def test_nothing_that_a_model_wrote_stands_in_the_markup(tmp_path):
    page, _ = written(tmp_path, steps=1, kept=None, questions=1, hostile=True)
    for text in HOSTILE:
        assert text[:12] not in page
    assert "document.title='broken'" not in page
    assert page.count("</script>") == page.count("<script")
    # The policy lets the one script run that is there, and nothing connect.
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src &#x27;none&#x27;" in policy and "connect" not in policy
    assert page_script() in page


def test_a_title_is_text(tmp_path):
    run = made_up_run(tmp_path / "<b>{{parts}}<script>", steps=1)
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "p.html")), print, print)
    page = (tmp_path / "p.html").read_text()
    assert "<title>&lt;b&gt;{{parts}}&lt;script&gt;</title>" in page


@pytest.mark.parametrize(
    ("small", "scripts"),
    [(100_000, {"index": ["index", "texts", "0", "1"]}), (0, {n: [n] for n in ("index", "texts", "0", "1")})],
)
def test_a_large_run_lies_in_a_folder_beside_its_page(tmp_path, monkeypatch, small, scripts):
    """The questions of a small step with its index, so that a long run is not of files without number."""
    monkeypatch.setattr(parts_of_a_page, "SMALL_STEP", small)
    run = made_up_run(tmp_path / "run", steps=2, kept=None, questions=2)
    lines, page = [], tmp_path / "page.html"
    view(ViewOptions(runs=[str(run)], out=str(page), page_mb=0.01), lines.append, lines.append)
    folder = tmp_path / "page.html.parts"
    assert lines == [f"page: {page}, with its rollouts in {folder}"]
    call_of = re.compile(r'fr3eViewPart\("(.*)","(.*)"\)\n')
    found = {
        str(file.relative_to(folder)): call_of.findall(file.read_text()) for file in folder.rglob("*.js")
    }
    assert {file: [name for name, _ in parts] for file, parts in found.items()} == {
        f"0/{step}/{file}.js": [f"0/{step}/{name}" for name in names]
        for step in (1, 2)
        for file, names in scripts.items()
    }
    name, text = found[f"0/2/{'index' if small else '1'}.js"][-1]
    head, _ = unpacked(base64.b64decode(text))
    assert (name, head["query"]) == ("0/2/1", 3)
    view(ViewOptions(runs=[str(run)], out=str(page)), lines.append, lines.append)
    assert lines[-1] == f"page: {page}" and not folder.exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_page_of_many_rollouts_is_said_to_be_large_before_it_is_written(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run", steps=1, kept=None, questions=1)
    monkeypatch.setattr("fr3e_jax.view.command.LARGE", 1e3)
    lines = []
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "p.html")), lines.append, lines.append)
    assert len(lines) == 2 and "GB of rollouts" in lines[0] and "--serve" in lines[0]


def test_a_damaged_file_is_left_out_and_said(tmp_path):
    run = made_up_run(tmp_path / "run", steps=2, kept=None, questions=1)
    file = run / "rollouts/step-000001.parquet"
    file.write_bytes(file.read_bytes()[:500])
    (run / "rollouts/step-000003.parquet.tmp").write_bytes(b"torn")
    lines = []
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "p.html")), lines.append, lines.append)
    assert len(lines) == 2 and lines[0].startswith(f"warning: {file} is damaged (")
    assert 'data-part="0/2/index"' in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize("page_mb", [0.01, 64.0])
def test_what_breaks_while_a_page_is_written_is_left_out_and_said(tmp_path, monkeypatch, page_mb):
    """Training thins the files of a run that is read, and texts may be damaged where numbers are whole."""
    run = made_up_run(tmp_path / "run", steps=3, kept=None, questions=1)
    read = parts_of_a_page.read_step

    def deleting(file):
        if file.name == "step-000002.parquet":
            file.unlink(missing_ok=True)
        return read(file)

    monkeypatch.setattr(parts_of_a_page, "read_step", deleting)
    lines, page = [], tmp_path / "p.html"
    view(ViewOptions(runs=[str(run)], out=str(page), page_mb=page_mb), lines.append, lines.append)
    assert len(lines) == 2 and lines[0].startswith("warning: ") and lines[0].endswith(", and is left out")
    assert "step-000002.parquet" in lines[0]
    assert part_of(page.read_text(), "runs")[0]["runs"][0]["kept"] == [1, 3]


def test_a_run_without_rollouts_has_charts_and_says_what_keeps_them(tmp_path):
    page, lines = written(tmp_path, steps=2)
    assert "keeps no rollouts" in lines[0] and "--record.every 1" in lines[0]
    head, _ = part_of(page, "runs")
    assert head["runs"][0]["columns"]["reward/root_mean"][0] is None  # of step 0


def test_metrics_that_are_no_numbers_are_left_out():
    lines = [{"step": 1, "a": float("nan"), "b": 1 / 3, "c": True, "alarms": {"x": "y"}}, {"step": 2, "b": 7}]
    assert metric_columns(lines) == {"step": [1, 2], "b": [0.333333, 7]}


@pytest.mark.parametrize(
    ("verdicts", "size"),
    [
        ("11 10 00 01", 6),  # p = 1/2, error^2 = 1/24: 1/4 / (1/24)
        ("1 1 0 0", 4),  # 1/4 / (1/12) is 3, which is fewer than there are problems
        ("111 111 000 000", 4),  # answers to a problem are all alike
        ("10 01 10 01", 4),  # as many right answers to each: no error, which says nothing
        ("10 10 10 11", 8),  # 15/64 / (1/64) is 15, which is more than there are answers
        ("1101", 1),  # one problem has no error
    ],
)
def test_an_interval_is_of_as_many_answers_as_are_independent(verdicts, size):
    right = [[mark == "1" for mark in problem] for problem in verdicts.split()]
    answers = [Answer(one, "", False, 1, "") for sample in zip(*right, strict=True) for one in sample]
    line = {"step": 0} | held_out_metrics(answers, len(right[0]))
    columns = metric_columns([line, {"step": 1, "reward/base_mean": 0.5}])
    found = effective_answers(ShownRun(epath.Path("run"), "run", {}, columns, []))
    assert found == [pytest.approx(size, rel=1e-4), None]


def test_a_run_that_does_not_say_how_many_problems_it_judged_has_no_interval():
    columns = metric_columns([{"step": 0, "eval/accuracy": 0.5}])
    assert effective_answers(ShownRun(epath.Path("run"), "run", {"data.held_out": 64}, columns, [])) is None


def test_runs_are_named_by_what_tells_them_apart():
    assert run_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert run_names(["x/a/run", "x/b/run"]) == ["a/run", "b/run"]
    assert run_names(["a", "a"]) == ["a", "a"]


def test_runs_stand_first_on_the_command_line():
    assert with_named_runs(["a", "b c", "--serve"]) == ["--runs", '["a", "b c"]', "--serve"]
    assert with_named_runs(["--serve"]) == ["--serve"]


def test_the_page_lies_in_the_run_where_nothing_else_is_said(tmp_path):
    assert page_of(ViewOptions(runs=[f"{tmp_path}/", "b"])) == tmp_path / "view.html"
    assert str(page_of(ViewOptions(runs=["gs://bucket/run"]))) == "view.html"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run directory"),
        (["{tmp}/nowhere"], "there is no run directory {tmp}/nowhere"),
        (["{tmp}"], "holds no metrics.jsonl with a step"),
        (["{tmp}/run", "--out", "{tmp}"], "is a directory; name a file"),
        (["{tmp}/run", "--out", "{tmp}/no/page.html"], "is in a directory that is not there"),
        (["{tmp}/run", "--out", "gs://bucket/page.html"], "is in a bucket; write to a file here"),
        (["{tmp}/run", "--out", "p.html", "--serve"], "choose one"),
        (["{tmp}/run", "--port", "70000"], "port is 70000, must be"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(tmp_path, arguments, message):
    made_up_run(tmp_path / "run", steps=1)
    refused = call("view.__main__", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    assert message.format(tmp=tmp_path) in refused.stderr


def test_a_command_line_writes_the_page(tmp_path):
    run = made_up_run(tmp_path / "run", steps=1, kept=None, questions=1)
    done = call("view.__main__", run)
    assert (done.returncode, done.stdout) == (0, f"page: {run}/view.html\n")
