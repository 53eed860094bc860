"""The page of large runs and long texts in a real browser, and of runs that are served."""

import json
import threading
import time

import numpy as np
import pytest
from browser import chromium, needs_browser, tab_of
from made_up_run import long_rows, made_up_run, question_rows, write_rollouts

from fr3e_jax.view.command import ViewOptions, view
from fr3e_jax.view.parts import PageParts
from fr3e_jax.view.runs import read_run
from fr3e_jax.view.server import PageServer

pytestmark = [needs_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize(("small", "own"), [(100_000, []), (0, ["0/1/1.js"])])
def test_parts_beside_the_page_are_loaded_when_they_are_looked_at(browser, tmp_path, monkeypatch, small, own):
    monkeypatch.setattr("fr3e_jax.view.parts.SMALL_STEP", small)
    run = made_up_run(tmp_path / "run", steps=2, kept=None, questions=2)
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "page.html"), page_mb=0.01), print, print)
    address = (tmp_path / "page.html").as_uri()
    with tab_of(browser) as tab:
        loaded = []
        tab.page.on("request", lambda request: loaded.append(request.url.removeprefix(f"{address}.parts/")))
        page = tab.open(f"{address}#view=tree&step=1&query=1", ".fork")
        assert [name for name in loaded if name.endswith(".js")] == ["0/1/index.js", *own]
        page = tab.open(f"{address}#view=find&text=boxes", "#results > li >> nth=3")
        assert page.locator("#found").inner_text() == "4 questions"


def test_a_served_page_shows_what_a_run_has_by_now(browser, tmp_path):
    run = made_up_run(tmp_path / "run", steps=2, kept=(1,), questions=1)
    server = PageServer(0, lambda: PageParts([read_run(str(run), "run")]), "run")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with tab_of(browser) as tab:
            page = tab.open(f"{server.address}#view=tree", ".fork")
            assert page.locator("[data-focus='tree step'] option").all_inner_texts() == ["1"]
            write_rollouts(run, 2, question_rows(np.random.default_rng(0), 2, 5, 0.5))
            page = tab.open(f"{server.address}#view=tree&step=2&query=5", ".fork")
            assert page.locator("[data-focus='tree step'] option").all_inner_texts() == ["1", "2"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_megabyte_without_a_space_does_no_harm(browser, tmp_path):
    run = made_up_run(tmp_path / "run", steps=1)
    rows = question_rows(np.random.default_rng(0), 1, 0, 0.5)
    rows[0] |= {"text": "a" * 1_000_000, "ends": [1_000_000] * len(rows[0]["token"])}
    many = rows[1]
    many |= {"text": "b" * 20_000, "ends": list(range(1, 20_001)), "token": [5] * 20_000}
    many |= {"logprob": [-0.5] * 20_000, "entropy": [0.5] * 20_000}
    write_rollouts(run, 1, rows)
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "page.html")), print, print)
    address = f"{(tmp_path / 'page.html').as_uri()}#view=tree&trajectory="
    with tab_of(browser) as tab:
        page = tab.open(f"{address}0", ".fork")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page = tab.open(f"{address}1", ".more")
        assert page.locator("#base .tokens .t").count() == 12_000
        page.locator("#base .tokens").focus()
        page.keyboard.press("End")
        assert page.locator(".t.at").get_attribute("data-i") == "19999"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_thousand_rollouts_of_3000_tokens_open(browser, tmp_path):
    """`-s` shows the seconds, under 2 on an idle machine; the limit is that of a page that hangs."""
    run = made_up_run(tmp_path / "run", steps=2)
    write_rollouts(run, 2, long_rows(np.random.default_rng(0), 2, questions=10, rollouts=99, tokens=3000))
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "page.html")), print, print)
    address = (tmp_path / "page.html").as_uri()
    seconds = {}
    with tab_of(browser) as tab:
        start = time.monotonic()
        page = tab.open(f"{address}#view=tree&step=2&query=4", "#base .t >> nth=2999")
        seconds["opened"] = time.monotonic() - start
        assert page.locator(".continuation").count() == 99
        for key, ready in (("j", '[data-focus="question 5"][aria-current]'), ("c", "#base .by-logprob")):
            start = time.monotonic()
            page.keyboard.press(key)
            page.wait_for_selector(ready)
            seconds[key] = time.monotonic() - start
        page.locator(".unfold").first.click()
        page.wait_for_selector(".unfolded .t >> nth=2999")
    print(", ".join(f"{name}: {value:.2f} s" for name, value in seconds.items()))
    assert max(seconds.values()) < 15


def test_a_long_run_has_lines_of_means(browser, tmp_path):
    """Its lines would be areas that hide one another."""
    run = made_up_run(tmp_path / "run", steps=400)
    short = made_up_run(tmp_path / "short", steps=200)
    for folder, said in ((run, 1), (short, 0)):
        view(ViewOptions(runs=[str(folder)], out=str(tmp_path / "page.html")), print, print)
        with tab_of(browser) as tab:
            page = tab.open((tmp_path / "page.html").as_uri(), ".run-view .plot canvas")
            assert page.get_by_text("faint: each step").count() == said
            page.locator(".chart", has_text="Reward").locator(".plot").focus()
            page.keyboard.press("End")  # what is read are the numbers themselves
            number = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["reward/root_mean"]
            assert f"root mean {number:.3g}" in page.inner_text("#live")
