"""A page beside a running benchmark, beside a server that goes away, and without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext

from skyline.bench.dashboard.data import page_data
from skyline.bench.dashboard.export import export_site
from skyline.bench.suite import parse_suite
from tests.bench.dashboard import synthetic
from tests.bench.dashboard.screen import Screen, Served

HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script><b>&amp;%{x}</b>"


def test_new_points_come_by_themselves_without_losing_the_view(screen: Screen, served: Served) -> None:
    runs, points, accuracy = synthetic.results(dates=1, status="running")
    screen.show(page_data(runs, points[:4], accuracy, {})).view("logx=1&labels=1")
    page = screen.page
    screen.chip("Log y").check()
    assert len(screen.settle().drawn()) == 4
    assert page.inner_text("#progress").startswith("release: 4 of ")
    page.focus("#sort-interactivity")
    page.evaluate("window.mark = 1")
    address = page.url
    served.show(page_data(runs, points[:6], accuracy, {}))
    screen.wait("document.querySelector('.plot').data.flatMap(t => t.customdata ?? []).length === 5")
    assert page.evaluate("window.mark") == 1
    assert page.url == address
    assert page.evaluate("document.querySelector('.plot').layout.xaxis.type") == "log"
    assert page.evaluate("document.activeElement.id") == "sort-interactivity"
    assert page.inner_text("#progress").startswith("release: 6 of ")
    assert page.inner_text("#source") == "Live"
    assert screen.complaints == []


def test_filters_and_zoom_outlive_an_update(screen: Screen) -> None:
    runs, points, accuracy = synthetic.results(dates=2)
    screen.show(page_data(runs[:1], points, accuracy, {})).view("engine=vllm&zoom=demo+·+1k/1k@5,30,0,150")
    page = screen.page
    layout = "document.querySelector('.plot').layout"
    ranges = f"[...{layout}.xaxis.range, ...{layout}.yaxis.range]"
    assert page.evaluate(ranges) == [5, 30, 0, 150]
    screen.show(page_data(runs, points, accuracy, {}))
    assert {id[:7] for id in screen.drawn()} == {"point-1"}
    assert page.evaluate(ranges) == [5, 30, 0, 150]
    assert screen.chip("vllm").is_checked()
    assert len(screen.drawn()) == 4


def test_an_open_field_survives_an_update(screen: Screen) -> None:
    runs, points, accuracy = synthetic.results(dates=1)
    screen.show(page_data(runs, points[:4], accuracy, {})).view("view=cost")
    screen.page.focus("#price-0")
    screen.page.keyboard.type("1.")
    screen.show(page_data(runs, points[:5], accuracy, {}))
    assert len(screen.rows()) == 5
    screen.page.keyboard.type("25")
    assert screen.page.evaluate("document.activeElement.value") == "1.25"


def test_a_store_that_breaks_and_a_server_that_goes_away(context: BrowserContext, data: dict[str, Any]) -> None:
    served = Served(data)
    screen = Screen(context.new_page(), served).open(served.url)
    page = screen.page
    served.fail("bench.db: disk <b>image</b> is malformed")
    screen.look()
    page.wait_for_selector("#banner:has-text('disk <b>image</b> is malformed')")
    assert page.locator(".plot .trace").count() > 0
    served.fail(None)
    screen.look()
    page.wait_for_selector("#banner", state="hidden")
    served.stop()
    screen.look()
    page.wait_for_selector("#banner:has-text('does not answer')")
    assert page.inner_text("#source") == "Server out of reach"
    assert page.locator(".plot .trace").count() > 0
    page.close()


def test_nothing_measured_yet(screen: Screen) -> None:
    screen.show(page_data([], [], [], {}))
    assert "skyline bench run quick" in screen.page.inner_text("#empty")
    assert not screen.page.locator("#results").is_visible()
    runs, points, accuracy = synthetic.results(dates=1, status="running")
    screen.show(page_data(runs, [], [], {}))
    assert "The first point is under way" in screen.page.inner_text("#empty")
    assert "skyline bench run" not in screen.page.inner_text("#empty")
    screen.show(page_data(runs, points[:3], accuracy, {}))
    assert len(screen.drawn()) == 3
    assert not screen.page.locator("#empty").is_visible()
    assert screen.complaints == []


def hostile(data: dict[str, Any]) -> dict[str, Any]:
    """Every text that a store may hold, made hostile."""
    text = json.dumps(data)
    for name in ("vllm", "demo", "1k/1k", "EPYC 9454, 2 cores", "release", "out of memory", "bf16", "nightly"):
        text = text.replace(name, json.dumps(name[:3] + HOSTILE)[1:-1])
    found: dict[str, Any] = json.loads(text)
    return found


def test_hostile_names_stay_text(screen: Screen, data: dict[str, Any]) -> None:
    bad = hostile(data)
    screen.show(bad)
    page = screen.page
    picked = next(p["id"] for p in bad["points"] if p["status"] == "failed")
    for view in ("", "view=cost", "view=history&level=*", "view=compare", "view=table", "model=*&scenario=*&run=all"):
        screen.view(f"{view}&point={picked}")
        assert page.evaluate("document.querySelectorAll('img, b script, td script, .plot a, iframe').length") == 0
        assert page.evaluate("document.querySelectorAll('script').length") == 2
    screen.view(f"point={picked}")
    assert HOSTILE in page.inner_text("#details h2")
    assert HOSTILE in page.inner_text("#table tbody")
    assert HOSTILE in page.inner_text(".legend")
    page.hover(".lost")
    page.evaluate("document.querySelector('.stage').focus()")
    page.keyboard.press("ArrowRight")
    assert HOSTILE in page.inner_text("#tip")
    with page.expect_download():
        page.click(".png")
    assert screen.complaints == []


def test_a_picture_draws_hostile_names_as_text(screen: Screen, data: dict[str, Any]) -> None:
    """Plotly reads tags in names; the downloaded picture has a legend with them."""
    screen.show(hostile(data))
    names = screen.page.evaluate("document.querySelector('.plot').data.map(t => t.name ?? '').join(' ')")
    assert "&lt;img src=x" in names and "<" not in names
    screen.page.evaluate("Plotly.relayout(document.querySelector('.plot'), {showlegend: true})")
    legend = screen.page.eval_on_selector_all(".plot .legendtext", "all => all.map(text => text.textContent).join(' ')")
    assert "<img src=x onerror=alert(1)>" in legend and "<b>&amp;%{x}</b>" in legend
    assert screen.complaints == []


def test_csv_runs_no_formula(screen: Screen, data: dict[str, Any]) -> None:
    text = json.dumps(data).replace('"llama.cpp"', json.dumps('=HYPERLINK("x","y")'))
    screen.show(json.loads(text))
    with screen.page.expect_download() as download:
        screen.page.click("#csv")
    assert ""","'=HYPERLINK(""x"",""y"")",""" in Path(download.value.path()).read_text("utf-8")


@pytest.fixture
def offline(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(offline=True)
    yield context
    context.close()


def test_a_site_works_from_disk_without_network(offline: BrowserContext, data: dict[str, Any], tmp_path: Path) -> None:
    index = export_site(data, tmp_path / "site")
    screen = Screen(offline.new_page())
    requested: list[str] = []
    screen.page.on("request", lambda request: requested.append(request.url))
    screen.open(index.as_uri())
    page = screen.page
    assert page.inner_text("#source").startswith("Copy of ")
    drawn = screen.drawn()
    assert len(drawn) == 14
    screen.chip("vllm").check()
    assert 0 < len(screen.settle().drawn()) < len(drawn)
    assert "engine=vllm" in page.url
    for view in ("cost", "power", "history", "compare", "table"):
        page.click(f"#tab-{view}")
        screen.settle()
    page.reload()
    assert screen.settle().page.locator("#tab-table").get_attribute("aria-current") == "page"
    with page.expect_download():
        page.click("#csv")
    assert requested and all(url.startswith(("file:", "data:", "blob:")) for url in requested)
    assert screen.complaints == []


def test_a_site_without_its_store_brings_the_suite_of_a_point(
    offline: BrowserContext, data: dict[str, Any], tmp_path: Path
) -> None:
    point = next(point for point in data["points"] if point["latest"] and point["off"] is None)
    index = export_site(data, tmp_path / "site")
    screen = Screen(offline.new_page()).open(index.as_uri(), f"point={point['id']}")
    name = f"suite-{point['id'][:12]}.yaml"
    assert f"skyline bench run {name}" in screen.page.inner_text("#details")
    assert "skyline bench rerun" not in screen.page.inner_text("#details")
    with screen.page.expect_download() as download:
        screen.page.click("#download-suite")
    assert download.value.suggested_filename == name
    (spec,) = parse_suite(Path(download.value.path()).read_text("utf-8")).points()
    assert (spec.engine.name, spec.level.label) == (
        data["series"][point["series"]]["engine"],
        point["level"]["label"],
    )
    assert screen.complaints == []


def test_an_empty_site_says_what_to_run(offline: BrowserContext, tmp_path: Path) -> None:
    screen = Screen(offline.new_page()).open(export_site(page_data([], [], [], {}), tmp_path).as_uri())
    assert "skyline bench run quick" in screen.page.inner_text("#empty")
    assert screen.complaints == []
