"""Recurring runs: the schedule on an injected clock, real signals, cron's own meaning, and changes over dates."""

from __future__ import annotations

import datetime
import itertools
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from skyline.bench.estimate import Estimate
from skyline.bench.results import PointResult, Run
from skyline.bench.suite import single
from skyline.bench.watch import (
    LONGEST,
    Schedule,
    WatchError,
    crontab_line,
    format_interval,
    history,
    parse_interval,
    regressions,
    watch,
    workflow_yaml,
)
from tests.bench.points import gate, limited_client, point

BEGIN = datetime.datetime(2026, 11, 1, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
MINUTE = datetime.timedelta(minutes=1)
SECOND = datetime.timedelta(seconds=1)


# Intervals


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("6h", 21600), ("1d", 86400), ("1h30m", 5400), (" 1d2h3m4s ", 93784), ("90m", 5400)],
)
def test_intervals_are_read(text: str, seconds: int) -> None:
    assert parse_interval(text) == datetime.timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "6", "h", "6 hours", "-1h", "1.5h", "30m1h", "6h6h", "٦h", "0s", "0d0h", "367d"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(WatchError, match="interval"):
        parse_interval(text)


@given(st.integers(1, int(LONGEST.total_seconds())))
def test_an_interval_is_written_as_it_is_read(seconds: int) -> None:
    interval = datetime.timedelta(seconds=seconds)
    assert parse_interval(format_interval(interval)) == interval


# The schedule


@given(
    interval=st.timedeltas(SECOND, LONGEST),
    late_and_long=st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), max_size=30),
)
def test_due_times_never_drift_and_never_come_twice(
    interval: datetime.timedelta, late_and_long: list[tuple[float, float]]
) -> None:
    schedule = Schedule.after(BEGIN, interval, BEGIN)
    counted = 0
    for late, long in late_and_long:
        now = schedule.due + late * interval
        missed = schedule.catch_up(now)
        taken = schedule.due
        assert now - interval < taken <= now
        now += long * interval
        skipped = schedule.advance(now)
        assert schedule.due > taken and schedule.due >= now
        assert schedule.due - interval < now or schedule.due == taken + interval
        # Every due time is taken, missed or skipped, and once.
        counted += missed + 1 + skipped
        assert schedule.due == BEGIN + (counted + 1) * interval


def test_a_restart_goes_on_where_the_newest_run_began() -> None:
    assert Schedule.after(None, HOUR, BEGIN).due == BEGIN
    assert Schedule.after(BEGIN - HOUR / 4, HOUR, BEGIN).due == BEGIN + HOUR * 3 / 4
    late = Schedule.after(BEGIN - 3.5 * HOUR, HOUR, BEGIN)
    assert late.catch_up(BEGIN) == 2 and late.due == BEGIN - HOUR / 2


def test_a_run_from_the_future_does_not_hold_up_the_schedule() -> None:
    assert Schedule.after(BEGIN + 1000 * HOUR, HOUR, BEGIN).due == BEGIN + HOUR


# The loop


class World(threading.Event):
    """A clock that waiting moves on, and the stop event that is waited for. `newest` is what a store would say."""

    def __init__(self, until: datetime.datetime | None = None) -> None:
        super().__init__()
        self.time, self.until = BEGIN, until
        self.begun: list[datetime.datetime] = []
        self.notes: list[str] = []
        self.stored: datetime.datetime | None = None

    def now(self) -> datetime.datetime:
        return self.time

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None and timeout > 0
        self.time += datetime.timedelta(seconds=timeout)
        if self.until is not None and self.time >= self.until:
            self.set()
        return self.is_set()

    def run(self, takes: datetime.timedelta, outcome: Run) -> Run:
        self.begun.append(self.time)
        self.stored = self.time
        self.time += takes
        return outcome

    def watch(self, run_once: Callable[[], Run], interval: datetime.timedelta, count: int | None = None) -> int:
        return watch(
            run_once, lambda: self.stored, interval, stop=self, note=self.notes.append, count=count, now=self.now
        )


@pytest.fixture(scope="module")
def finished() -> Run:
    measured = point()
    suite = single(measured.spec)
    return Run(suite=suite, suite_hash=suite.hash, status="finished", provenance=measured.provenance)


def test_runs_come_at_their_times(finished: Run) -> None:
    world = World()
    assert world.watch(lambda: world.run(10 * SECOND, finished), HOUR, count=3) == 3
    assert world.begun == [BEGIN, BEGIN + HOUR, BEGIN + 2 * HOUR]
    assert not any("skipped" in note or "missed" in note for note in world.notes)


def test_a_wait_for_the_first_run_is_said(finished: Run) -> None:
    """A watch that goes on where the last one ended may have hours to wait."""
    world = World()
    world.stored = BEGIN - 0.25 * HOUR
    world.watch(lambda: world.run(SECOND, finished), HOUR, count=1)
    assert world.notes[0].startswith("the next run is due at ") and world.begun == [BEGIN + 0.75 * HOUR]


def test_a_long_run_skips_what_it_overran_and_says_so(finished: Run) -> None:
    world = World()
    lengths = iter([2.5 * HOUR, HOUR, SECOND])
    world.watch(lambda: world.run(next(lengths), finished), HOUR, count=3)
    # The second ends just when the next is due.
    assert world.begun == [BEGIN, BEGIN + 3 * HOUR, BEGIN + 4 * HOUR]
    assert [note for note in world.notes if "skipped" in note] == ["2 runs skipped: that one took longer than 1h"]


def test_a_failing_run_is_noted_and_the_next_still_comes(finished: Run) -> None:
    world = World()
    outcomes: list[Run | Exception] = [finished, OSError("disk full"), finished]

    def run_once() -> Run:
        outcome = outcomes[len(world.begun)]
        world.run(SECOND, finished)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert world.watch(run_once, HOUR, count=3) == 3
    assert world.begun == [BEGIN, BEGIN + HOUR, BEGIN + 2 * HOUR]
    assert sum("failed: OSError: disk full" in note for note in world.notes) == 1


def test_a_store_that_fails_for_a_while_costs_only_its_runs(finished: Run) -> None:
    world = World()
    asked = 0

    def newest() -> datetime.datetime | None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise ConnectionError("the database is away")
        return world.stored

    watch(
        lambda: world.run(SECOND, finished), newest, HOUR, stop=world, note=world.notes.append, count=2, now=world.now
    )
    assert world.begun == [BEGIN, BEGIN + 2 * HOUR]
    assert any("the database is away" in note for note in world.notes)


def test_a_run_begun_elsewhere_is_not_repeated(finished: Run) -> None:
    world = World(until=BEGIN + 2.5 * HOUR)
    world.stored = BEGIN

    def run_once() -> Run:
        world.run(SECOND, finished)
        # Another watcher of the same store is first at the next time.
        world.stored = BEGIN + 2 * HOUR + SECOND
        return finished

    assert world.watch(run_once, HOUR) == 1
    assert world.begun == [BEGIN + HOUR]
    assert any("begun elsewhere" in note for note in world.notes)


def test_downtime_is_said_and_one_run_makes_up_for_it(finished: Run) -> None:
    world = World()
    world.stored = BEGIN - 3.5 * HOUR
    world.watch(lambda: world.run(SECOND, finished), HOUR, count=2)
    assert world.begun == [BEGIN, BEGIN + HOUR / 2]
    assert world.notes[0].startswith("2 runs missed")


def test_the_first_look_at_the_store_may_fail(finished: Run) -> None:
    def newest() -> datetime.datetime | None:
        raise ConnectionError("no such store")

    with pytest.raises(ConnectionError):
        watch(lambda: finished, newest, HOUR, stop=threading.Event(), note=print)


@given(
    lengths=st.lists(st.floats(0, 3.5), min_size=1, max_size=8),
    gap=st.one_of(st.none(), st.floats(0, 5)),
    seconds=st.integers(1, 300),
)
def test_the_loop_keeps_to_the_schedule(finished: Run, lengths: list[float], gap: float | None, seconds: int) -> None:
    interval = seconds * SECOND
    world = World()
    anchor = BEGIN if gap is None else BEGIN - gap * interval
    world.stored = None if gap is None else anchor
    ends: list[datetime.datetime] = []

    def run_once() -> Run:
        world.run(lengths[len(world.begun)] * interval, finished)
        ends.append(world.time)
        return finished

    world.watch(run_once, interval, count=len(lengths))
    numbers = [(begun - anchor) // interval for begun in world.begun]
    assert len(set(numbers)) == len(numbers) == len(lengths)
    # After the first, which may make up for downtime, each begins at the first due time that did not pass meanwhile.
    for last, number, begun, ended in zip(numbers, numbers[1:], world.begun[1:], ends, strict=False):
        assert number == max(last + 1, -((anchor - ended) // interval))
        assert begun == anchor + number * interval


def test_a_stop_during_a_run_ends_after_it(finished: Run) -> None:
    world = World()

    def run_once() -> Run:
        world.set()
        return world.run(SECOND, finished)

    assert world.watch(run_once, HOUR) == 1 and world.begun == [BEGIN]


WATCHER = """
import datetime, signal, sys, threading
from skyline.bench.results import now
from skyline.bench.watch import parse_interval, watch
stop = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stop.set())
begun = now()
print("waiting", flush=True)
watch(lambda: sys.exit("it ran"), lambda: begun, parse_interval("1d"), stop=stop, note=print)
print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_at_once(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WATCHER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        sent = time.monotonic()
        process.send_signal(number)
        assert process.stdout.read().splitlines()[-1] == "ended"
        assert process.wait() == 0 and time.monotonic() - sent < 5


# Cron and CI

MINUTES = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60)
EXPRESSIBLE = [*(f"{n}m" for n in MINUTES), "1h", "2h", "3h", "4h", "6h", "8h", "12h", "24h", "1d", "7d"]


def fires(field: str, value: int) -> bool:
    """The three forms of a field of crontab(5) that are used here."""
    step = re.fullmatch(r"\*(?:/(\d+))?", field)
    return value % int(step[1] or 1) == 0 if step else value == int(field)


@pytest.mark.parametrize("text", EXPRESSIBLE)
def test_cron_fires_exactly_at_the_interval(text: str) -> None:
    every = parse_interval(text)
    minute, hour, day, month, weekday, *command = crontab_line("skyline bench run quick", every).split(" ")
    assert command == ["skyline", "bench", "run", "quick"] and (day, month) == ("*", "*")
    start = datetime.datetime(2026, 11, 1)
    times = [start + datetime.timedelta(minutes=n) for n in range(3 * max(every // MINUTE, 24 * 60) + 1)]
    fired = [t for t in times if fires(minute, t.minute) and fires(hour, t.hour) and fires(weekday, t.isoweekday() % 7)]
    assert len(fired) > 2 and {b - a for a, b in itertools.pairwise(fired)} == {every}


@pytest.mark.parametrize("text", ["90s", "7m", "45m", "90m", "5h", "36h", "2d", "30d", "14d"])
def test_cron_refuses_what_it_cannot_express(text: str) -> None:
    with pytest.raises(WatchError, match=rf"every {format_interval(parse_interval(text))}: .* 30m.* 12h.* 7d"):
        crontab_line("x", parse_interval(text))


def test_cron_commands_are_escaped_or_refused() -> None:
    assert crontab_line("x", 24 * HOUR) == "0 0 * * * x"
    assert crontab_line("date +%F", HOUR) == r"0 * * * * date +\%F"
    with pytest.raises(WatchError, match="one line"):
        crontab_line("a\nb", HOUR)


@pytest.mark.parametrize("suite", ["quick", "suites/my suite.yaml", "it's.yaml", 'a"b: {c} # d.yaml', "größe.yaml"])
def test_the_workflow_is_valid_and_measures_before_it_judges(suite: str) -> None:
    every = datetime.timedelta(hours=6)
    workflow = yaml.safe_load(workflow_yaml(suite, every, ["skyline", suite]))
    assert workflow["on"]["schedule"] == [{"cron": crontab_line("x", every).removesuffix(" x")}]
    job = workflow["jobs"]["bench"]
    steps = job["steps"]
    runs = [step.get("run", step.get("uses")) for step in steps]
    assert runs[2] == "pip install skyline-llm"
    assert shlex.split(runs[4]) == ["skyline", "bench", "run", suite, "--engine", "skyline", "--engine", suite]
    assert runs[3].startswith("actions/cache/restore@") and runs[5].startswith("actions/cache/save@")
    assert runs[6:] == [
        "skyline bench export site/",
        "actions/upload-artifact@v5",
        "skyline bench history --fail-on-regression",
    ]
    assert steps[1]["with"]["python-version"] == "3.11"
    # What was measured is kept also where a later step fails, and each run keeps its own.
    restore, save = steps[3]["with"], steps[5]["with"]
    assert steps[5]["if"] == steps[8]["if"] == "always()" and restore["path"] == save["path"] == "store"
    assert restore["key"] == save["key"] and save["key"].startswith(restore["restore-keys"])
    assert "${{ github.run_id }}" in save["key"]
    assert job["env"]["SKYLINE_BENCH_STORE"].startswith("store/")
    assert steps[7]["with"]["path"].split() == ["site/", "store/"]


def test_workflows_that_github_could_not_run_are_refused() -> None:
    with pytest.raises(WatchError, match="5m"):
        workflow_yaml("quick", datetime.timedelta(minutes=4))
    with pytest.raises(WatchError, match="cron cannot"):
        workflow_yaml("quick", datetime.timedelta(minutes=90))
    for suite in ("${{ github.token }}", "a\nb"):
        with pytest.raises(WatchError, match="cannot be made"):
            workflow_yaml(suite, HOUR)
    with pytest.raises(WatchError, match="Python"):
        workflow_yaml("quick", HOUR, python="3.11\nfoo: bar")
    with pytest.raises(WatchError, match="cannot be made"):
        workflow_yaml("quick", HOUR, ["${{ secrets.KEY }}"])
    assert yaml.safe_load(workflow_yaml("quick", HOUR, python="3.10"))["jobs"]["bench"]["steps"][1]["with"] == {
        "python-version": "3.10"
    }


# History


def measured(levels: list[float], *, seed: int = 0, metric: str = "output_per_device", **changes) -> list[PointResult]:
    """A point a day at these levels, with half a percent of noise."""
    noise = np.random.default_rng(seed).normal(1, 0.005, len(levels))
    return [
        point(
            metrics={metric: (level * n, level * n * 0.99, level * n * 1.01)},
            run=f"run{day}",
            when=BEGIN + datetime.timedelta(days=day),
            **changes,
        )
        for day, (level, n) in enumerate(zip(levels, noise.tolist(), strict=True))
    ]


def test_a_drop_is_found_at_its_date() -> None:
    (series,) = history(measured([100.0] * 10 + [80.0] * 10), [])
    assert series.label == "2x test core · skyline · m · bf16 · 1k/1k · concurrency 1"
    assert len(series.dates) == len(series.estimates) == 20 and series.dates == sorted(series.dates)
    (change,) = series.changes
    assert change.regression and series.dates[change.index] == BEGIN + datetime.timedelta(days=10)
    (found,) = regressions([series])
    assert (found.label, found.since) == (series.label, BEGIN + datetime.timedelta(days=10))
    assert found.relative == pytest.approx(-0.2, abs=0.01)
    assert (found.before, found.now) == (pytest.approx(100, rel=0.01), pytest.approx(80, rel=0.01))


def test_noise_alone_is_no_regression() -> None:
    assert [regressions(history(measured([100.0] * 20, seed=seed), [])) for seed in range(20)].count([]) >= 18


def test_a_loss_made_good_is_closed_and_a_gain_is_none() -> None:
    (series,) = history(measured([100.0] * 10 + [80.0] * 10 + [99.0] * 10), [])
    assert [change.regression for change in series.changes] == [True, False] and regressions([series]) == []
    (gain,) = history(measured([80.0] * 10 + [100.0] * 10), [])
    assert [change.regression for change in gain.changes] == [False] and regressions([gain]) == []


def test_a_loss_partly_made_good_stays_open_since_it_began() -> None:
    found = regressions(history(measured([100.0] * 10 + [80.0] * 10 + [85.0] * 10), []))
    assert [f.since for f in found] == [BEGIN + datetime.timedelta(days=10)]
    assert found[0].now == pytest.approx(85, rel=0.01)


def test_for_latency_more_is_worse() -> None:
    (series,) = history(measured([0.1] * 10 + [0.15] * 10, metric="ttft_p50"), [], metric="ttft_p50")
    (found,) = regressions([series])
    assert found.relative == pytest.approx(0.5, abs=0.03)
    assert history(measured([0.1] * 10, metric="ttft_p50"), []) == []


def test_configurations_are_followed_apart_and_only_by_good_points() -> None:
    points = [
        *measured([100.0] * 3, concurrency=1),
        *measured([100.0] * 3, concurrency=2),
        *measured([100.0] * 3, engine="other"),
        *measured([100.0] * 3, hardware="another machine"),
        *measured([1.0] * 3, status="invalid"),
        *measured([1.0] * 3, client=limited_client()),
        *measured([1.0] * 3, engine="wrong"),
    ]
    series = history(points, [gate("wrong", run=f"run{day}") for day in range(3)])
    assert [len(entry.dates) for entry in series] == [3] * 4
    assert [entry.label for entry in series] == sorted(entry.label for entry in series)
    assert len({entry.label for entry in series}) == 4
    assert all(e.value is not None and e.value > 90 for entry in series for e in entry.estimates)


def test_replicates_of_a_run_are_one_value() -> None:
    points = [
        point(metrics={"output_per_device": value}, run="r", replicate=n, when=BEGIN + n * HOUR)
        for n, value in enumerate([90.0, 100.0, 110.0])
    ]
    (series,) = history(points[::-1], [])
    assert series.dates == [BEGIN]
    assert series.estimates[0].value == pytest.approx(100.0)
    low, high = series.estimates[0].low, series.estimates[0].high
    assert low is not None and high is not None and low < 100 < high


def test_a_run_with_a_refused_replicate_is_left_out() -> None:
    refused = {"output_per_device": Estimate.refuse("too few requests")}
    good = {"output_per_device": Estimate(value=100.0)}
    points = [point(run="r").model_copy(update={"metrics": metrics}) for metrics in (good, refused)]
    assert history(points, []) == []
    assert len(history([*points, *measured([100.0])], [])[0].dates) == 1


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(KeyError, match="no metric 'speed'"):
        history([], [], metric="speed")
