"""Real Chromium on the real page, served by a real server on a free port.

The browser is found by the variable CHROMIUM or on PATH. Without one these tests are skipped, but where CI is set they
fail: there the page must have been looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ViewportSize, sync_playwright

from skyline.bench.dashboard.data import page_data
from tests.bench.dashboard import synthetic
from tests.bench.dashboard.screen import Screen, Served

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP: ViewportSize = {"width": 1440, "height": 1000}
PRICES = {"EPYC 9454, 2 cores": 0.08}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        why = "no Chromium: install it (Debian: apt-get install chromium) or name one in the variable CHROMIUM"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    return path


# Playwright's event loop counts as running until it is stopped, and no other test could run one: so it lives as long as
# these tests and not as long as the session.
@pytest.fixture(scope="package")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def data() -> dict[str, Any]:
    """What the page shows of the synthetic results. Not to be changed."""
    return page_data(*synthetic.results(), PRICES)


@pytest.fixture(scope="package")
def served(data: dict[str, Any]) -> Iterator[Served]:
    """The dashboard that the shared page shows."""
    served = Served(data)
    yield served
    served.stop()


@pytest.fixture(scope="package")
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture(scope="package")
def shared_screen(context: BrowserContext, served: Served) -> Screen:
    return Screen(context.new_page(), served).open(served.url)


@pytest.fixture
def screen(shared_screen: Screen, served: Served, data: dict[str, Any]) -> Screen:
    """The page of the synthetic results at its start. One page serves all tests: loading it takes the longest."""
    page = shared_screen.page
    page.set_viewport_size(DESKTOP)
    shared_screen.theme("light")
    page.mouse.move(0, 0)
    if served.data is not data:
        shared_screen.show(data)
    shared_screen.view("")
    shared_screen.complaints.clear()
    return shared_screen
