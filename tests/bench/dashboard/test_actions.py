"""What a viewer does in Chromium beyond looking: downloads, prices, history, comparison, details, sorting."""

from __future__ import annotations

import copy
import csv
import io
import struct
from pathlib import Path

import pytest

from skyline.bench import metrics
from skyline.bench.dashboard.data import page_data
from tests.bench.dashboard import synthetic
from tests.bench.dashboard.conftest import PRICES
from tests.bench.dashboard.screen import Data, Screen, engine_of, points


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


def test_the_csv_says_what_was_refused(screen: Screen, data: Data) -> None:
    spoilt = copy.deepcopy(data)
    short = next(p for p in spoilt["points"] if synthetic.TOO_SHORT in p["metrics"].get("interactivity", []))
    short["metrics"]["ttft_p99"] = [None, None, None, 64, "p99 needs 662 requests, there are 64"]
    screen.show(spoilt)
    screen.view("model=demo&scenario=1k/1k")
    with screen.page.expect_download() as download:
        screen.page.click("#csv")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_bytes().decode(), newline="")))
    row = next(row for row in rows if row["id"] == short["id"])
    assert (row["interactivity_low"], row["interactivity_refused"]) == ("", synthetic.TOO_SHORT)
    assert float(row["interactivity"]) == short["metrics"]["interactivity"][0]
    assert (row["ttft_p99"], row["ttft_p99_refused"]) == ("", "p99 needs 662 requests, there are 64")
    assert row["output_per_device_refused"] == ""
    failed = next(row for row in rows if row["status"] == "failed")
    assert {failed["interactivity"], failed["interactivity_refused"]} == {""}


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


def test_an_imported_point_has_no_command(screen: Screen) -> None:
    runs, results, _ = synthetic.results(dates=1)
    origin = results[0].provenance.model_copy(
        update={"imported_from": "guidellm, results.json", "engine_command": None}
    )
    imported = page_data(runs, [results[0].model_copy(update={"provenance": origin})], [], {})
    screen.show(imported).view(f"point={results[0].id}")
    assert "imported from guidellm, results.json and cannot be repeated" in screen.page.inner_text("#details")
    assert "skyline bench rerun" not in screen.page.inner_text("#details")
    assert screen.complaints == []


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
    point = next(p for p in data["points"] if p["id"] == spot[2])
    assert "Configuration EPYC 9454, 2 cores · int8 · --quantization int8" in tip
    assert point["command"] in tip and point["engine_command"] in tip
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
