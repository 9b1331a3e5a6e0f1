"""How often 95 % intervals hold the truth, on servers where it is known.

The bar is 93 to 97 % over 1,000 runs of those that report an interval: `make test-slow ARGS="tests/bench/stats -s"`
prints all sizes and widths in 30 minutes on one core; some of it is below. The default suite makes 150 runs of four
servers. Coverage in %, in brackets the share of runs with an interval, where it is not 100.

                          n    mean       share      p50        p90        p95        p99
    closed loop, φ 0.0       200   96.2       96.0       95.3       96.0       97.4 (99)  -
                            1000   96.2       95.8       96.1       96.1       95.9       96.5
                            5000   95.4       95.7       94.8       96.0       95.5       95.2
    closed loop, φ 0.3       200   96.2       96.8       95.9       97.7 (99)  99.1 (67)  -
                            1000   96.0       96.0       95.6       95.8       96.5       98.4 (73)
                            5000   96.0       94.4       95.7       94.8       94.6       96.3
    closed loop, φ 0.5       200   96.8       97.3       96.2       98.0 (86)  100.0 (5)  -
                            1000   96.0       96.3       95.8       97.2       97.8       -
                            5000   95.7       94.1       95.8       94.7       95.8       96.0
    closed loop, φ 0.8       200   98.6 (93)  97.2       98.1 (93)  94.4 (2)   -          -
                            1000   96.9       98.1       96.3       98.0       97.7 (72)  -
                            5000   95.7       95.8       95.5       96.2       96.5       98.3 (76)
    closed loop, φ 0.9       200   98.0 (51)  94.3       97.0 (51)  -          -          -
                            1000   98.1       97.6       97.9       98.6 (71)  -          -
                            5000   95.7       95.9       94.7       96.7       97.1       -
    closed loop, φ 0.0, σ 1  200   96.4       96.0       95.3       96.0       97.4 (99)  -
                            1000   96.0       95.8       96.1       96.1       95.9       96.5
                            5000   95.2       95.7       94.8       96.0       95.5       95.2
    closed loop, φ 0.5, σ 1  200   98.4       97.3       96.2       98.0 (86)  100.0 (5)  -
                            1000   96.5       96.3       95.8       97.2       97.8       -
                            5000   94.4       94.1       95.8       94.7       95.8       96.0
    heavy tails, load 0.3    200   94.6       97.5       96.3       96.6 (90)  92.8 (30)  -
                            1000   94.2       97.2       95.1       95.8       96.1       82.6 (9)
                            5000   95.2       95.5       96.3       95.3       94.9       96.2
    heavy tails, load 0.5    200   93.7 (96)  95.6       96.5 (96)  89.5 (36)  33.3 (1)   -
                            1000   92.8       96.1       94.2       94.9       96.1 (91)  -
                            5000   95.8       96.3       94.7       95.5       95.4       96.4 (96)
    bursts, load 0.2         200   97.5       96.1       96.8       97.1 (93)  95.0 (30)  -
                            1000   95.2       96.2       95.9       95.6       95.8       95.7 (7)
                            5000   95.3       96.0       95.8       95.7       96.6       97.1
    bursts, load 0.3         200   96.6 (99)  96.5       96.9 (99)  95.7 (51)  65.4 (3)   -
                            1000   95.8       97.6       94.7       96.2       97.7       -
                            5000   94.6       95.9       95.0       95.5       96.8       97.1
    bursts, load 0.5         200   97.9 (66)  84.1       95.9 (66)  40.0 (1)   -          -
                            1000   97.5       98.7       97.0       96.9 (78)  89.5 (12)  -
                            5000   95.9       96.6       96.5       96.6       96.2       -
    M/M/1, load 0.3          200   96.1       97.2       95.3       97.5 (96)  95.0 (46)  -
                            1000   94.4       95.6       96.3       95.2       95.9       95.7 (28)
                            5000   94.8       96.2       95.2       96.4       96.0       96.8
    M/M/1, load 0.5          200   96.4 (99)  96.9       96.0 (99)  94.8 (46)  63.2 (2)   -
                            1000   94.9       96.3       95.0       95.8       95.7 (99)  -
                            5000   95.1       95.8       95.9       95.3       96.0       96.7
    M/M/1, load 0.7          200   96.1 (71)  87.2       94.8 (71)  42.4 (6)   -          -
                            1000   95.9       98.0       95.2       95.5 (82)  90.0 (21)  -
                            5000   96.1       96.8       95.6       95.4       96.1       77.8 (1)
    M/M/1, load 0.9          200   82.3 (16)  31.3       67.1 (16)  -          -          -
                            1000   95.2 (48)  78.0       90.5 (48)  6.7 (2)    -          -
                            5000   96.3 (94)  98.5       95.1 (94)  90.8 (34)  35.3 (2)   -
    M/D/1, load 0.3          200   94.8       96.7       100.0      97.0       94.7 (78)  -
                            1000   95.3       95.8       100.0      95.0       97.1       97.0 (86)
                            5000   95.2       96.0       100.0      95.6       94.8       95.6
    M/D/1, load 0.5          200   95.5       95.9       97.8       95.7 (81)  83.4 (19)  -
                            1000   95.3       96.8       95.2       96.5       96.7       70.6 (2)
                            5000   94.6       94.8       95.1       94.4       94.7       96.0
    M/D/1, load 0.7          200   96.0 (89)  93.7       95.6 (89)  83.2 (20)  -          -
                            1000   95.2       97.6       95.9       95.9 (98)  95.9 (71)  -
                            5000   95.1       96.6       95.0       95.1       95.5       96.6 (64)
    M/D/1, load 0.9          200   92.2 (24)  47.3       82.4 (24)  -          -          -
                            1000   95.1 (71)  91.6       93.4 (71)  36.2 (6)   -          -
                            5000   95.8       98.1       94.7       95.0 (74)  86.4 (18)  -

Where at least half of the runs report, all are above 93 % but for five means: of M/D/1 at load 0.5 and 50
requests (90 %), and of heavy tails (92 to 93 %);
where samples are correlated and worth few, intervals are wider than they need be and cover up to 99 %.

Where fewer report, those that do are the lucky ones: a run of a congested queue that holds few of its excursions is,
in all that can be seen of it, a run of a faster server that was long enough. No rule can tell them apart, so what is
asked for there is that few of all runs are both reported and wrong. Shares are of hits alone, without the requests'
latencies to judge memory by, and never refused: they hold from where the p90 is reported on. Tokens in bins, φ 0.9 and
200 bins, are at 91 %: twice their swing is Poisson noise, which hides how long it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from scipy import stats

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import memory
from skyline.bench.stats.means import mean, rate, share
from skyline.bench.stats.quantiles import quantile
from tests.bench.stats import servers

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
SECONDS = 0.5
# What holds wherever at least half of the runs report, and, of all runs, how many may be wrong anywhere.
LEAST, MOST, WRONG = 0.93, 0.985, 0.07
EXCEPTIONS = {
    "closed loop, φ 0.3": [("p95", 200)],
    "closed loop, φ 0.8": [("mean", 200)],
    "closed loop, φ 0.9": [("mean", 500), ("p90", 1000)],
    "closed loop, φ 0.5, σ 1": [("mean", 50)],
    "heavy tails, load 0.3": [("mean", 100)],
    "heavy tails, load 0.5": [("mean", 50), ("mean", 100), ("mean", 1000)],
    "M/D/1, load 0.5": [("mean", 50)],
}


@dataclass(frozen=True)
class Server:
    """`run(rng, n)` is one run's latencies; what is true of all of them is in `mean` and `quantile(q)`."""

    name: str
    run: Callable[[np.random.Generator, int], np.ndarray]
    mean: float
    quantile: Callable[[float], float]


@dataclass(frozen=True)
class Row:
    """Of many runs: the share that had an interval, the share of those that held the truth, the share of all whose
    interval did not, and the mean width over that of 95 % of the runs' own values."""

    name: str
    reported: float
    covered: float
    wrong: float
    width: float

    @classmethod
    def of(cls, name: str, estimates: list[Estimate], truth: float) -> Row:
        given = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
        values = [e.value for e in estimates if e.value is not None]
        hits = sum(low <= truth <= high for low, high in given)
        spread = 2 * 1.96 * float(np.std(values)) if values else 0.0
        return cls(
            name=name,
            reported=len(given) / len(estimates),
            covered=hits / len(given) if given else float("nan"),
            wrong=(len(given) - hits) / len(estimates),
            width=float(np.mean([high - low for low, high in given])) / spread if given and spread else float("nan"),
        )

    def __str__(self) -> str:
        return f"{self.name:5} {100 * self.covered:5.1f} ({100 * self.reported:3.0f}) {self.width:4.2f}"


def closed_loop(phi: float, sigma: float = 0.5) -> Server:
    return Server(
        f"closed loop, φ {phi}" + (", σ 1" if sigma == 1 else ""),
        partial(servers.closed_loop, phi=phi, sigma=sigma),
        servers.closed_loop_mean(sigma),
        partial(servers.closed_loop_quantile, sigma=sigma),
    )


def queue(load: float) -> Server:
    return Server(
        f"M/M/1, load {load}",
        partial(servers.queue, load=load),
        servers.queue_mean(load),
        partial(servers.queue_quantile, load=load),
    )


def constant_queue(load: float) -> Server:
    return Server(
        f"M/D/1, load {load}",
        partial(servers.constant_queue, load=load),
        servers.constant_queue_mean(load),
        partial(servers.constant_queue_quantile, load=load),
    )


def heavy_queue(load: float) -> Server:
    return Server(
        f"heavy tails, load {load}",
        partial(servers.heavy_queue, load=load),
        servers.heavy_queue_mean(load),
        partial(servers.heavy_queue_quantile, load=load),
    )


def bursts(load: float) -> Server:
    server = servers.Bursts(load)
    return Server(f"bursts, load {load}", server.run, server.mean, server.quantile)


GRID = [
    *(closed_loop(phi) for phi in (0.0, 0.3, 0.5, 0.8, 0.9)),
    *(closed_loop(phi, 1.0) for phi in (0.0, 0.5)),
    *(queue(load) for load in (0.3, 0.5, 0.7, 0.9)),
    *(constant_queue(load) for load in (0.3, 0.5, 0.7, 0.9)),
    *(heavy_queue(load) for load in (0.3, 0.5)),
    *(bursts(load) for load in (0.2, 0.3, 0.5)),
]


def measured(server: Server, n: int, trials: int) -> Iterator[Row]:
    """The mean, the quantiles that n allows, and the share below the p90."""
    rng = np.random.default_rng(n)
    runs = [np.round(server.run(rng, n), 9) for _ in range(trials)]
    yield Row.of("mean", [mean(run) for run in runs], server.mean)
    limit = server.quantile(0.9)
    yield Row.of("share", [share(run <= limit) for run in runs], 0.9)
    for name, q in QUANTILES.items():
        row = Row.of(name, [quantile(run, q) for run in runs], server.quantile(q))
        if row.reported > 0:
            yield row


@pytest.mark.parametrize(
    ("server", "n"),
    [(closed_loop(0.5), 500), (queue(0.5), 200), (queue(0.7), 1000), (heavy_queue(0.5), 500)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_coverage(server: Server, n: int) -> None:
    """150 runs, of which the standard error is 1.8 %."""
    for row in measured(server, n, 150):
        assert row.wrong <= 0.1, row.name
        if row.reported >= 0.5:
            assert row.covered >= 0.9, row.name


@pytest.mark.parametrize(("phi", "bins"), [(0.0, 60), (0.8, 120), (0.9, 400)])
def test_coverage_of_rates(phi: float, bins: int) -> None:
    rng = np.random.default_rng(bins)
    row = Row.of("rate", [rate(servers.tokens(rng, bins, phi), SECONDS) for _ in range(300)], 50 / SECONDS)
    assert 0.905 <= row.covered <= 0.99 and row.reported > 0.8


def test_what_independence_would_say() -> None:
    """The same runs in random order, which is what a method does that ignores order: the test can fail."""
    rng = np.random.default_rng(0)
    runs = [rng.permutation(servers.closed_loop(rng, 700, 0.8)) for _ in range(200)]
    row = Row.of("mean", [mean(run) for run in runs], servers.closed_loop_mean())
    assert row.covered < 0.65


def test_p99_of_few_correlated_requests_is_refused_rather_than_wrong() -> None:
    rng = np.random.default_rng(1)
    for run in (partial(servers.closed_loop, phi=0.9), partial(servers.queue, load=0.7)):
        refused = [quantile(run(rng, 700), 0.99).refused is not None for _ in range(100)]
        assert np.mean(refused) >= 0.97


def test_to_refuse_more_runs_is_to_pass_the_lucky_ones() -> None:
    """Means of 50 requests of a queue with heavy tails are below the bar. Whatever rule looks at the run for it, as
    Cochran's (25 times the squared skewness) or more independent samples than 15, lets pass what looks harmless."""
    server = heavy_queue(0.5)
    rng = np.random.default_rng(0)
    runs = [np.round(server.run(rng, 50), 9) for _ in range(1500)]
    found = [(run, mean(run)) for run in runs]
    given = [(run, e.low <= server.mean <= e.high) for run, e in found if e.low is not None and e.high is not None]
    all_of_them = np.mean([hit for _, hit in given])
    worth = [memory(run).worth for run, _ in given]
    assert all_of_them >= 0.9
    assert np.mean([hit for (_, hit), size in zip(given, worth, strict=True) if size >= 25]) < all_of_them - 0.05
    cochran = [size >= 25 * stats.skew(run) ** 2 for (run, _), size in zip(given, worth, strict=True)]
    assert np.mean([hit for (_, hit), passes in zip(given, cochran, strict=True) if passes]) < all_of_them - 0.03


def test_independent_samples_cost_little() -> None:
    """Student's t of 12 degrees of freedom is 11 % wider than the normal distribution."""
    for n, most in ((100, 1.35), (1000, 1.25)):
        (row, *_) = measured(closed_loop(0.0), n, 300)
        assert 1.0 <= row.width <= most and row.reported >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("server", GRID, ids=lambda server: server.name)
def test_the_bar(server: Server) -> None:
    """1,000 runs of each size, 70 s a server on one core. The standard error is 0.7 % where all report."""
    print()
    outside = []
    for n in SIZES:
        rows = {row.name: row for row in measured(server, n, 1000)}
        print(f"{server.name:20} {n:5}  " + "  ".join(map(str, rows.values())))
        for name, row in rows.items():
            # Half of the answers of M/D/1 at these loads are exactly 1 s: any interval that holds it is right.
            if name == "share" or (name == "p50" and server.name in ("M/D/1, load 0.3", "M/D/1, load 0.5")):
                continue
            if row.wrong > WRONG or (row.reported >= 0.5 and not LEAST <= row.covered <= MOST):
                outside.append((name, n))
    assert outside == EXCEPTIONS.get(server.name, [])


@pytest.mark.slow
@pytest.mark.parametrize(("phi", "bins"), [(0.0, 20), (0.0, 200), (0.8, 100), (0.8, 600), (0.9, 200), (0.9, 600)])
def test_the_bar_for_rates(phi: float, bins: int) -> None:
    rng = np.random.default_rng([1, bins])
    row = Row.of("rate", [rate(servers.tokens(rng, bins, phi), SECONDS) for _ in range(1000)], 50 / SECONDS)
    print(f"\ntokens, φ {phi}, {bins} bins: {row}")
    assert (0.9 if (phi, bins) == (0.9, 200) else LEAST) <= row.covered <= MOST and row.reported >= 0.5
