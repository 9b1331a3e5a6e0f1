"""Usable without a mouse, without sight of colours, without light, on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser

from tests.bench.dashboard.screen import Screen, Served

CHECKS = (Path(__file__).parent / "checks.js").read_text("utf-8")
VIEWS = ["", "view=cost", "view=power", "view=history", "view=compare", "view=table&model=*"]


def check(screen: Screen, name: str) -> list[Any]:
    """What one function of checks.js finds wrong."""
    found: list[Any] = screen.page.evaluate(f"(() => {{ {CHECKS}\n return {name}(); }})()")
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_stand_out(screen: Screen, data: dict[str, Any], theme: Literal["light", "dark"]) -> None:
    screen.theme(theme)
    off = next(point["id"] for point in data["points"] if point["off"])
    for view in [*VIEWS, f"point={off}", "engine=none", "labels=1"]:
        screen.view(view)
        assert check(screen, "faintText") == [], view
    assert check(screen, "faintMarks") == []


def test_everything_has_a_name_and_a_place(screen: Screen, data: dict[str, Any]) -> None:
    off = next(point["id"] for point in data["points"] if point["off"])
    for view in [*VIEWS, f"point={off}", "model=*&scenario=*"]:
        screen.view(view)
        assert check(screen, "markup") == [], view


def test_themes_follow_the_system_and_the_button(screen: Screen) -> None:
    page = screen.page
    background = "getComputedStyle(document.body).backgroundColor"
    marks = "document.querySelector('.plot').data.find(t => t.customdata).line.color"

    def colours() -> tuple[str, str]:
        screen.settle()
        return page.evaluate(background), page.evaluate(marks)

    light = colours()
    screen.theme("dark")
    dark = colours()
    assert dark[0] != light[0] and dark[1] != light[1]
    screen.theme("light")
    assert colours() == light
    page.click("#theme")
    assert colours() == dark
    assert page.inner_text("#theme") == "Light"
    page.reload()
    assert colours() == dark
    page.click("#theme")
    assert colours() == light
    page.evaluate("localStorage.clear(); delete document.documentElement.dataset.theme")


def tab_to(screen: Screen, id: str, limit: int = 60) -> None:
    for _ in range(limit):
        screen.page.keyboard.press("Tab")
        if screen.page.evaluate("document.activeElement.id") == id:
            return
    raise AssertionError(f"Tab does not reach {id}")


def test_filters_chart_and_table_by_keyboard_alone(screen: Screen) -> None:
    page, keys = screen.page, screen.page.keyboard
    first = "document.querySelector('a[href], button, select, input, [tabindex]').id"
    assert page.evaluate(first) == "skip"
    page.focus("#skip")
    box = page.locator("#skip").bounding_box()
    assert box and box["y"] >= 0
    tab_to(screen, "tab-power")
    keys.press("Enter")
    assert screen.settle().page.get_by_role("heading", name="per MW against").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-power"
    tab_to(screen, "filter-model")
    keys.press("ArrowDown")
    assert "model=big" in page.url
    tab_to(screen, "chip-engine-1")
    outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert page.evaluate(outline) == "solid"
    keys.press("Space")
    assert "engine=vllm" in page.url
    assert page.evaluate("document.activeElement.id") == "chip-engine-1"
    stage = screen.settle().page.locator(".stage").get_attribute("id")
    tab_to(screen, stage or "")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert "concurrency 2" in page.inner_text("#tip")
    assert "concurrency 2" in page.inner_text("#announcer")
    keys.press("Enter")
    assert "concurrency 2" in page.inner_text("#details")
    assert page.evaluate("document.activeElement.id") == "details"
    keys.press("Escape")
    assert page.evaluate("document.activeElement.id") == stage
    tab_to(screen, "sort-interactivity")
    keys.press("Enter")
    assert page.evaluate("document.activeElement.id") == "sort-interactivity"
    assert "sort=-interactivity" in page.url
    first = screen.rows()[0]
    tab_to(screen, f"row-{first}")
    keys.press("Enter")
    assert f"point={first}" in page.url
    assert page.evaluate("document.activeElement.id") == "details"
    keys.press("Escape")
    assert page.evaluate("document.activeElement.id") == f"row-{first}"
    page.focus("#skip")
    address = page.url
    keys.press("Enter")
    assert page.evaluate("document.activeElement.id") == "table-title"
    assert page.url == address
    assert screen.complaints == []


def test_arrow_keys_walk_all_points(screen: Screen) -> None:
    page = screen.page
    page.focus(".stage")
    seen = set()
    for _ in range(5):
        for _ in range(6):
            page.keyboard.press("ArrowRight")
            seen.add(page.inner_text("#tip"))
        page.keyboard.press("ArrowDown")
        for _ in range(6):
            page.keyboard.press("ArrowLeft")
            seen.add(page.inner_text("#tip"))
    assert len(seen) == len(screen.drawn())
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


RANGES = """(() => {
    const { xaxis, yaxis } = document.querySelector('.plot')._fullLayout;
    return [...xaxis.range, ...yaxis.range];
})()"""


def test_plus_minus_and_0_zoom_around_the_point(screen: Screen) -> None:
    page, keys = screen.page, screen.page.keyboard

    def ranges() -> list[float]:
        found: list[float] = screen.settle().page.evaluate(RANGES)
        return found

    def pressed(key: str, condition: str) -> list[float]:
        keys.press(key)
        screen.wait(condition)
        return ranges()

    whole = ranges()
    page.focus(".stage")
    keys.press("-")
    assert ranges() == whole, "there is no more to see"
    keys.press("ArrowRight")
    told = page.inner_text("#tip")
    near = pressed("+", "location.hash.includes('zoom')")
    for axis in (0, 2):
        assert near[axis + 1] - near[axis] == pytest.approx(0.6 * (whole[axis + 1] - whole[axis]), rel=1e-3)
    before = page.url
    nearer = pressed("=", f"location.href !== '{before}'")
    assert nearer[1] - nearer[0] == pytest.approx(0.36 * (whole[1] - whole[0]), rel=1e-3)
    keys.press("ArrowRight")
    keys.press("ArrowLeft")
    assert page.inner_text("#tip") == told, "the keys still walk the points"
    for _ in range(4):
        keys.press("ArrowRight")
    left, right, bottom, top = ranges()
    x, y = page.evaluate("(() => { const t = document.querySelector('.plot').data.find(t => t.customdata);"
                         " return [t.x.at(-1), t.y.at(-1)] })()")  # fmt: skip
    assert left <= x <= right and bottom <= y <= top, "the view follows the cursor"
    assert pressed("0", "!location.hash.includes('zoom')") == whole
    pressed("+", "location.hash.includes('zoom')")
    assert pressed("-", "!location.hash.includes('zoom')") == whole
    assert screen.complaints == []


def test_a_logarithmic_axis_zooms_by_its_exponents(screen: Screen) -> None:
    screen.view("logx=1&logy=1")
    whole = screen.page.evaluate(RANGES)
    screen.page.get_by_role("button", name="Zoom in").click()
    screen.wait("location.hash.includes('zoom')")
    near = screen.settle().page.evaluate(RANGES)
    assert near[1] - near[0] == pytest.approx(0.6 * (whole[1] - whole[0]), rel=1e-3)
    assert screen.complaints == []


def test_changes_are_announced(screen: Screen) -> None:
    before = screen.page.inner_text("#live-summary")
    assert before.startswith("The frontier has ")
    screen.chip("vllm").check()
    screen.settle()
    after = screen.page.inner_text("#live-summary")
    assert after != before and "vllm" in after
    assert screen.page.locator("#live-summary").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("width", [360, 768])
def test_narrow_screens_scroll_only_down(screen: Screen, data: dict[str, Any], width: int) -> None:
    screen.page.set_viewport_size({"width": width, "height": 740})
    picked = next(point["id"] for point in data["points"] if point["latest"])
    for view in [*VIEWS, f"point={picked}", "model=*"]:
        screen.view(view)
        screen.wait("document.documentElement.scrollWidth <= innerWidth")  # charts follow a moment later
    assert screen.complaints == []


def test_a_phone_starts_with_its_filters_folded(browser: Browser, served: Served) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 740}, has_touch=True, is_mobile=True)
    screen = Screen(context.new_page()).open(served.url)
    assert not screen.page.locator("#filter-model").is_visible()
    screen.page.tap("#filters summary")
    assert screen.page.locator("#filter-model").is_visible()
    assert screen.page.evaluate("document.querySelector('.plot').layout.dragmode") is False  # a finger scrolls the page
    screen.page.get_by_role("button", name="Zoom in").tap()
    screen.wait("location.hash.includes('zoom')")
    assert screen.complaints == []
    context.close()


def test_motion_can_be_switched_off(screen: Screen) -> None:
    animation = "getComputedStyle(document.getElementById('source'), '::before').animationName"
    assert screen.page.evaluate(animation) == "breathe"
    screen.page.emulate_media(reduced_motion="reduce")
    assert screen.page.evaluate(animation) == "none"
