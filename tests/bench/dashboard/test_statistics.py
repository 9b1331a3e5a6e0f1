"""The page's own statistics against those of skyline.bench.stats and against known truth."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from skyline.bench.dashboard import bundle
from skyline.bench.estimate import Estimate
from skyline.bench.stats import frontier as pareto


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A blank page with the functions of statistics.js."""
    folder: Path = tmp_path_factory.mktemp("modules")
    shutil.copy(bundle.ASSETS / "statistics.js", folder)
    names = "frontier, pareto, ladderRatio, quotient, quantile, normals"
    (folder / "main.js").write_text(
        f'import {{ {names} }} from "./statistics.js";\nwindow.statistics = {{ {names} }};\n'
    )
    page = browser.new_page()
    page.add_script_tag(content=bundle.script(folder))
    yield page
    page.close()


def candidates(seed: int, count: int) -> list[pareto.Candidate]:
    rng = random.Random(seed)
    found = []
    for index in range(count):
        x, y = rng.uniform(10, 60), rng.uniform(50, 400)
        found.append(
            pareto.Candidate(
                f"p{index}",
                Estimate(value=x, low=x * 0.95, high=x * 1.05, n=64),
                Estimate(value=y, low=y * 0.92, high=y * 1.08, n=64) if index % 4 else Estimate(value=y, n=64),
            )
        )
    return found


def as_json(found: list[pareto.Candidate]) -> list[dict[str, Any]]:
    return [{"x": one.x.model_dump(), "y": one.y.model_dump()} for one in found]


def refuse_some(found: list[pareto.Candidate]) -> list[pareto.Candidate]:
    """The same, with an interval of every fifth refused."""
    refused = {"low": None, "high": None, "refused": "too short"}
    return [
        pareto.Candidate(one.name, one.x.model_copy(update=refused) if index % 5 == 2 else one.x, one.y)
        for index, one in enumerate(found)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_that_of_the_python_module(page: Page, seed: int) -> None:
    """Draws differ, so probabilities agree within Monte Carlo's error: 5 standard errors of 2,000 draws are 0.06."""
    found = refuse_some(candidates(seed, 12))
    xs = [15.0, 25.0, 35.0, 45.0]
    ours = page.evaluate("([c, xs]) => statistics.frontier(c, xs)", [as_json(found), xs])
    theirs = pareto.frontier(found, draws=4000)
    assert ours["on"] == [placed.on_frontier for placed in theirs]
    unknown = [placed.probability is None for placed in theirs]
    assert any(unknown) and [probability is None for probability in ours["probability"]] == unknown
    assert [probability or 0 for probability in ours["probability"]] == pytest.approx(
        [placed.probability or 0 for placed in theirs], abs=0.06
    )
    for mine, other in zip(ours["band"], pareto.band(found, xs), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine == pytest.approx(list(other), rel=0.03)


def test_pareto_against_the_definition(page: Page) -> None:
    rng = random.Random(1)
    for _ in range(50):
        xs = [rng.randint(0, 6) for _ in range(10)]
        ys = [rng.randint(0, 6) for _ in range(10)]
        best = [
            i
            for i in range(10)
            if not any(xs[j] >= xs[i] and ys[j] >= ys[i] and (xs[j], ys[j]) != (xs[i], ys[i]) for j in range(10))
        ]
        assert sorted(page.evaluate("([x, y]) => statistics.pareto(x, y)", [xs, ys])) == best


def ladder(scale: float, spread: float) -> list[dict[str, Any]]:
    return [
        {
            "x": {"value": x, "low": x * (1 - spread), "high": x * (1 + spread)},
            "y": {"value": y * scale, "low": y * scale * (1 - spread), "high": y * scale * (1 + spread)},
        }
        for x, y in ((50, 50), (40, 80), (30, 120), (20, 150))
    ]


def test_a_ratio_of_ladders_that_is_known(page: Page) -> None:
    ratio = page.evaluate("([a, b]) => statistics.ladderRatio(a, b)", [ladder(2, 0.02), ladder(1, 0.02)])
    value, low, high = ratio["mean"]
    assert value == pytest.approx(2)
    assert 1.9 < low < 2 < high < 2.1
    assert (ratio["grid"][0], ratio["grid"][-1]) == (20, 50)
    middle = ratio["ratios"][20]
    assert middle[0] == pytest.approx(2)
    assert middle[1] < 2 < middle[2] and middle[2] - middle[1] > high - low  # one place is less sure than the mean
    exact = page.evaluate("([a, b]) => statistics.ladderRatio(a, b)", [ladder(3, 0), ladder(1, 0)])
    assert exact["mean"] == pytest.approx([3, 3, 3])


def test_ladders_without_a_common_range(page: Page) -> None:
    far = [{**point, "x": {"value": 500 + point["x"]["value"], "low": None, "high": None}} for point in ladder(1, 0)]
    assert page.evaluate("([a, b]) => statistics.ladderRatio(a, b)", [far, ladder(1, 0)]) is None


def test_intervals_of_ratios_cover_the_truth(page: Page) -> None:
    """Level by level: of 2,000 simulated pairs, the 95 % interval of the quotient holds the true one in 93 to 97 %."""
    rng = random.Random(7)
    pairs = []
    for _ in range(2000):
        pair = []
        for truth, error in ((120, 4), (90, 2)):
            value = rng.gauss(truth, error)
            pair.append({"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error})
        pairs.append(pair)
    found = page.evaluate("pairs => pairs.map(([a, b]) => statistics.quotient(a, b))", pairs)
    covered = sum(one["low"] <= 120 / 90 <= one["high"] for one in found) / len(found)
    assert 0.93 <= covered <= 0.97
    assert page.evaluate(
        "statistics.quotient({value: 3, low: null, high: null}, {value: 2, low: null, high: null})"
    ) == {
        "value": 1.5,
        "low": None,
        "high": None,
    }


def test_nothing_is_sure_where_an_interval_was_refused(page: Page) -> None:
    short = {"value": 300, "low": None, "high": None, "refused": "too short"}
    assert page.evaluate("b => statistics.quotient(b, {value: 100, low: 99, high: 101})", short) == {
        "value": 3,
        "low": None,
        "high": None,
        "refused": "too short",
    }
    first, *rest = ladder(2, 0.02)
    ratio = page.evaluate(
        "([a, b]) => statistics.ladderRatio(a, b)", [[{**first, "y": {**short, "value": 100}}, *rest], ladder(1, 0.02)]
    )
    assert ratio["mean"] == [pytest.approx(2), None, None]
    assert all(row[1:] == [None, None] for row in ratio["ratios"])
    only = page.evaluate("b => statistics.frontier([{x: b, y: b}], [100])", short)
    assert only == {"on": [True], "probability": [None], "band": [None]}


def test_draws_are_normal_and_repeat(page: Page) -> None:
    first, second = (
        page.evaluate("(() => { const draw = statistics.normals(4); return Array.from({length: 20000}, draw) })()")
        for _ in range(2)
    )
    assert first == second
    mean = sum(first) / len(first)
    assert mean == pytest.approx(0, abs=0.03)
    assert sum((x - mean) ** 2 for x in first) / len(first) == pytest.approx(1, abs=0.04)
    assert sum(abs(x) < 1.959964 for x in first) / len(first) == pytest.approx(0.95, abs=0.008)
