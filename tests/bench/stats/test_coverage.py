"""How often 95 % intervals hold the truth, on servers where it is known.

The bar is 93 to 97 % over 1,000 runs: `make test-slow ARGS="tests/bench/stats -s"` prints the tables below. The default
suite makes 200 runs of some of them, of which the standard error is 1.5 %. Coverage in %, in brackets the share of runs
in which the quantile was reported, where it is not 100.

                     n     mean   share<p90   p50    p90    p95         p99
    closed, φ 0      200   94.5   95.1        95.0   95.4   95.3        -
                     700   94.6   94.4        94.5   94.4   94.9        95.4
                    5000   95.5   94.0        93.0   94.6   94.7        95.1
    closed, φ 0.5    200   94.9   95.1        95.2   94.9   96.0 (92)   -
                     700   95.0   94.0        94.9   93.7   94.6        96.5 (72)
                    2000   95.0   95.3        94.7   95.3   95.0        95.1
    closed, φ 0.8    700   94.6   94.7        95.3   94.3   94.7 (98)   91.3 (2)
                    2000   95.0   95.9        95.2   95.5   94.8        95.2 (69)
                    5000   94.8   95.5        93.7   95.5   95.4        96.0
    M/M/1, load 0.3  300   94.9   96.4        96.6   95.2   95.0        -
                     700   94.8   95.0        95.1   95.2   95.2        94.6 (91)
                    2000   94.2   94.7        94.7   94.2   94.7        94.4
    M/M/1, load 0.5 5000   94.7   94.9        95.4   95.1   95.2        94.6
    tokens per bin: φ 0: 95.1 (20 bins), 95.4 (200); φ 0.8: 93.4 (100), 94.7 (600); φ 0.9: 94.6 (600)

Below the bar, where a run holds few of a queue's excursions or of a swing's periods (`HARD`):

    M/M/1, load 0.5  200   91.3   96.5        95.6   93.0   87.4 (64)   -
                     700   92.8   96.0        95.5   95.2   94.4        71.7 (29)
                    2000   93.8   94.8        94.9   94.1   94.2        91.4 (98)
    M/M/1, load 0.7  700   91.1   97.7        94.8   91.7   83.7 (66)   22.2 (1)
                    2000   91.6   96.0        95.1   93.2   92.9 (99)   56.0 (23)
    tokens per bin: φ 0.9: 90.2 (200 bins)

There a run whose tail happens to be thin looks better than it is in every respect, and passes. Refusing more does not
help: it leaves fewer such runs, and among them more that are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from skyline.bench.estimate import Estimate
from skyline.bench.stats.means import mean, rate, share
from skyline.bench.stats.quantiles import quantile
from tests.bench.stats import servers

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
SECONDS = 0.5


@dataclass(frozen=True)
class Server:
    """`run(rng, n)` is one run's latencies; what is true of all of them is in `mean` and `quantile(q)`."""

    name: str
    run: Callable[[np.random.Generator, int], np.ndarray]
    mean: float
    quantile: Callable[[float], float]


def closed_loop(phi: float) -> Server:
    return Server(
        f"closed loop, φ {phi}",
        partial(servers.closed_loop, phi=phi),
        servers.closed_loop_mean(),
        servers.closed_loop_quantile,
    )


def queue(load: float) -> Server:
    return Server(
        f"M/M/1, load {load}",
        partial(servers.queue, load=load),
        servers.queue_mean(load),
        partial(servers.queue_quantile, load=load),
    )


def coverage(estimates: list[Estimate], truth: float) -> tuple[float, float]:
    """Of those that were not refused; and their share."""
    given = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
    hits = [low <= truth <= high for low, high in given]
    return float(np.mean(hits)) if hits else float("nan"), len(given) / len(estimates)


def measured(server: Server, n: int, trials: int, seed: int = 0) -> Iterator[tuple[str, float, float]]:
    """Name, coverage and reported share of the mean, the quantiles and the share below the p90."""
    rng = np.random.default_rng([seed, n])
    runs = [server.run(rng, n) for _ in range(trials)]
    yield "mean", *coverage([mean(run) for run in runs], server.mean)
    limit = server.quantile(0.9)
    yield "share", *coverage([share(run <= limit) for run in runs], 0.9)
    for name, q in QUANTILES.items():
        covered, reported = coverage([quantile(run, q) for run in runs], server.quantile(q))
        if reported > 0:
            yield name, covered, reported


@pytest.mark.parametrize(
    ("server", "n"),
    [(closed_loop(0.5), 700), (closed_loop(0.8), 3000), (queue(0.3), 1500), (queue(0.5), 3000)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_coverage(server: Server, n: int) -> None:
    for name, covered, reported in measured(server, n, 200):
        assert 0.9 <= covered <= 0.995, name
        assert reported >= 0.6, name


@pytest.mark.parametrize(("phi", "bins"), [(0.0, 60), (0.8, 120), (0.9, 400)])
def test_coverage_of_rates(phi: float, bins: int) -> None:
    rng = np.random.default_rng(bins)
    covered, _ = coverage([rate(servers.tokens(rng, bins, phi), SECONDS) for _ in range(300)], 50 / SECONDS)
    assert 0.905 <= covered <= 0.985


def test_what_independence_would_say() -> None:
    """The same runs in random order, which is what a method does that ignores order: the test can fail."""
    rng = np.random.default_rng(0)
    runs = [rng.permutation(servers.closed_loop(rng, 700, 0.8)) for _ in range(200)]
    covered, _ = coverage([mean(run) for run in runs], servers.closed_loop_mean())
    assert covered < 0.65


def test_p99_of_few_correlated_requests_is_refused_rather_than_wrong() -> None:
    rng = np.random.default_rng(1)
    for run in (partial(servers.closed_loop, phi=0.9), partial(servers.queue, load=0.8)):
        refused = [quantile(run(rng, 700), 0.99).refused is not None for _ in range(100)]
        assert np.mean(refused) >= 0.97


RIGHT = [
    *((closed_loop(phi), n) for phi in (0.0, 0.5) for n in (200, 700, 2000, 5000)),
    *((closed_loop(0.8), n) for n in (700, 2000, 5000)),
    *((queue(0.3), n) for n in (300, 700, 2000, 5000)),
    (queue(0.5), 5000),
]
HARD = [(queue(0.5), 200), (queue(0.5), 700), (queue(0.5), 2000), (queue(0.7), 700), (queue(0.7), 2000)]


@pytest.mark.slow
@pytest.mark.parametrize(("server", "n"), RIGHT, ids=lambda value: getattr(value, "name", str(value)))
def test_the_bar(server: Server, n: int) -> None:
    rows = list(measured(server, n, 1000))
    print(f"\n{server.name}, {n}: " + ", ".join(f"{name} {100 * c:.1f} ({100 * r:.0f})" for name, c, r in rows))
    for name, covered, reported in rows:
        if reported >= 0.5:
            assert 0.93 <= covered <= 0.97, name


@pytest.mark.slow
@pytest.mark.parametrize(("server", "n"), HARD, ids=lambda value: getattr(value, "name", str(value)))
def test_where_the_bar_is_missed(server: Server, n: int) -> None:
    """So that it does not get worse unseen; what most runs report stays useful."""
    rows = list(measured(server, n, 1000))
    print(f"\n{server.name}, {n}: " + ", ".join(f"{name} {100 * c:.1f} ({100 * r:.0f})" for name, c, r in rows))
    for name, covered, reported in rows:
        if reported >= 0.5:
            assert covered >= 0.82, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phi", "bins", "least"),
    [(0.0, 20, 0.93), (0.0, 200, 0.93), (0.8, 100, 0.93), (0.8, 600, 0.93), (0.9, 200, 0.88), (0.9, 600, 0.93)],
)
def test_the_bar_for_rates(phi: float, bins: int, least: float) -> None:
    rng = np.random.default_rng([1, bins])
    covered, _ = coverage([rate(servers.tokens(rng, bins, phi), SECONDS) for _ in range(1000)], 50 / SECONDS)
    print(f"\ntokens, φ {phi}, {bins} bins: rate {100 * covered:.1f}")
    assert least <= covered <= 0.97
