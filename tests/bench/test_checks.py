from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from skyline.bench.analysis import analyse
from skyline.bench.checks import cache_verdict, client_health, objections, token_check
from skyline.bench.load.observed import Observed
from skyline.bench.loads import Level
from skyline.bench.suite import Sessions
from tests.bench.observed import load_plan, observed

CLOSED = Level(kind="closed", concurrency=2)
STARTS = sorted([*np.arange(0.0, 11.0, 1.0), *np.arange(0.5, 11.0, 1.0)])


def regular(**fields: object) -> Observed:
    return observed(STARTS, ttft=0.1, gap=0.1, **fields)  # type: ignore[arg-type]


def health(seen: Observed, null: float | None = 1000.0):  # type: ignore[no-untyped-def]
    return client_health(seen, analyse(seen, seen.usage, CLOSED, 1, None), null, 0.001)


def test_a_client_with_time_to_spare() -> None:
    found = health(regular())
    assert not found.limited and found.headroom is not None and 45 < found.headroom < 55
    assert abs(found.cpu_share - 0.1) < 0.01 and found.loop_lag_p99_s < 0.001
    assert found.schedule_delay_p99_s == 0.0
    assert not health(regular(), null=None).limited


def test_each_limit_of_the_client_is_found() -> None:
    assert "only 1.19 times" in health(regular(), null=24.0).reason
    busy = regular()
    busy.cpu = [[(t, 0.95 * t) for t in np.arange(0, 11, 0.25)]]
    assert "busy 95%" in health(busy).reason
    lagging = dataclasses.replace(regular(), lags=np.full(100, 0.05))
    assert "50.0 ms late on average" in health(lagging).reason
    late = regular(late=0.03)
    assert "30.0 ms late" in health(late).reason
    for seen in (busy, lagging, late):
        assert health(seen).limited


def test_prefix_caches() -> None:
    plan, seen = load_plan(), regular()
    verdict = cache_verdict(plan, seen, 15, (0, 0), (1000, 150))
    assert verdict.status == "valid" and "counters" in verdict.reason
    assert cache_verdict(plan, seen, 15, (500, 0), (1500, 400)).status == "invalid"
    reported = dataclasses.replace(seen, cached=np.full(len(STARTS), 64.0))
    verdict = cache_verdict(plan, reported, 15, None, None)
    assert verdict.status == "invalid" and "64.0%" in verdict.reason
    silent = cache_verdict(plan, seen, 15, None, None)
    assert silent.status == "valid" and "different words" in silent.reason
    assert cache_verdict(plan, dataclasses.replace(seen, repeated_prompts=3), 15, None, None).status == "invalid"
    sessions = load_plan(sessions=Sessions(turns=2).model_dump())
    assert cache_verdict(sessions, reported, 15, None, None).status == "valid"


def test_tokens_are_counted_twice() -> None:
    seen = regular()
    analysis = analyse(seen, seen.usage, CLOSED, 1, None)
    check = token_check(seen, analysis, {i: 9 for i in range(4, 8)})
    assert (check.usage, check.text, check.bundled, check.wrong_length, check.input_error) == (40, 36, False, 0, 0.0)
    bundled = observed(STARTS, ttft=0.1, gap=0.2, tokens_per_event=2)
    check = token_check(bundled, analyse(bundled, bundled.usage, CLOSED, 1, None), {})
    assert check.bundled and check.tokens_per_event == 2.0
    assert (check.usage, check.text, check.without_text) == (bundled.usage[bundled.end > 1].sum(), None, None)


def test_without_usage_texts_are_counted() -> None:
    seen = regular(usage=False)
    counted = dict.fromkeys(range(len(STARTS)), 10)
    check = token_check(seen, analyse(seen, np.where(seen.end > 0, 10.0, np.nan), CLOSED, 1, None), counted)
    assert check.usage is None and check.text == 10 * int((seen.end > 1).sum())
    assert not check.bundled and check.mismatch is None and check.input_error is None


def test_tokens_without_text_are_neither_bundled_nor_a_mismatch() -> None:
    """Six of ten tokens have text."""
    seen = regular(without_text=4)
    check = token_check(seen, analyse(seen, seen.usage, CLOSED, 1, None), dict.fromkeys(range(4, 16), 6))
    assert (check.usage, check.text, check.tokens_per_event) == (120, 72, 1.0)
    assert not check.bundled and check.mismatch is None and check.without_text == pytest.approx(0.4)


@pytest.mark.parametrize(("factor", "says"), [(2, "240 output tokens where 120"), (0.5, "60 output tokens where 120")])
def test_usage_that_the_text_contradicts(factor: float, says: str) -> None:
    """Tokens without text would have taken as long as those with it."""
    seen = dataclasses.replace(regular(), usage=regular().usage * factor)
    analysis = analyse(seen, seen.usage, CLOSED, 1, None)
    check = token_check(seen, analysis, dict.fromkeys(range(4, 16), 10))
    assert check.mismatch is not None and says in check.mismatch
    plan = load_plan()
    assert check.mismatch in objections(plan, seen, analysis, cache_verdict(plan, seen, 15, None, None), check)


def test_inputs_are_compared_where_they_are_known() -> None:
    """The later turns of sessions repeat the ones before."""
    seen = regular()
    later = np.arange(len(STARTS)) % 3 > 0
    seen = dataclasses.replace(
        seen, input=np.where(later, 500, 102), planned_input=np.where(later, np.nan, seen.planned_input)
    )
    assert token_check(seen, analyse(seen, seen.usage, CLOSED, 1, None), {}).input_error == 2.0


def test_objections() -> None:
    plan, seen = load_plan(), regular()
    analysis = analyse(seen, seen.usage, CLOSED, 1, None)
    cache = cache_verdict(plan, seen, 15, None, None)
    tokens = token_check(seen, analysis, {})
    assert objections(plan, seen, analysis, cache, tokens) == []
    short = dataclasses.replace(seen, target=np.full(len(STARTS), 20))
    assert "50% as long" in objections(plan, short, analysis, cache, tokens)[0]
    hit = cache_verdict(plan, seen, 15, (0, 0), (100, 90))
    assert "prefix cache was hit" in objections(plan, seen, analysis, hit, tokens)[0]
    failing = regular(error=dict.fromkeys(range(4, 22, 4), "HTTP 500: oops"))
    found = objections(plan, failing, analyse(failing, failing.usage, CLOSED, 1, None), cache, tokens)
    assert any("HTTP 500: oops" in text for text in found)
