"""A dashboard's server whose data a test may replace, and a page that notes every complaint of the browser."""

from __future__ import annotations

import threading
import time
from typing import Any, Literal

import uvicorn
from playwright.sync_api import ConsoleMessage, Dialog, Locator, Page

from skyline.bench.dashboard.app import create_app
from tests.bench.dashboard import synthetic

Data = dict[str, Any]
# How often the page took data.
LOADS = "performance.getEntriesByName('skyline-data').length"


class Served:
    """A dashboard whose data a test may replace."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self._stamp = data, 0
        self.error: str | None = None
        config = uvicorn.Config(create_app(self._load, lambda: str(self._stamp)), port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the dashboard's server did not start")
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def _load(self) -> dict[str, Any]:
        if self.error:
            raise OSError(self.error)
        return self.data

    def show(self, data: dict[str, Any]) -> None:
        self.data = data
        self._stamp += 1

    def fail(self, error: str | None) -> None:
        self.error = error
        self._stamp += 1

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


class Screen:
    """A page that notes every complaint of the browser."""

    def __init__(self, page: Page, served: Served | None = None) -> None:
        self.page = page
        self.served = served
        self.complaints: list[str] = []
        page.on("console", self._log)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", self._dismiss)

    def _log(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _dismiss(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, url: str, view: str = "") -> Screen:
        self.page.goto(f"{url}#{view}")
        return self.settle()

    def view(self, view: str) -> Screen:
        """Another view of the page that is open, as by an edited address."""
        self.page.evaluate("view => { location.hash = view }", view)
        return self.settle()

    def theme(self, scheme: Literal["light", "dark"]) -> Screen:
        """As if the system changed it. The page hears of it with the next frame."""
        self.page.emulate_media(color_scheme=scheme, reduced_motion="no-preference")
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.settle()

    def show(self, data: dict[str, Any]) -> Screen:
        """Other data at the server; the page is told to look at once, which it would by itself after 2 s."""
        assert self.served is not None
        seen = self.page.evaluate(LOADS)
        self.served.show(data)
        self.look()
        self.wait(f"{LOADS} > {seen}")
        return self.settle()

    def look(self) -> None:
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def wait(self, condition: str) -> None:
        """Until an expression is true. Playwright's own wait evaluates text in the page, which its policy forbids."""
        deadline = time.monotonic() + 60
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"not true within 60 s: {condition}"
            time.sleep(0.02)

    def settle(self) -> Screen:
        """Until everything is drawn."""
        self.wait(
            "document.getElementById('panels').getAttribute('aria-busy') === 'false'"
            " || document.getElementById('results').hidden && document.getElementById('loading').hidden"
        )
        return self

    def chip(self, name: str) -> Locator:
        """A value of the filters."""
        return self.page.get_by_role("checkbox", name=name, exact=True)

    def drawn(self) -> list[str]:
        """The ids of the points in all charts, in the order of drawing."""
        script = """[...document.querySelectorAll('.plot')].flatMap(
            (plot) => plot.data.flatMap((trace) => trace.customdata ?? []))"""
        found: list[str] = self.page.evaluate(script)
        return found

    def rows(self) -> list[str]:
        found: list[str] = self.page.eval_on_selector_all("#table tbody tr", "rows => rows.map(row => row.dataset.id)")
        return found


def points(data: Data, model: str = "demo", workload: str = "1k/1k", run: str | None = synthetic.LAST) -> list[Any]:
    return [
        point
        for point in data["points"]
        if (run is None or point["run"] == run)
        and (data["series"][point["series"]]["model"], data["series"][point["series"]]["workload"]) == (model, workload)
    ]


def placed(found: list[Any], *keys: str) -> set[str]:
    """Ids of points that have all these metrics."""
    return {point["id"] for point in found if all(point["metrics"].get(key, [None])[0] is not None for key in keys)}


def engine_of(data: Data, point: Any) -> str:
    return str(data["series"][point["series"]]["engine"])
