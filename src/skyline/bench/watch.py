"""Recurring runs: when the next is due, the loop, the same for cron and CI, and what changed over dates."""

from __future__ import annotations

import math
import re
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from skyline.bench.estimate import Estimate
from skyline.bench.metrics import metric_of
from skyline.bench.results import AccuracyResult, PointResult, Run
from skyline.bench.results import now as utc_now
from skyline.bench.standing import configuration, eligible
from skyline.bench.wording import number_of

if TYPE_CHECKING:
    from skyline.bench.stats.changepoint import Change

UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
LONGEST = timedelta(days=366)
# The clock is read again at least so often while waiting: it may be set, and stands still for a machine that sleeps.
LOOK_S = 60.0
# https://docs.github.com/en/actions/reference/workflows-and-actions/events-that-trigger-workflows#schedule
GITHUB_SHORTEST = timedelta(minutes=5)


class WatchError(ValueError):
    """The runs cannot recur so; the message says what would be possible."""


def parse_interval(text: str) -> timedelta:
    """ "90s", "30m", "6h", "1d", or several from large to small as in "1h30m". Raises WatchError."""
    match = re.fullmatch(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text.strip(), re.ASCII)
    if match is None or not any(match.groups()):
        raise WatchError(f"{text!r} is not an interval: write a number and a unit, as in 90s, 30m, 6h or 1d")
    interval = sum(
        (int(number) * unit for number, unit in zip(match.groups(), UNITS.values(), strict=True) if number), timedelta()
    )
    if not timedelta() < interval <= LONGEST:
        raise WatchError(f"the interval {text!r} must be longer than nothing and at most {LONGEST.days}d")
    return interval


def format_interval(interval: timedelta) -> str:
    """The shortest text that `parse_interval` reads as this whole number of seconds."""
    parts = []
    for name, unit in UNITS.items():
        count, interval = divmod(interval, unit)
        if count:
            parts.append(f"{count}{name}")
    return "".join(parts)


@dataclass
class Schedule:
    """Due times, all a whole number of intervals apart: how late a run begins or how long it takes moves none of them.

    `due` is the next one. It only grows, so no due time comes twice.
    """

    interval: timedelta
    due: datetime

    @classmethod
    def after(cls, newest: datetime | None, interval: timedelta, now: datetime) -> Schedule:
        """Goes on where the newest run began, so that a restart changes nothing; without one the first is due now."""
        return cls(interval, now if newest is None else min(newest, now) + interval)

    def catch_up(self, now: datetime) -> int:
        """Before a run: moves to the latest due time that has come. Returns how many before it nobody was there for."""
        missed = max(0, (now - self.due) // self.interval)
        self.due += missed * self.interval
        return missed

    def advance(self, now: datetime) -> int:
        """After a run: moves to the first later due time that has not passed. Returns how many passed meanwhile."""
        steps = max(1, -((self.due - now) // self.interval))
        self.due += steps * self.interval
        return steps - 1


def watch(
    run_once: Callable[[], Run],
    newest: Callable[[], datetime | None],
    interval: timedelta,
    *,
    stop: threading.Event,
    note: Callable[[str], None],
    count: int | None = None,
    now: Callable[[], datetime] = utc_now,
) -> int:
    """Runs whenever a run is due, until `stop` is set or `count` runs were begun. Returns how many were begun.

    `newest` says when the newest run of the suite began, in whichever process: a due time that another watcher took is
    left to it. A run that raises is noted, and the next still comes. Setting `stop` ends the wait at once; a run under
    way ends first. Raises only what the first `newest` raises.
    """
    schedule = Schedule.after(newest(), interval, now())
    begun = 0
    if schedule.due > now():
        note(f"the next run is due at {_said(schedule.due)}")
    while _wait(schedule.due, stop, now):
        if missed := schedule.catch_up(now()):
            note(f"{number_of(missed, 'run')} missed before {_said(schedule.due)}")
        try:
            last = newest()
            if last is not None and last >= schedule.due:
                note(f"the run due at {_said(schedule.due)} was begun elsewhere at {_said(last)}")
            else:
                begun += 1
                run = run_once()
                note(f"run {run.id[:12]} {run.status}")
        except Exception as error:  # whatever it was, the next run may fare better
            note(f"the run due at {_said(schedule.due)} failed: {type(error).__name__}: {error}")
        if begun == count:
            break
        if skipped := schedule.advance(now()):
            note(f"{number_of(skipped, 'run')} skipped: that one took longer than {format_interval(interval)}")
        note(f"the next run is due at {_said(schedule.due)}")
    return begun


def _wait(due: datetime, stop: threading.Event, now: Callable[[], datetime]) -> bool:
    """Whether the time came before the stop."""
    while not stop.is_set():
        left = (due - now()).total_seconds()
        if left <= 0:
            return True
        stop.wait(min(left, LOOK_S))
    return False


def _said(time: datetime) -> str:
    return time.astimezone().isoformat(sep=" ", timespec="seconds")


def crontab_line(command: str, every: timedelta) -> str:
    """A line for `crontab -e` (crontab(5)). Raises WatchError for an interval or a command that cron cannot express."""
    if "\n" in command or "\r" in command:
        raise WatchError("a command for cron must be one line")
    # An unescaped % ends the command and begins its input.
    return f"{_cron_fields(every)} {command.replace('%', chr(92) + '%')}"


def _cron_fields(every: timedelta) -> str:
    """Cron knows only times of day, so an interval must divide an hour, a day or a week evenly."""
    minutes, rest = divmod(every, timedelta(minutes=1))
    if not rest:
        if minutes and 60 % minutes == 0:
            return {1: "* * * * *", 60: "0 * * * *"}.get(minutes, f"*/{minutes} * * * *")
        hours, rest_minutes = divmod(minutes, 60)
        if not rest_minutes and hours and 24 % hours == 0:
            return "0 0 * * *" if hours == 24 else f"0 */{hours} * * *"
        if every == timedelta(days=7):
            return "0 0 * * 0"
    raise WatchError(
        f"cron cannot run something every {format_interval(every)}: it can every 1, 2, 3, 4, 5, 6, 10, 12, 15, 20 or "
        "30m, every 1, 2, 3, 4, 6, 8 or 12h, every 1d or 7d; `skyline bench watch` takes any interval"
    )


def workflow_yaml(suite: str, every: timedelta, engines: Sequence[str] = (), python: str = "3.11") -> str:
    """A GitHub Actions workflow that runs the suite, fails on a regression and keeps the dashboard as an artifact.

    `suite`: a name or a file of the repository; `engines`: only these of it. Raises WatchError for what a schedule
    there cannot express.
    """
    if every < GITHUB_SHORTEST:
        raise WatchError(f"GitHub runs schedules every {format_interval(GITHUB_SHORTEST)} at the most often")
    words = ["skyline", "bench", "run", suite, *(word for engine in engines for word in ("--engine", engine))]
    if any("${{" in word or not word.isprintable() for word in words) or not re.fullmatch(r"\d+\.\d+", python):
        raise WatchError(f"a workflow cannot be made of suite {suite!r}, engines {list(engines)} and Python {python!r}")
    command = shlex.join(words).replace("'", "''")
    return WORKFLOW.format(cron=_cron_fields(every), python=python, command=command)


# Restored and saved in two steps, as `actions/cache` alone would not save what was measured when a later step fails.
# A cache cannot be overwritten: each run saves its own, and the newest is restored by the beginning of its name.
WORKFLOW = """\
name: skyline bench

"on":
  schedule:
    # UTC. GitHub may start it late, or leave one out when it is busy.
    - cron: "{cron}"
  workflow_dispatch:

permissions:
  contents: read

# One after another: two at once would share the store, and on one machine also the cores.
concurrency:
  group: skyline-bench
  cancel-in-progress: false

jobs:
  bench:
    # Hosted machines differ from run to run. A self-hosted runner gives numbers that can be compared over months.
    runs-on: ubuntu-latest
    timeout-minutes: 360
    env:
      SKYLINE_BENCH_STORE: store/bench.sqlite3
    steps:
      - uses: actions/checkout@v5
      - uses: actions/setup-python@v6
        with:
          python-version: "{python}"
      - name: Install Skyline
        run: pip install skyline-llm
      # GitHub deletes a cache that was not read for 7 days; the artifact below holds the store for longer.
      - name: Restore the results so far
        uses: actions/cache/restore@v4
        with:
          path: store
          key: skyline-bench-${{{{ github.run_id }}}}-${{{{ github.run_attempt }}}}
          restore-keys: skyline-bench-
      - name: Measure
        run: '{command}'
      - name: Keep the results
        if: always()
        uses: actions/cache/save@v4
        with:
          path: store
          key: skyline-bench-${{{{ github.run_id }}}}-${{{{ github.run_attempt }}}}
      - name: Draw the dashboard
        if: always()
        run: skyline bench export site/
      - name: Keep the dashboard and the store
        if: always()
        uses: actions/upload-artifact@v5
        with:
          name: skyline-bench
          path: |
            site/
            store/
          retention-days: 90
      # Also where some points failed: that ends the measuring with exit code 3.
      - name: Look for regressions
        if: always()
        run: skyline bench history --fail-on-regression
"""


@dataclass(frozen=True)
class Series:
    """One configuration on one machine over its runs: by date, one estimate a run. `changes` index into both lists."""

    label: str
    dates: list[datetime]
    estimates: list[Estimate]
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class Regression:
    """A loss that was not made good: from `before` to `now`, the levels around it, since the run of date `since`.

    `relative` = now / before − 1, infinite where it was nothing before."""

    label: str
    since: datetime
    before: float
    now: float
    relative: float


def history(
    points: Sequence[PointResult], accuracy: Sequence[AccuracyResult], metric: str = "output_per_device"
) -> list[Series]:
    """A series for each `configuration`.

    Versions of an engine are in one series: that is what is followed. Points that must not stand on a frontier or lack
    the metric are left out, and runs of which a replicate's value was refused. Raises KeyError for an unknown metric.
    """
    from skyline.bench.stats.changepoint import changes
    from skyline.bench.stats.replicates import combine

    better = metric_of(metric).better
    followed: dict[object, dict[str, list[PointResult]]] = {}
    for point in points:
        if metric in point.metrics and eligible(point, accuracy) is None:
            followed.setdefault(configuration(point), {}).setdefault(point.run, []).append(point)
    found = []
    for runs in followed.values():
        dated = sorted((min(p.started for p in replicates), run) for run, replicates in runs.items())
        estimates = [combine([p.metrics[metric] for p in runs[run]]) for _, run in dated]
        kept = [(date, e, e.value) for (date, _), e in zip(dated, estimates, strict=True) if e.value is not None]
        if not kept:
            continue
        found.append(
            Series(
                label=_label(next(iter(runs.values()))[0]),
                dates=[date for date, _, _ in kept],
                estimates=[estimate for _, estimate, _ in kept],
                changes=changes([value for _, _, value in kept], better=better),
            )
        )
    return sorted(found, key=lambda series: series.label)


def _label(point: PointResult) -> str:
    spec = point.spec
    names = [point.provenance.hardware.name, spec.engine.name, spec.model.name, spec.engine.precision]
    if spec.engine.devices > 1:
        names.append(f"{spec.engine.devices} devices")
    if spec.engine.speculation != "none":
        names.append(spec.engine.speculation)
    return " · ".join([*names, spec.workload.name, spec.level.label])


def regressions(series: Sequence[Series]) -> list[Regression]:
    """The open ones. One stays open until a later change wins back at least half of what was lost since it began."""
    found = []
    for entry in series:
        first: Change | None = None
        level = math.nan
        for change in entry.changes:
            if change.regression:
                first = first or change
                level = change.after
            elif first is not None:
                if (change.after - level) / (first.before - level) >= 0.5:
                    first = None
                level = change.after
        if first is not None:
            relative = level / first.before - 1 if first.before else math.inf
            found.append(Regression(entry.label, entry.dates[first.index], first.before, level, relative))
    return found
