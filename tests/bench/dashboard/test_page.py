"""What a viewer sees in Chromium: views, filters, axes, links."""

from __future__ import annotations

import itertools

import pytest

from skyline.bench.dashboard.data import page_data
from tests.bench.dashboard import synthetic
from tests.bench.dashboard.screen import Data, Screen, engine_of, placed, points

VIEWS = [
    ("", "Output throughput per device against interactivity"),
    ("y=total_per_device&x=ttft_p50&logx=1&logy=1", "Total throughput per device against time to first token, median"),
    ("x=e2e_p50&bands=0&errors=0&labels=1&colour=series", "against end-to-end latency, median"),
    ("view=cost&logy=1", "Cost per million output tokens against interactivity"),
    ("view=power", "Output tokens per second per MW against interactivity"),
    ("view=history&level=*", "Output throughput per device over time"),
    ("view=compare", "skyline 0.1.0 · int8 against vllm 0.11.0 · bf16"),
]


@pytest.mark.parametrize(("view", "title"), VIEWS)
def test_every_view_is_drawn_without_complaint(screen: Screen, view: str, title: str) -> None:
    screen.view(view)
    assert title in screen.page.inner_text(".panel h2")
    assert screen.page.locator(".plot .trace").count() > 0
    assert screen.page.inner_text(".panel .summary")
    assert screen.complaints == []


def test_the_table_is_a_view_of_its_own(screen: Screen, data: Data) -> None:
    screen.view("view=table&model=*&scenario=*&run=all")
    assert screen.page.locator(".panel").count() == 0
    assert len(screen.rows()) == 200
    screen.page.click("#more")
    assert sorted(screen.rows()) == sorted(point["id"] for point in data["points"])
    assert screen.complaints == []


def test_one_panel_for_each_model_and_scenario(screen: Screen) -> None:
    screen.view("model=*&scenario=*")
    subtitles = screen.page.locator(".panel .subtitle").all_inner_texts()
    assert len(subtitles) == 6 and len(set(subtitles)) == 6
    assert screen.complaints == []


def test_the_chart_holds_the_points_at_their_coordinates(screen: Screen, data: Data) -> None:
    traces = screen.page.evaluate(
        "document.querySelector('.plot').data.filter(t => t.customdata).map(t => [t.customdata, [...t.x], [...t.y]])"
    )
    drawn = {id: (x, y) for ids, xs, ys in traces for id, x, y in zip(ids, xs, ys, strict=True)}
    assert drawn == {
        point["id"]: (point["metrics"]["interactivity"][0], point["metrics"]["output_per_device"][0])
        for point in points(data)
        if point["status"] != "failed"
    }


def test_what_cannot_count_is_dimmed_and_off_the_frontier(screen: Screen, data: Data) -> None:
    off = {point["id"]: point["off"] for point in points(data) if point["off"]}
    assert len(off) == 3
    dim = screen.page.evaluate(
        "document.querySelector('.plot').data.filter(t => t.opacity < 1 && t.customdata).flatMap(t => t.customdata)"
    )
    (failed,) = [id for id in off if id not in dim]
    lost = screen.page.locator(f"#lost-{failed}")
    assert "vllm" in lost.inner_text() and lost.get_attribute("title") == off[failed]
    on = screen.page.eval_on_selector_all(".door", "doors => doors.map(door => door.dataset.point)")
    assert on and not set(on) & set(off)
    for id in off:
        row = screen.page.locator(f"#table tr[data-id='{id}']")
        assert "dim" in (row.get_attribute("class") or "")
        assert off[id] in row.inner_text().replace("\n", " ")


def test_an_unknown_interval_is_marked_and_explained(screen: Screen, data: Data) -> None:
    """Of the one point whose run was too short: hollow, with a probability that is unknown, and why."""
    (point,) = [p for p in points(data) if len(p["metrics"].get("interactivity", [])) > 4]
    marks = screen.page.evaluate(
        "Object.fromEntries(document.querySelector('.plot').data.filter(t => t.customdata && t.opacity === 1)"
        ".flatMap(t => t.customdata.map((id, i) => [id, t.marker.symbol[i]])))"
    )
    assert {id for id, symbol in marks.items() if symbol.endswith("-open-dot")} == {point["id"]}
    assert "its interval is not known" in screen.page.inner_text(".panel .legend")
    screen.page.focus(".stage")
    told = ""
    for _ in range(40):
        screen.page.keyboard.press("ArrowRight")
        told = screen.page.inner_text("#tip")
        if synthetic.TOO_SHORT in told:
            break
        if "concurrency 16" in told or "concurrency 8" in told:
            screen.page.keyboard.press("ArrowDown")
            for _ in range(6):
                screen.page.keyboard.press("ArrowLeft")
    assert synthetic.TOO_SHORT in told and "(no interval)" in told and "probability unknown" in told
    row = screen.page.locator(f"#table tr[data-id='{point['id']}']").inner_text()
    assert "unknown" in row
    screen.view(f"point={point['id']}")
    assert f"no interval: {synthetic.TOO_SHORT}" in screen.page.inner_text("#details .measurements")
    assert "probability unknown" in screen.page.inner_text("#details .standing")
    assert screen.complaints == []


def test_the_frontier_is_drawn_through_its_points(screen: Screen, data: Data) -> None:
    (entry,) = [
        entry
        for entry in data["frontiers"]
        if (entry["model"], entry["workload"], entry["x"], entry["y"])
        == ("demo", "1k/1k", "interactivity", "output_per_device")
    ]
    line = screen.page.evaluate(
        "(() => { const t = document.querySelector('.plot').data.find(t => t.name === 'Frontier');"
        " return t.x.map((x, i) => [x, t.y[i]]) })()"
    )
    corners = [
        [point["metrics"]["interactivity"][0], point["metrics"]["output_per_device"][0]]
        for point in points(data)
        if entry["points"].get(point["id"], [False])[0]
    ]
    assert all(corner in line for corner in corners)
    # A skyline: it only goes right and down.
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(line))


def test_filters_change_what_is_plotted(screen: Screen, data: Data) -> None:
    page = screen.page
    page.select_option("#filter-scenario", "8k/1k")
    page.select_option("#filter-model", "big")
    found = points(data, "big", "8k/1k")
    assert set(screen.settle().drawn()) == placed(found, "interactivity", "output_per_device")
    screen.chip("vllm").check()
    screen.chip("llama.cpp").check()
    chosen = {point["id"] for point in found if engine_of(data, point) != "skyline"}
    assert set(screen.settle().drawn()) == chosen
    assert set(screen.rows()) == chosen
    screen.chip("int8").check()
    assert page.locator("#nothing").is_visible()
    page.click("#clear")
    assert len(screen.settle().drawn()) == len(found)
    page.select_option("#filter-run", "run1")
    assert set(screen.settle().drawn()) == {point["id"] for point in points(data, "big", "8k/1k", "run1")}
    page.select_option("#filter-run", "all")
    assert set(screen.settle().drawn()) == placed(points(data, "big", "8k/1k", None), "interactivity")
    assert screen.complaints == []


def test_hardware_filter(screen: Screen) -> None:
    hardware = {"skyline": "CPU A", "vllm": "GPU B", "llama.cpp": "GPU B"}
    data = page_data(*synthetic.results(dates=1, hardware=hardware), {})
    screen.show(data)
    screen.chip("GPU B").check()
    drawn = screen.settle().drawn()
    assert {engine_of(data, point) for point in data["points"] if point["id"] in drawn} == {"vllm", "llama.cpp"}


def test_axes_and_marks_can_be_switched(screen: Screen, data: Data) -> None:
    page = screen.page
    layout = "document.querySelector('.plot').layout"
    page.select_option("#axis-x", "ttft_p50")
    screen.chip("Log x").check()
    screen.settle()
    assert page.evaluate(f"[{layout}.xaxis.type, {layout}.yaxis.type]") == ["log", "linear"]
    first = points(data)[0]
    xs = page.evaluate("document.querySelector('.plot').data.flatMap(t => t.customdata ? [...t.x] : [])")
    assert first["metrics"]["ttft_p50"][0] in xs
    names = "document.querySelector('.plot').data.map(t => t.name)"
    assert "95 % band of the frontier" in page.evaluate(names)
    screen.chip("Band").uncheck()
    screen.chip("Error bars").uncheck()
    screen.settle()
    assert "95 % band of the frontier" not in page.evaluate(names)
    assert not page.evaluate("document.querySelector('.plot').data.some(t => t.error_y)")


def test_series_differ_in_shape_and_dash_not_in_colour_alone(screen: Screen) -> None:
    looks = screen.page.evaluate(
        "document.querySelector('.plot').data.filter(t => t.mode.startsWith('lines+markers'))"
        ".map(t => [t.line.color, t.marker.symbol[0], t.name])"
    )
    assert len(looks) == len({symbol for _, symbol, _ in looks}) == len({colour for colour, _, _ in looks}) == 3


def test_a_link_restores_the_whole_view(screen: Screen, data: Data) -> None:
    picked = next(p["id"] for p in points(data, "big", "1k/8k") if engine_of(data, p) == "skyline")
    page = screen.page
    page.click("#tab-cost")
    page.select_option("#filter-model", "big")
    page.select_option("#filter-scenario", "1k/8k")
    screen.chip("skyline").check()
    screen.chip("Labels").check()
    page.fill("#price-0", "2.5")
    page.click("#sort-interactivity")
    page.click(f"#row-{picked}")
    page.locator(".plot").scroll_into_view_if_needed()
    box = screen.settle().page.locator(".plot .draglayer .nsewdrag").bounding_box()
    assert box
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 200, steps=4)
    page.mouse.up()
    screen.wait("location.hash.includes('zoom')")
    screen.settle()
    facts = (
        "JSON.stringify([location.hash, document.querySelector('.plot').layout.xaxis.range.map(v => v.toPrecision(5)),"
        " document.querySelector('.plot').data.map(t => t.y), document.getElementById('details-body').textContent,"
        " [...document.querySelectorAll('#table tbody tr')].map(row => row.dataset.id), document.body.dataset.view,"
        " document.getElementById('price-0').value, document.getElementById('chip-engine-1').checked])"
    )
    before, address = page.evaluate(facts), page.url
    page.goto("about:blank")
    screen.open(*address.split("#"))
    assert page.evaluate(facts) == before
    assert page.locator("#price-0").input_value() == "2.5"
    page.click("text=Reset zoom")
    assert "zoom" not in page.url
    assert screen.complaints == []


def test_back_goes_to_the_view_before(screen: Screen) -> None:
    screen.page.click("#tab-power")
    screen.page.click("#tab-history")
    screen.page.go_back()
    assert screen.settle().page.locator("#tab-power").get_attribute("aria-current") == "page"


@pytest.mark.parametrize(
    "link",
    ["view=nonsense&x=<script>&model=none&sort=nothing&a=1&b=2&point=none", "zoom=@1,2&price=@&price=a@b&logx=7", "%"],
)
def test_a_broken_link_shows_the_standard_view(screen: Screen, link: str) -> None:
    screen.view(link)
    assert screen.page.inner_text(".panel h2") == "Output throughput per device against interactivity"
    assert screen.complaints == []
