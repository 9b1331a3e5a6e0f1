"""What importers find in a file, before it becomes records."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import Field

from skyline.bench.estimate import Estimate
from skyline.bench.loads import Level, Name, Tokens
from skyline.bench.metrics import QUANTILES, tokens_per_mw
from skyline.bench.results import Energy, RequestTable, Window
from skyline.bench.stats.means import mean
from skyline.bench.stats.quantiles import quantile

UNKNOWN = "unknown"

Array = npt.NDArray[np.float64]


class Facts(pydantic.BaseModel):
    """What the caller knows better than the file, or the file does not say."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    label: str | None = None
    engine: Name | None = None
    engine_version: str | None = None
    model: Name | None = None
    hardware: Name | None = None
    devices: Annotated[int, Field(ge=1, le=100_000)] | None = None
    precision: str | None = None
    speculation: str | None = None
    # Lengths that were asked for; files mostly hold what was measured.
    input: Tokens | None = None
    output: Tokens | None = None
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    # When it was measured, for files that do not say.
    date: datetime.datetime | None = None


@dataclass
class Draft:
    """One measured point in the words of this project: seconds, tokens, and metrics as skyline.bench.metrics has them.

    `input` and `output` are mean tokens of a request; `sent` how many requests there were, None if the file does not
    say. `wrong` says why the tool's own verdict is against the point.
    """

    model: str
    level: Level
    input: int
    output: int
    chat: bool
    finished: datetime.datetime
    started: datetime.datetime
    engine: str = UNKNOWN
    engine_version: str | None = None
    hardware: str = UNKNOWN
    accelerators: list[str] = field(default_factory=list)
    devices: int | None = None
    tensor_parallel: int = 1
    expert_parallel: int = 1
    precision: str = UNKNOWN
    speculation: str = "none"
    sent: int | None = None
    metrics: dict[str, Estimate] = field(default_factory=dict)
    window: Window | None = None
    table: RequestTable | None = None
    # Seconds from one event to the next, of all requests, where the file has them.
    gaps: list[float] = field(default_factory=list)
    energy: Energy | None = None
    wrong: str | None = None
    nothing: str | None = None

    def put(self, key: str, value: float | None, n: int = 0) -> None:
        """A metric as the tool gives it: nothing is known of its spread."""
        if value is not None and math.isfinite(value):
            self.metrics[key] = Estimate(value=value, n=n, refused="its file holds no interval")

    def put_distribution(self, name: str, values: Mapping[str, float | None], scale: float = 1.0, n: int = 0) -> None:
        """`values` are keyed "mean", "p50", ...; what is None is left out. Times `scale` they are in seconds."""
        for statistic, value in values.items():
            self.put(f"{name}_{statistic}", None if value is None else value * scale, n)

    def value(self, key: str) -> float | None:
        estimate = self.metrics.get(key)
        return None if estimate is None else estimate.value

    def complete(self, devices: int) -> None:
        """Adds what follows: statistics of the requests that the tool does not give, 1/TPOT, rates per device."""
        samples = {} if self.table is None else latencies(self.table, self.window)
        samples["itl"] = np.array(self.gaps, dtype=np.float64)
        for name, values in samples.items():
            if values.size:
                self.metrics.setdefault(f"{name}_mean", mean(values))
                for label, q in QUANTILES.items():
                    self.metrics.setdefault(f"{name}_{label}", quantile(values, q))
        tpot = self.metrics.get("tpot_p50")
        if tpot is not None and tpot.value != 0:
            self.metrics["interactivity"] = tpot if tpot.value is None else tpot.inverted()
        for name in ("output", "input", "total"):
            throughput = self.metrics.get(f"{name}_throughput")
            if throughput is not None:
                self.metrics[f"{name}_per_device"] = throughput.scaled(1.0 / devices)
        output, power = self.value("output_throughput"), self.value("power")
        if output is not None and power is not None and power > 0:
            self.put("tokens_per_mw", tokens_per_mw(output, power))


def whole_run(seconds: float) -> Window:
    """The window of a tool that measures everything from its first request on."""
    reason = "the tool measures from its first request to the end of its last"
    return Window(begin_s=0.0, end_s=seconds, truncated_s=0.0, little=None, steady=False, reason=reason)


class Row(NamedTuple):
    """A request. Times are seconds on any clock that all rows share; `error` is None if it ended well."""

    start: float
    first: float | None
    last: float | None
    end: float | None
    input: int
    output: int
    error: str | None = None
    intended: float | None = None


def table_of(rows: list[Row], origin: float) -> RequestTable | None:
    """The rows in order of sending, their times counted from `origin`; None if there are none."""
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: row.start)

    def times(name: str) -> list[float | None]:
        return [None if (time := getattr(row, name)) is None else round(time - origin, 6) for row in rows]

    return RequestTable(
        intended=times("intended"),
        start=times("start"),
        first=times("first"),
        last=times("last"),
        end=times("end"),
        input=[row.input for row in rows],
        output=[row.output for row in rows],
        error=[row.error for row in rows],
    )


def latencies(table: RequestTable, window: Window | None) -> dict[str, Array]:
    """Of the requests that ended well, and that were under way within the window if there is one."""

    def column(values: list[float | None]) -> Array:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    intended, start, first, last, end = map(column, (table.intended, table.start, table.first, table.last, table.end))
    output = np.array(table.output, dtype=np.float64)
    well = np.array([error is None for error in table.error], dtype=bool)
    if window is not None:
        well &= (end >= window.begin_s) & (start <= window.end_s)
    found = {
        "ttft": first - start,
        "ttft_intended": first - intended,
        "tpot": (last - first) / np.where(output > 1, output - 1, np.nan),
        "e2e": last - start,
        "e2e_intended": last - intended,
    }
    return {name: values[well & np.isfinite(values)] for name, values in found.items()}


def model_name(text: str) -> str:
    """A model's name without the folders of the machine where it lay: hub ids stay, paths lose all but their end."""
    cached = re.search(r"models--([^/]+?)--([^/]+)", text)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    is_hub_id = len(parts) == 2 and not text.startswith(("/", "."))
    return text if is_hub_id or not parts else parts[-1]


def last_line(error: str) -> str:
    """Of a traceback, what was raised."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "failed"
