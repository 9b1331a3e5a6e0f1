"""When requests of an open load should start: seconds since the load began, in order. Pure and seeded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skyline.bench.loads import Level
from skyline.bench.suite import SuiteError

Times = npt.NDArray[np.float64]

MAX_ARRIVALS = 5_000_000


def schedule(level: Level, horizon_s: float, seed: int) -> Times:
    """Intended starts in [0, horizon_s) of a constant, poisson, gamma or ramp load. Raises SuiteError if those are
    too many."""
    assert level.rate is not None, level.kind
    peak = max(level.rate, level.end_rate or 0.0)
    if peak * horizon_s > MAX_ARRIVALS:
        raise SuiteError(
            f"{level.label} for up to {horizon_s:g} s are more than {MAX_ARRIVALS:,} requests: lower max_s or the rate"
        )
    rng = np.random.default_rng((seed, 0xA771))
    if level.kind == "constant":
        return np.arange(0.0, horizon_s, 1.0 / level.rate)
    if level.kind == "ramp":
        assert level.end_rate is not None
        return _ramp(rng, level.rate, level.end_rate, horizon_s)
    cv = 1.0 if level.cv is None else level.cv
    shape = 1.0 / cv**2  # of the gamma distribution; 1 is the exponential one
    times = np.empty(0)
    while not times.size or times[-1] < horizon_s:
        count = int(level.rate * horizon_s * 1.1) + 64
        gaps = rng.gamma(shape, 1.0 / (level.rate * shape), count)
        start = times[-1] if times.size else 0.0
        times = np.concatenate([times, start + np.cumsum(gaps)])
    return times[times < horizon_s]


def _ramp(rng: np.random.Generator, begin: float, end: float, horizon_s: float) -> Times:
    """A Poisson process of linearly changing rate, by thinning one of the highest rate (Lewis and Shedler, 1979)."""
    peak = max(begin, end)
    candidates = np.sort(rng.uniform(0.0, horizon_s, rng.poisson(peak * horizon_s)))
    rate = begin + (end - begin) * candidates / horizon_s
    return candidates[rng.uniform(0.0, peak, candidates.size) < rate]


@dataclass(frozen=True)
class TraceRequests:
    """`times` in seconds since the first request; `input` and `output` in tokens."""

    times: Times
    input: list[int]
    output: list[int]


def read_trace(path: str, speed: float) -> TraceRequests:
    """A trace in Mooncake's format at `speed` times its pace. Raises SuiteError naming the line that is wrong."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read the trace {path}: {error}") from None
    rows: list[tuple[float, int, int]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            time, tokens_in, tokens_out = float(row["timestamp"]), row["input_length"], row["output_length"]
            if not (np.isfinite(time) and isinstance(tokens_in, int) and isinstance(tokens_out, int)):
                raise ValueError("a timestamp that is no number or lengths that are no integers")
            if tokens_in < 1 or tokens_out < 1:
                raise ValueError("lengths must be at least 1")
        except (ValueError, KeyError, TypeError) as error:
            raise SuiteError(
                f'{path}, line {number} is not {{"timestamp": ms, "input_length": n, "output_length": n}}: {error}'
            ) from None
        rows.append((time / 1000.0, tokens_in, tokens_out))
    if not rows:
        raise SuiteError(f"the trace {path} holds no request")
    rows.sort(key=lambda row: row[0])
    first = rows[0][0]
    times = np.array([(row[0] - first) / speed for row in rows])
    return TraceRequests(times, [row[1] for row in rows], [row[2] for row in rows])


def lengths(target: int, ratio: float, count: int, seed: int, stream: int) -> list[int]:
    """`count` lengths uniform in [ratio·target, target]; `stream` tells inputs from outputs. At least 1."""
    low = max(1, round(ratio * target))
    rng = np.random.default_rng((seed, 0x1E46, stream))
    drawn: list[int] = rng.integers(low, target + 1, count).tolist()
    return drawn
