"""What a viewer sees and does, in Chromium: views, filters, links, downloads, prices."""

from __future__ import annotations

import csv
import io
import itertools
import struct
from pathlib import Path
from typing import Any

import pytest

from skyline.bench import metrics
from skyline.bench.dashboard.data import page_data
from tests.bench.dashboard import synthetic
from tests.bench.dashboard.conftest import PRICES
from tests.bench.dashboard.screen import Screen

Data = dict[str, Any]


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
        ".map(t => [t.line.color, t.marker.symbol, t.name])"
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


def test_the_csv_is_the_data(screen: Screen, data: Data) -> None:
    screen.view("model=big&scenario=8k/1k&run=all")
    with screen.page.expect_download() as download:
        screen.page.click("#csv")
    text = Path(download.value.path()).read_bytes().decode()
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    expected = points(data, "big", "8k/1k", None)
    assert set(rows) == {point["id"] for point in expected}
    for point in expected:
        row = rows[point["id"]]
        series = data["series"][point["series"]]
        for name in ("hardware", "engine", "engine_version", "model", "precision", "parallelism", "workload"):
            assert row[name] == series[name]
        assert (row["level"], row["status"], row["run"]) == (point["level"]["label"], point["status"], point["run"])
        assert row["off_frontier"] == (point["off"] or "")
        for key, (value, low, high, *_) in point["metrics"].items():
            if value is None:
                assert row.get(key, "") == ""
            else:
                assert float(row[key]) == value
                assert [row[f"{key}_low"], row[f"{key}_high"]] == ["", ""] or (
                    (float(row[f"{key}_low"]), float(row[f"{key}_high"])) == (low, high)
                )


@pytest.mark.parametrize("view", ["", "view=history", "view=compare"])
def test_a_chart_downloads_as_png(screen: Screen, view: str) -> None:
    screen.view(view)
    with screen.page.expect_download() as download:
        screen.page.click(".png")
    image = Path(download.value.path()).read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (2400, 1350)
    assert len(image) > 50_000
    assert download.value.suggested_filename.endswith(".png")
    assert screen.complaints == []


def test_prices_make_costs_by_the_formula(screen: Screen, data: Data) -> None:
    def costs() -> dict[str, float]:
        found = screen.settle().page.evaluate(
            "document.querySelector('.plot').data.filter(t => t.customdata).map(t => [t.customdata, [...t.y]])"
        )
        return {id: value for ids, values in found for id, value in zip(ids, values, strict=True)}

    def expected(price: float) -> dict[str, float]:
        return {
            point["id"]: metrics.cost_per_mtok(point["metrics"]["output_throughput"][0], price, 1)
            for point in points(data)
            if point["status"] != "failed"
        }

    screen.view("view=cost")
    (standard,) = PRICES.values()
    assert costs() == expected(standard)
    screen.page.fill("#price-0", "3.17")
    assert costs() == expected(3.17)
    assert "price=" in screen.page.url
    screen.page.fill("#price-0", "")
    assert costs() == expected(standard)
    assert "price=" not in screen.page.url
    screen.page.fill("#price-0", "-1")
    assert screen.page.locator("#price-0").get_attribute("aria-invalid") == "true"
    assert costs() == expected(standard)
    assert screen.complaints == []


def test_several_devices_and_unknown_prices(screen: Screen) -> None:
    runs, results, _ = synthetic.results(dates=1)
    wide = []
    for point in results:
        engine = point.spec.engine.model_copy(update={"tensor_parallel": 4, "devices": 4})
        spec = point.spec.model_copy(update={"engine": engine})
        wide.append(point.model_copy(update={"spec": spec, "key": spec.key}))
    data = page_data(runs, wide, [], {})
    screen.show(data).view("view=cost")
    assert screen.drawn() == []
    assert screen.page.locator("#unpriced").is_visible()
    assert "no price" in str(screen.page.locator(".lost").first.get_attribute("title"))
    screen.page.fill("#price-0", "1.5")
    screen.settle()
    ys = screen.page.evaluate("document.querySelector('.plot').data.filter(t => t.customdata).flatMap(t => [...t.y])")
    assert sorted(ys) == sorted(
        metrics.cost_per_mtok(point["metrics"]["output_throughput"][0], 1.5, 4)
        for point in points(data, run="run0")
        if point["status"] != "failed"
    )


def test_history_marks_the_regression(screen: Screen, data: Data) -> None:
    change = next(c for c in data["changes"] if c["metric"] == "output_per_device" and c["regression"])
    screen.view(f"view=history&level={change['level']}")
    marks = screen.page.evaluate("document.querySelector('.plot').data.filter(t => t.name === 'Regression')")
    ((id,),) = [mark["customdata"] for mark in marks]
    marked = next(point for point in data["points"] if point["id"] == id)
    assert (marked["run"], engine_of(data, marked)) == (change["run"], "vllm")
    assert "▼" in marks[0]["text"][0]
    row = screen.page.locator("#extra tbody tr.worse").first.inner_text()
    assert "regression" in row and "vllm" in row and change["level"] in row
    lines = screen.page.evaluate("document.querySelector('.plot').data.filter(t => t.mode === 'lines+markers')")
    assert len(lines) == 3 and all(len(line["x"]) == len(data["runs"]) for line in lines)


def test_comparison_at_equal_interactivity(screen: Screen, data: Data) -> None:
    page = screen.page
    screen.view("view=compare&scenario=1k/8k")
    page.select_option("#compare-a", label="vllm 0.11.0 · bf16")
    page.select_option("#compare-b", label="skyline 0.1.0 · int8")
    first = page.inner_text("#ratio .stat-value")
    page.click("#compare-swap")
    swapped = page.inner_text("#ratio .stat-value")
    ratios = [float(text.split("×")[0]) for text in (first, swapped)]
    assert ratios[0] < 1 < ratios[1]
    assert ratios[0] * ratios[1] == pytest.approx(1, abs=0.02)
    assert page.locator("#extra tbody tr").count() == 4
    ys = {
        engine_of(data, point): point["metrics"]["output_per_device"][0]
        for point in points(data, "demo", "1k/8k")
        if point["level"]["order"] == 4
    }
    cell = page.locator("#extra tbody tr").nth(2).locator("td").nth(2).inner_text()
    assert f"+{(ys['skyline'] / ys['vllm'] - 1) * 100:.0f} %" in cell and "▲" in cell
    assert screen.complaints == []


def test_details_hold_configuration_and_commands(screen: Screen, data: Data) -> None:
    point = next(p for p in points(data) if engine_of(data, p) == "vllm" and p["status"] == "ok")
    screen.view(f"point={point['id']}")
    text = screen.page.inner_text("#details")
    for part in ("vllm 0.11.0", "concurrency 1", "EPYC 9454, 2 cores", "1024 tokens in, 1024 out", point["command"]):
        assert part in text
    assert point["engine_command"] in text
    assert "97.0 % ± 2.2 %" in text and "no prompt token came from a cache" in text
    screen.page.click("text=Exact specification")
    assert '"VLLM_CPU_KVCACHE_SPACE": "4"' in screen.page.inner_text("#details")
    screen.page.get_by_role("button", name="Copy Command that repeats this point").click()
    screen.page.wait_for_selector("#toast:has-text('Copied')")
    assert screen.page.evaluate("navigator.clipboard.readText()") == point["command"]
    screen.page.get_by_role("button", name="Copy link").click()
    screen.wait("navigator.clipboard.readText().then(text => text === location.href)")


def test_hover_tells_and_a_click_opens(screen: Screen, data: Data) -> None:
    page = screen.page
    spot = page.evaluate(
        "(() => { const plot = document.querySelector('.plot'); const {xaxis, yaxis} = plot._fullLayout;"
        " const t = plot.data.find(t => t.customdata); const box = plot.getBoundingClientRect();"
        " return [box.left + xaxis._offset + xaxis.d2p(t.x[1]), box.top + yaxis._offset + yaxis.d2p(t.y[1]),"
        " t.customdata[1]] })()"
    )
    page.mouse.move(spot[0], spot[1])
    page.wait_for_selector("#tip:not([hidden])")
    tip = page.inner_text("#tip")
    assert "skyline 0.1.0" in tip and "probability" in tip and " to " in tip
    page.mouse.click(spot[0], spot[1])
    screen.wait(f"location.hash.includes('point={spot[2]}')")
    assert "concurrency 2" in page.inner_text("#details")


def test_columns_sort_both_ways_and_back(screen: Screen, data: Data) -> None:
    screen.view("view=table")
    order = screen.rows()
    values = {p["id"]: p["metrics"].get("output_per_device", [None])[0] for p in points(data)}
    screen.page.click("#sort-output_per_device")
    known = [values[id] for id in screen.rows() if values[id] is not None]
    assert known == sorted(known, reverse=True)
    assert values[screen.rows()[-1]] is None
    heading = screen.page.locator("th", has=screen.page.locator("#sort-output_per_device"))
    assert heading.get_attribute("aria-sort") == "descending"
    screen.page.click("#sort-output_per_device")
    known = [values[id] for id in screen.rows() if values[id] is not None]
    assert known == sorted(known)
    assert values[screen.rows()[-1]] is None
    screen.page.click("#sort-output_per_device")
    assert screen.rows() == order
