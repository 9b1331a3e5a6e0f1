from __future__ import annotations

from skyline.bench.estimate import Estimate


def test_the_inverse_changes_the_ends() -> None:
    assert Estimate(value=4.0, low=2.0, high=8.0, n=9).inverted() == Estimate(value=0.25, low=0.125, high=0.5, n=9)
    assert Estimate(value=4.0).inverted() == Estimate(value=0.25)


def test_what_has_no_inverse_says_so() -> None:
    zero = Estimate(value=0.0, low=0.0, high=1.0, n=9).inverted()
    assert zero.value is None and zero.refused
    reaching = Estimate(value=4.0, low=0.0, high=8.0, n=9).inverted()
    assert (reaching.value, reaching.low, reaching.high, reaching.n) == (0.25, None, None, 9)
    assert reaching.refused, "an interval that cannot be given is not an exact value"


def test_a_refused_interval_stays_refused() -> None:
    short = Estimate(value=4.0, n=9, refused="needs 60 requests")
    assert short.inverted().refused == short.scaled(2.0).refused == "needs 60 requests"
    assert Estimate.refuse("few").inverted() == Estimate.refuse("few")
