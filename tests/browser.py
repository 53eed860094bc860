"""A real headless Chromium for tests of pages, or a reason why there is none."""

import contextlib
import shutil

import pytest

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    expect = sync_playwright = None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    sync_playwright is None or CHROMIUM is None,
    reason="needs a browser: apt-get install chromium, and pip install 'fr3e_jax[page]'",
)


@contextlib.contextmanager
def chromium():
    """A browser without a network."""
    with sync_playwright() as playwright:
        # Without a sandbox, since tests may run as root.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--force-color-profile=srgb"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A tab, with what went wrong in it.

    faults: errors of scripts and of the console, dialogs, and requests to anywhere but the page's own place.
    """

    def __init__(self, browser, theme="light", width=1440, height=900):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.faults = []
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", lambda line: line.type == "error" and self.faults.append(line.text))
        self.page.on("dialog", lambda dialog: (self.faults.append("a dialog"), dialog.dismiss()))
        self.page.on("request", self.see)

    def see(self, request):
        if not request.url.startswith(("file:", "data:", "http://127.0.0.1:")):
            self.faults.append(f"request: {request.url}")

    def open(self, address, ready):
        """Go to an address, from nowhere, until something is there."""
        self.page.goto("about:blank")
        self.page.goto(address)
        self.page.wait_for_selector(ready)
        return self.page

    def close(self):
        self.context.close()


@contextlib.contextmanager
def tab_of(browser, **options):
    """A tab in which nothing may go wrong."""
    tab = Tab(browser, **options)
    try:
        yield tab
        assert tab.faults == []
    finally:
        tab.close()
