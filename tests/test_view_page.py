"""The page of runs in a real browser: every view, by mouse and by key, with texts that want to break it."""

import json
import re

import numpy as np
import pytest
from browser import chromium, expect, needs_browser, tab_of
from made_up_run import HOSTILE, made_up_run, question_rows, write_rollouts

from fr3e_jax.view.command import ViewOptions, view

pytestmark = needs_browser
RUN, TREE, FIND = ".run-view .plot canvas", "#reading", "#found"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The page of two runs, of which one keeps the rollouts of two steps, hostile texts among them."""
    folder = tmp_path_factory.mktemp("view")
    first = made_up_run(folder / "first", steps=6, kept=(3, 6), questions=3, hostile=True)
    second = made_up_run(folder / "second", steps=4, seed=1)
    page = folder / "page.html"
    view(ViewOptions(runs=[str(first), str(second)], out=str(page)), print, print)
    return page.as_uri()


def text(page, selector):
    return " ".join(page.inner_text(selector).split())


def test_the_run_shows_numbers_of_all_runs_and_their_alarms(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(page_file, RUN)
        headings = page.locator(".chart h3").all_inner_texts()
        assert {"Held-out accuracy", "Reward", "Gradient norm", "Seconds a stage", "V over states"} <= set(
            headings
        )
        alarms = text(page, ".alarms")
        assert "truncation" in alarms and "Raise rollout.max_response" in alarms
        assert "<b>Raise</b>" in alarms  # as it is written
        accuracy = page.locator(".chart", has_text="Held-out accuracy")
        of_160_in_200 = "80.0% (73.9% to 85.0%)"  # (p + z2/2n -+ z sqrt(pq/n + z2/4n2)) / (1 + z2/n)
        assert accuracy.inner_text().count(of_160_in_200) == 2
        page.get_by_role("checkbox", name="second").uncheck()
        assert accuracy.inner_text().count(of_160_in_200) == 1
        for axis in ("tokens", "FLOPs", "seconds"):
            page.get_by_role("button", name=axis, exact=True).click()
            page.wait_for_selector(RUN)
            assert page.get_by_role("button", name=axis, exact=True).get_attribute("aria-pressed") == "true"


def test_an_alarm_is_marked_where_it_goes_off(browser, tmp_path):
    """Not at each step at which it is still on."""
    run = made_up_run(tmp_path / "run", steps=9)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["alarms"] = {"drift": "A sentence."} if line["step"] in (3, 4, 5, 8, 9) else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "page.html")), print, print)
    with tab_of(browser) as tab:
        page = tab.open((tmp_path / "page.html").as_uri(), RUN)
        label = page.locator(".plot").first.get_attribute("aria-label")
        assert "Alarms: drift at 3, drift at 8." in label
        assert "5 steps, 3 to 9" in text(page, ".alarms")


def test_a_chart_is_read_by_key_and_leads_to_its_step(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(page_file, RUN)
        page.locator(".plot").first.focus()
        page.keyboard.press("Home")
        assert page.inner_text("#live") == (
            "Held-out accuracy at 0: first 30.0% (24.1% to 36.7%), second 30.0% (24.1% to 36.7%)"
        )
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("#live").startswith("Held-out accuracy at 3: ")
        page.keyboard.press("Enter")
        page.wait_for_selector(TREE)
        assert page.locator("[data-focus='tree step']").input_value() == "3"


def test_the_tree_shows_forks_values_and_verdicts(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(f"{page_file}#view=tree&step=6&query=16&trajectory=0&state=1", TREE)
        verdict = r"gold answer \d+ r0 ✓ right reward 1 judged \d+ reason equal"
        assert re.search(verdict, text(page, "#question"))
        chips = page.locator("#base .fork").all_inner_texts()
        assert [re.sub(r"\s+", " ", chip)[:4] for chip in chips] == ["S0 V", "S1 V", "S2 V", "S3 V"]
        figures = page.locator(".continuation .figures").all_inner_texts()
        rewards = [float(re.search(r"reward (\d)", figure)[1]) for figure in figures]
        assert len(rewards) == 6 and rewards == sorted(rewards, reverse=True)
        value = float(re.search(r"V (\d\.\d\d)", text(page, ".fork-head"))[1])
        assert value == pytest.approx(sum(rewards) / 6, abs=0.01)
        assert not page.locator(".unfolded").count()
        page.locator(".unfold").first.click()
        assert "boxed" in page.inner_text(".unfolded .tokens")
        page.locator("#base .t").nth(4).hover()
        numbers = r"token 5 of \d+ id \d+ probability \d\.\d+ .*entropy \d\.\d+ nats"
        assert re.search(numbers, text(page, TREE))


def test_two_continuations_are_compared_word_by_word(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(f"{page_file}#view=tree&step=6&query=16&trajectory=0&state=0", TREE)
        ticks = page.locator(".continuation input")
        ticks.first.check()
        ticks.last.check()
        page.wait_for_selector(".compared")
        left, right = page.locator(".compared .tokens").all()
        shared = []
        for side, tag in ((left, "del"), (right, "ins")):
            assert side.locator(tag).count()
            without = f"copy.querySelectorAll('{tag}').forEach(one => one.remove())"
            shared.append(
                side.evaluate(
                    f"e => {{ const copy = e.cloneNode(true); {without}; return copy.textContent }}"
                )
            )
        assert shared[0] == shared[1] and "The answer is \\boxed{" in shared[0]
        page.keyboard.press("Escape")
        page.wait_for_selector("#base .fork")


def test_everything_can_be_done_by_key(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(page_file, RUN)
        page.keyboard.press("2")
        page.wait_for_selector(TREE)
        steps = page.locator("[data-focus='tree step']")
        assert steps.input_value() == "6"
        page.keyboard.press("[")
        expect(steps).to_have_value("3")
        page.keyboard.press("]")
        expect(steps).to_have_value("6")
        page.keyboard.press("j")
        expect(page.locator(".question[aria-current]")).to_have_attribute("data-focus", "question 1")
        page.keyboard.press("t")
        expect(page.locator(".tab[aria-current]")).to_contain_text("r1")
        page.keyboard.press("F")
        page.keyboard.press("f")
        page.keyboard.press("o")
        page.wait_for_selector(".unfolded")
        page.keyboard.press("c")
        page.wait_for_selector("#base .by-logprob")
        page.locator("#base .tokens").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.locator(".t.at").get_attribute("data-i") == "2"
        assert "token 3 of" in text(page, TREE) and "entropy" in page.inner_text("#live")
        page.keyboard.press("?")
        page.wait_for_selector("#help[open]")
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        page.wait_for_selector(FIND)
        page.keyboard.type("boxes with")
        expect(page.locator("#results > li")).to_have_count(6)
        page.keyboard.press("Escape")
        page.keyboard.press("n")  # of the tree alone
        page.keyboard.press("2")
        page.wait_for_selector(TREE)


def test_a_link_leads_back_to_the_same_view(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(f"{page_file}#view=tree&step=3&query=7", TREE)
        page.keyboard.press("t")
        page.locator("#base .fork").nth(2).click()
        page.locator(".unfold").nth(1).click()
        page.locator("[id=colour]").select_option("logprob")
        page.locator("#base .t").nth(7).click()
        shown, address = page.inner_text("main"), page.url
        assert page.locator(".t.at").get_attribute("data-i") == "7"
        page = tab.open(address, ".t.at")
        assert page.inner_text("main") == shown
        page.keyboard.press("1")
        page.wait_for_selector(RUN)
        page.go_back()
        page.wait_for_selector(".t.at")
        assert page.inner_text("main") == shown


def test_find_narrows_down_by_what_is_asked(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(f"{page_file}#view=find", "#results > li")
        expect(page.locator("#results > li")).to_have_count(6)
        page.get_by_label("from step").fill("4")
        expect(page.locator("#results > li")).to_have_count(3)
        page.locator("[name=right]").select_option("no")
        page.locator("[name=kind]").select_option("partial")
        page.get_by_label("states whose continuations disagree").check()
        expect(page).to_have_url(re.compile("split=yes"))
        expect(page.locator("#results")).not_to_contain_text("✓")
        page.locator("#results ul a").first.click()
        page.wait_for_selector(".unfolded")
        unfolded = page.locator(".continuation", has=page.locator(".unfolded"))
        assert unfolded.get_attribute("class").endswith("is-wrong")
        assert "no: all" not in text(page, ".fork-head")


def test_hostile_texts_are_shown_and_do_nothing(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(f"{page_file}#view=tree&step=6&query=15", TREE)
        for trajectory in range(4):
            page.locator(".tab").nth(trajectory).click()
            expect(page.locator(".tab[aria-current]")).to_contain_text(f"r{trajectory}")
            page.keyboard.press("o")
            page.wait_for_timeout(50)
        assert page.title().startswith("Rollouts · first")
        assert not page.locator("main img, main script").count()
        page.locator(".tab").first.click()
        expect(page.locator(".tab[aria-current]")).to_contain_text("r0")
        tokens = page.locator("#base .tokens .t").all_text_contents()
        assert "".join(tokens).replace("·", "") == HOSTILE[0]
        question = text(page, ".asked-whole")
        assert "U+202E" in question and "U+200B" in question and "U+0000" in question
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00-\x08]", page.inner_text("main"))
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]


def test_an_address_that_says_nonsense_shows_something(browser, page_file):
    words = (
        "run=-3&step=x&query=%22%5D&trajectory=9&state=-1&colour=%3Cb%3E&token=b0:%22%5D&open=,,&compare=z"
    )
    with tab_of(browser) as tab:
        assert "gold answer" in tab.open(f"{page_file}#view=tree&{words}", ".fork").inner_text("main")
        tab.open(f"{page_file}#view=__proto__&x=constructor&hidden=-1.x", RUN)
        tab.open(f"{page_file}#view=find&least=x&from=-&where=1", "#results > li")


def test_forks_are_reached_from_within_the_text(browser, page_file):
    with tab_of(browser) as tab:
        page = tab.open(f"{page_file}#view=tree&step=6&query=16&trajectory=0", ".fork")
        page.locator("#base .tokens").focus()
        stops = []
        for key in ("}", "}", "}", "{"):
            page.keyboard.press(key)
            stops.append(page.locator(".t.at").get_attribute("data-i"))
        behind = "e => [...e.querySelectorAll('.chips')].map(chip => chip.nextSibling.dataset.i)"
        places = page.locator("#base .tokens").evaluate(behind)
        assert stops == [*places[:3], places[1]]


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_labels_contrast_and_order_are_as_they_should_be(browser, page_file, theme):
    """What axe-core finds, in every view."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    views = [(page_file, RUN), (f"{page_file}#view=find&text=apples", "#results > li")]
    tree = f"{page_file}#view=tree&step=6&query=16&trajectory=0&state=0"
    views += [(f"{tree}&open=r0.0.0%2Cr0.0.1&colour={colour}", TREE) for colour in ("entropy", "advantage")]
    views += [(f"{tree}&compare=r0.0.0%2Cr0.0.1", ".compared")]
    with tab_of(browser, theme=theme) as tab:
        for address, ready in views:
            page = tab.open(address, ready)
            found = axe.run(page).response["violations"]
            told = [(one["id"], one["nodes"][0]["html"][:120]) for one in found]
            assert told == [], address


def test_a_step_opens_at_a_fork_whose_continuations_disagree(browser, tmp_path):
    """With colours that reach to the entropies of the question."""
    run, rows = made_up_run(tmp_path / "run", steps=1), []
    for query in (7, 8):
        rows += question_rows(np.random.default_rng(query), 1, query, 0.5)
    for row in rows:
        row |= {"reward": 0.0, "right": False, "entropy": [4.0] * len(row["token"])}
    (odd,) = (
        row
        for row in rows
        if (row["query"], row["trajectory"], row.get("state"), row.get("rollout")) == (8, 1, 2, 0)
    )
    odd |= {"reward": 1.0, "right": True}
    write_rollouts(run, 1, rows)
    view(ViewOptions(runs=[str(run)], out=str(tmp_path / "page.html")), print, print)
    with tab_of(browser) as tab:
        page = tab.open(f"{(tmp_path / 'page.html').as_uri()}#view=tree", TREE)
        assert "query 8" in text(page, "#question")
        expect(page.locator(".tab[aria-current]")).to_contain_text("r1")
        expect(page.locator("#base .fork[aria-pressed=true]")).to_contain_text("S2")
        assert "0 to 5 nats and more" in text(page, ".legend")
        assert "l8" in page.locator("#base .t").first.get_attribute("class")  # floor(sqrt(4/5) 8.999)
