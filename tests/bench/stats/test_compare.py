from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from skyline.bench.stats.compare import (
    CompareError,
    Comparison,
    Pair,
    compare,
    holm,
    noise_floor,
    required_pairs,
)

Noise = Callable[[np.random.Generator, int], np.ndarray]
NOISES: dict[str, Noise] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n) / 3**0.5,
    "skewed": lambda rng, n: rng.gamma(2, size=n) / 2**0.5,
    "now and then": lambda rng, n: 3.0 * (rng.random(n) < 0.15) + 0.3 * rng.standard_normal(n),
}


def measured(
    rng: np.random.Generator, pairs: int, sd: float, effect: float = 0.0, rows: int = 9, noise: str = "normal"
) -> list[Pair]:
    """A ladder of 3 levels x 3 metrics, measured in turns on a machine that drifts by 2 % from pair to pair. `sd` is
    the log ratio's; half of the variance is common to all rows of a run. The first row of B is worse by `effect`."""
    drift = np.cumsum(rng.normal(0, 0.02, pairs))
    common = [NOISES[noise](rng, pairs) for _ in range(2)]
    found = []
    for row in range(rows):
        own = [(common[side] + NOISES[noise](rng, pairs)) * sd / 2 for side in range(2)]
        better = "lower" if row % 3 == 2 else "higher"
        a, b = (100 * np.exp(drift + own[side]) for side in range(2))
        if row == 0:
            b = b / (1 + effect)
        found.append(Pair(f"level {row // 3} · metric {row % 3}", a.tolist(), b.tolist(), better))  # type: ignore[arg-type]
    return found


def judged(b: list[float], better: str = "higher", margin: float = 0.02) -> Comparison:
    return compare([Pair("x", [100.0] * len(b), b, better)], margin)  # type: ignore[arg-type]


def test_holm_against_the_published_steps() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, 0.01, 0.01]) == pytest.approx([0.03, 0.03, 0.03])


def test_a_row_is_a_paired_t_test_on_logarithms() -> None:
    a, b = [100.0, 110.0, 90.0, 105.0, 98.0], [97.0, 108.0, 85.0, 103.0, 95.0]
    (row,) = compare([Pair("x", a, b)]).rows
    theirs = stats.ttest_rel(np.log(b), np.log(a))
    interval = theirs.confidence_interval(0.95)
    assert row.p == row.p_adjusted == pytest.approx(theirs.pvalue)
    assert row.ratio.value == pytest.approx(math.exp(np.mean(np.log(b) - np.log(a))))
    assert (row.ratio.low, row.ratio.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert row.ratio.n == 5
    inside = [
        stats.ttest_1samp(np.log(b) - np.log(a), side * math.log(1.02), alternative=way).pvalue
        for side, way in ((-1, "greater"), (1, "less"))
    ]
    assert row.p_same == pytest.approx(max(inside))


def test_verdicts() -> None:
    assert judged([94.0, 95.0, 96.0, 95.0, 94.5]).verdict == "worse"
    assert judged([94.0, 95.0, 96.0, 95.0, 94.5], "lower").verdict == "better"
    assert judged([100.1, 99.9, 100.0, 100.2, 99.8]).verdict == "same"
    assert judged([90.0, 115.0, 98.0, 104.0, 93.0]).verdict == "undecided"
    assert judged([99.0, 99.1, 98.9, 99.05, 98.95]).verdict == "same"  # certain, and too small to matter
    assert judged([98.0, 98.01, 97.99, 98.0, 98.0], margin=0.019).verdict == "worse"
    assert judged([100.0] * 4).verdict == "same"
    assert judged([90.0] * 4).verdict == "worse"


def test_the_whole_frontier_is_as_its_worst_row() -> None:
    even, ahead, behind, noisy = (
        Pair("even", [100.0] * 4, [100.1, 99.9, 100.0, 100.05]),
        Pair("ahead", [100.0] * 4, [110.1, 109.9, 110.0, 110.05]),
        Pair("behind", [100.0] * 4, [90.1, 89.9, 90.0, 90.05]),
        Pair("noisy", [100.0] * 4, [80.0, 130.0, 95.0, 105.0]),
    )
    for pairs, verdict, code in (
        ([even, even], "same", 0),
        ([even, ahead, noisy], "better", 0),
        ([even, ahead, behind], "worse", 1),
        ([even, noisy], "undecided", 3),
    ):
        found = compare(pairs)
        assert (found.verdict, found.exit_code) == (verdict, code)
        assert (found.advice is None) == (verdict != "undecided")
    assert [row["name"] for row in dataclasses.asdict(found)["rows"]] == ["even", "noisy"]


def test_margins_by_name() -> None:
    pairs = [Pair(name, [100.0] * 4, [96.1, 95.9, 96.0, 96.05]) for name in ("quiet", "noisy")]
    found = compare(pairs, {"quiet": 0.01, "noisy": 0.1})
    assert [row.verdict for row in found.rows] == ["worse", "same"]
    assert [row.margin for row in found.rows] == [0.01, 0.1]
    with pytest.raises(CompareError, match="no margin for noisy"):
        compare(pairs, {"quiet": 0.01})
    with pytest.raises(CompareError, match="no floor for quiet"):
        compare(pairs, 0.01, {"noisy": 0.1})


def test_noise_hides_differences_and_makes_nothing_the_same() -> None:
    """As measured on a busy machine: three and a half times the TTFT, at a floor of 20 times."""
    slow = Pair("ttft", [29.0, 21.0, 27.0, 41.0], [80.0, 95.0, 95.0, 114.0], "lower")
    assert compare([slow]).verdict == "worse"
    found = compare([slow], 0.05, {"ttft": 19.0})
    assert (found.verdict, found.exit_code, found.rows[0].floor) == ("undecided", 3, 19.0)
    assert found.advice is not None and "less than one side differs from itself here (1900%)" in found.advice
    even = Pair("even", [100.0] * 4, [100.1, 99.9, 100.0, 100.05])
    assert compare([even], 0.02, 19.0).verdict == "same", "within the margin it is, whatever the floor"


def test_advice_says_how_many_pairs_it_takes() -> None:
    found = judged([98.0, 103.0, 97.0, 104.0])
    assert found.advice is not None and found.advice.startswith(
        "x differs by 3.6% from pair to pair: to find 5% with 80%"
    )
    needed = int(found.advice.split(" takes ")[1].split()[0])
    assert needed == required_pairs(float(np.std(np.log([0.98, 1.03, 0.97, 1.04]), ddof=1)), margin=0.02)
    assert judged([98.0]).advice == "one pair tells nothing of the noise: measure at least 4"
    assert judged([98.0]).verdict == "undecided"
    assert "cannot be told" in str(judged([1.0, 1e4, 1e-4, 1e9]).advice)
    # A floor of 8 % hides 5 %: the advice is for twice the floor.
    assert "to find 16%" in str(judged([80.0, 125.0, 84.0, 119.0], margin=0.08).advice)


def test_wrong_input() -> None:
    with pytest.raises(CompareError, match="nothing to compare"):
        compare([])
    for a, b in (([1.0, 2.0], [1.0]), ([], []), ([1.0], [0.0]), ([1.0], [math.nan]), ([-1.0], [1.0])):
        with pytest.raises(CompareError, match="x: "):
            compare([Pair("x", a, b)])
    for arguments in ({"sd": -1}, {"sd": 0.1, "effect": 0.0}, {"sd": 0.1, "power": 1.0}, {"sd": 0.1, "comparisons": 0}):
        with pytest.raises(CompareError, match="are needed"):
            required_pairs(**arguments)  # type: ignore[arg-type]
    with pytest.raises(CompareError, match="cannot be told"):
        required_pairs(50.0)


@pytest.mark.parametrize("sd", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("comparisons", [1, 9])
def test_required_pairs_against_the_noncentral_t_distribution(sd: float, comparisons: int) -> None:
    def power(n: int) -> float:
        critical = stats.t.ppf(1 - 0.05 / comparisons / 2, n - 1)
        return float(stats.nct.sf(critical, n - 1, math.log(1.05) / (sd / math.sqrt(n))))

    n = required_pairs(sd, comparisons=comparisons)
    assert power(n) >= 0.8 - 1e-3 and (n == 2 or power(n - 1) < 0.8 + 1e-3)


def test_required_pairs_grow_with_noise_and_margin() -> None:
    assert required_pairs(0.0) == 2
    sizes = [required_pairs(sd) for sd in (0.01, 0.02, 0.04, 0.08)]
    assert sizes == sorted(sizes) and sizes[-1] > 20
    assert required_pairs(0.04, margin=0.04) > required_pairs(0.04, margin=0.02)


def test_the_noise_floor() -> None:
    """With many pairs it is the standard error of their mean; with few it is above that for being uncertain."""
    rng = np.random.default_rng(0)
    many = [floor(measured(rng, 200, 0.03, rows=1)) for _ in range(50)]
    assert np.mean(many) == pytest.approx(0.03 / math.sqrt(200), rel=0.15)
    few = [floor(measured(rng, 4, 0.03, rows=1)) for _ in range(300)]
    assert np.mean([each > 0.03 / math.sqrt(4) for each in few]) == pytest.approx(0.95, abs=0.04)
    held = []
    for _ in range(300):  # at worst a level tells the same as another once more
        logs = rng.normal(0, 0.03, 4)
        pairs = [Pair("x", [1.0] * n, np.exp(rng.permutation(logs)[:n]).tolist()) for n in (4, 2)]
        held.append(floor(pairs) > 0.03 / math.sqrt(3))
    assert np.mean(held) >= 0.93
    assert noise_floor([Pair("x", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]) == 0.0
    assert noise_floor([]) is None, "unknown is not nothing"
    assert noise_floor([Pair("x", [1.0, 1.0], [1.1, 0.9])]) is None
    # A level of which little was left does not make the bound: the others know.
    shape = [Pair("x", [1.0] * 5, [1.1, 0.9, 1.05, 0.95, 1.1]), Pair("y", [1.0], [1.1])]
    assert floor(shape[:1]) < floor(shape) < 2 * floor(shape[:1])
    biased = floor([Pair("x", [100.0] * 10, [103.0 + 0.01 * i for i in range(10)])])
    assert biased > 0.01  # A is not the same as itself, however repeatable that is
    with pytest.raises(CompareError):
        noise_floor([Pair("x", [1.0], [0.0])])


def floor(pairs: list[Pair]) -> float:
    found = noise_floor(pairs)
    assert found is not None
    return found


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("pairs", [4, 8])
def test_false_alarms_at_a_a(noise: str, pairs: int) -> None:
    """The bar: at A/A the overall verdict is "worse" in at most 5 % of comparisons. 300 here; see the slow one."""
    rng = np.random.default_rng(pairs)
    worse = [compare(measured(rng, pairs, 0.03, noise=noise)).verdict == "worse" for _ in range(300)]
    assert np.mean(worse) <= 0.06


@pytest.mark.parametrize(("sd", "rows", "margin"), [(0.02, 1, 0.0), (0.03, 9, 0.02), (0.04, 9, 0.03)])
def test_a_regression_of_five_percent_at_the_predicted_size(sd: float, rows: int, margin: float) -> None:
    """The bar: found with 80 % power. 300 comparisons here, of which the standard error is 2.3 %."""
    rng = np.random.default_rng(rows)
    pairs = required_pairs(sd, comparisons=rows, margin=margin)
    found = [compare(measured(rng, pairs, sd, 0.05, rows), margin).rows[0].verdict == "worse" for _ in range(300)]
    assert np.mean(found) >= 0.75


@pytest.mark.slow
def test_the_bars_over_thousands_of_comparisons() -> None:
    rng = np.random.default_rng(7)
    for noise in NOISES:
        alarms = []
        for _ in range(3000):
            alarms.append(compare(measured(rng, 5, 0.03, noise=noise), margin=0.0).verdict in ("worse", "better"))
        print(f"A/A, {noise}: {np.mean(alarms):.3f}")
        assert np.mean(alarms) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 3000)
    for sd in (0.01, 0.02, 0.04):
        for margin in (0.0, 0.02, 0.03):
            pairs = required_pairs(sd, comparisons=9, margin=margin)
            found = [compare(measured(rng, pairs, sd, 0.05), margin).rows[0].verdict == "worse" for _ in range(2000)]
            print(f"5 % with sd {sd:.0%}, margin {margin:.0%}, {pairs} pairs: power {np.mean(found):.3f}")
            assert np.mean(found) >= 0.8 - 2 * math.sqrt(0.8 * 0.2 / 2000)
