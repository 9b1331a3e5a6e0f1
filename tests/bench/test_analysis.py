from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from skyline.bench.analysis import analyse
from skyline.bench.loads import Level
from skyline.bench.metrics import keys
from skyline.bench.suite import Slo
from tests.bench.observed import observed

CLOSED = Level(kind="closed", concurrency=2)
# Two clients without a pause: each request takes 0.1 + 9 · 0.1 = 1 s.
STARTS = sorted([*np.arange(0.0, 11.0, 1.0), *np.arange(0.5, 11.0, 1.0)])


def test_a_regular_load_has_the_numbers_it_was_made_of() -> None:
    seen = observed(STARTS, ttft=0.1, gap=0.1, late=0.02)
    found = analyse(seen, seen.usage, CLOSED, devices=2, slo=Slo(ttft_s=0.2, tpot_s=0.2))
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values["ttft_mean"] == pytest.approx(0.1)
    assert values["ttft_intended_mean"] == pytest.approx(0.12)
    assert values["tpot_p50"] == pytest.approx(0.1)
    assert values["itl_mean"] == pytest.approx(0.1)
    assert values["e2e_mean"] == pytest.approx(1.0)
    assert values["interactivity"] == pytest.approx(10.0)
    assert values["output_throughput"] == pytest.approx(20.0, rel=0.02)
    assert values["output_per_device"] == pytest.approx(10.0, rel=0.02)
    assert values["request_throughput"] == pytest.approx(2.0, rel=0.06)
    assert values["input_throughput"] == pytest.approx(200.0, rel=0.06)
    assert values["total_throughput"] == pytest.approx(220.0, rel=0.06)
    assert values["error_rate"] == 0.0
    assert values["goodput_share"] == 1.0
    assert values["goodput"] == pytest.approx(2.0, rel=0.06)
    assert found.metrics["ttft_p99"].value is None and "662" in (found.metrics["ttft_p99"].refused or "")
    assert found.metrics.keys() <= set(keys())
    assert found.window.steady and found.window.little == pytest.approx(1.0, abs=0.1)


def test_the_timeline_holds_every_token_and_who_was_under_way() -> None:
    seen = observed(STARTS, ttft=0.1, gap=0.1)
    line = analyse(seen, seen.usage, CLOSED, 1, None).timeline
    assert sum(line.tokens) == pytest.approx(len(seen.event_times))
    assert np.mean(line.running[10:100]) == pytest.approx(2.0, abs=0.01)
    assert sum(line.running) * line.bin_s == pytest.approx(
        np.nansum(np.where(np.isnan(seen.end), 11.0, seen.end) - seen.start)
    )


def test_bundled_tokens_count_in_full() -> None:
    seen = observed(STARTS, ttft=0.1, gap=0.2, tokens=10, tokens_per_event=2)
    found = analyse(seen, seen.usage, CLOSED, 1, None)
    assert sum(found.timeline.tokens) == pytest.approx(2 * len(seen.event_times))
    assert found.metrics["itl_mean"].value == pytest.approx(0.2)
    # 0.8 s between the first token and the last, for nine tokens
    assert found.metrics["tpot_mean"].value == pytest.approx(0.8 / 9)


def test_the_last_token_may_have_no_text() -> None:
    """After an end token that is ignored, the model goes on without text; it takes time all the same."""
    seen = observed(STARTS, ttft=0.1, gap=0.1, without_text=4)
    found = analyse(seen, seen.usage, CLOSED, 1, None)
    assert found.metrics["tpot_p50"].value == pytest.approx(0.1)
    assert found.metrics["interactivity"].value == pytest.approx(10.0)
    assert found.metrics["e2e_mean"].value == pytest.approx(1.0)
    assert found.metrics["output_throughput"].value == pytest.approx(20.0, rel=0.02)
    # When a server does not say that it was done, the last text is the last that is known.
    silent = dataclasses.replace(seen, finished=np.full(len(STARTS), np.nan))
    assert analyse(silent, seen.usage, CLOSED, 1, None).metrics["e2e_mean"].value == pytest.approx(0.6)


def test_answers_without_any_text_count_when_they_end() -> None:
    seen = observed(STARTS, ttft=0.1, gap=0.1, without_text=10)
    found = analyse(seen, seen.usage, CLOSED, 1, None)
    assert found.metrics["output_throughput"].value == pytest.approx(20.0, rel=0.06)
    assert "ttft_mean" not in found.metrics


def test_failures_count_as_failures_and_nothing_else() -> None:
    seen = observed(STARTS, ttft=0.1, gap=0.1, error=dict.fromkeys(range(4, 22, 4), "HTTP 500"))
    found = analyse(seen, seen.usage, CLOSED, 1, Slo(e2e_s=5.0))
    share = found.metrics["error_rate"].value
    assert share == pytest.approx(0.25, abs=0.06)
    assert found.metrics["goodput_share"].value == pytest.approx(1 - share)
    assert found.metrics["e2e_mean"].value == pytest.approx(1.0)
    assert found.table.error.count("HTTP 500") == 5
    assert found.table.error.count("under way at the end") == int(np.isnan(seen.end).sum())


def test_the_objective_is_kept_by_each_request_or_not() -> None:
    ttft = np.where(np.arange(len(STARTS)) % 2, 0.1, 0.4)
    seen = observed(STARTS, ttft=ttft, gap=0.05)
    found = analyse(seen, seen.usage, CLOSED, 1, Slo(ttft_s=0.2))
    assert found.metrics["goodput_share"].value == pytest.approx(0.5, abs=0.06)


def test_a_growing_queue_is_no_steady_state() -> None:
    starts = np.arange(0.0, 11.0, 0.05)
    seen = observed(starts.tolist(), ttft=np.minimum(0.1 + 0.7 * starts, 8.0), gap=0.02)
    found = analyse(seen, seen.usage, Level(kind="constant", rate=20.0), 1, None)
    assert not found.window.steady and "Little" in (found.window.reason or "")
    ramp = analyse(seen, seen.usage, Level(kind="ramp", rate=1.0, end_rate=2.0), 1, None)
    assert not ramp.window.steady and "not meant" in (ramp.window.reason or "")


@pytest.mark.parametrize("stall_at", np.arange(0.0, 18.0, 1.5).tolist())
def test_a_stall_of_an_open_load_is_never_cut_off(stall_at: float) -> None:
    """Two seconds of 20, at a hundred requests per second."""
    starts = np.arange(0.0, 20.0, 0.01)
    ttft = np.where((starts >= stall_at) & (starts < stall_at + 2), stall_at + 2 - starts, 0.004)
    seen = observed(starts.tolist(), ttft=ttft, gap=0.001, tokens=2, stop_s=20.0)
    found = analyse(seen, seen.usage, Level(kind="constant", rate=100.0), 1, None)
    inside = (seen.end > 1.0) & (seen.end <= 20.0)
    truth = np.quantile(ttft[inside], 0.99)
    assert truth > 1.5
    assert found.metrics["ttft_intended_p99"].value == pytest.approx(truth, rel=0.05)
    assert found.window.steady == (stall_at > 1.0), found.window.reason  # else residence times do not fit the window


def test_a_stall_that_outlasts_the_load_is_no_steady_state() -> None:
    starts = np.arange(0.0, 20.0, 0.01)
    seen = observed(starts.tolist(), ttft=np.where(starts < 19, 0.004, 21 - starts), gap=0.001, tokens=2, stop_s=20.0)
    found = analyse(seen, seen.usage, Level(kind="constant", rate=100.0), 1, None)
    assert not found.window.steady and "Little" in (found.window.reason or "")


def test_a_slow_start_is_cut_off() -> None:
    # Until 4 s everything takes three times as long.
    starts, at = [], 0.0
    while at < 21.0:
        starts.append(at)
        at += 0.9 if at < 4 else 0.3
    ttft = [0.09 if t < 4 else 0.03 for t in starts]
    fast = observed(starts, ttft=ttft, gap=0.03, stop_s=21.0)
    found = analyse(fast, fast.usage, Level(kind="closed", concurrency=1), 1, None)
    assert 2.0 < found.window.truncated_s < 6.0
    assert found.window.begin_s == pytest.approx(1.0 + found.window.truncated_s, abs=0.1)


def test_tokens_that_come_all_at_once_have_no_interactivity() -> None:
    seen = observed(STARTS, ttft=1.0, gap=0.0)
    metrics = analyse(seen, seen.usage, CLOSED, 1, None).metrics
    assert metrics["tpot_p50"].value == 0.0
    assert metrics["interactivity"].value is None and metrics["interactivity"].refused


def test_one_token_has_no_time_between_tokens() -> None:
    seen = observed(STARTS, ttft=0.3, gap=0.1, tokens=1)
    metrics = analyse(seen, seen.usage, CLOSED, 1, Slo(tpot_s=0.001)).metrics
    assert "tpot_p50" not in metrics and "interactivity" not in metrics
    assert metrics["goodput_share"].value == 1.0
