"""Whether B is worse than A over a whole frontier, from measurements made in turns.

Each pair was measured back to back, so that what drifts (temperature, neighbours, clocks) is in both and leaves their
ratio. Student's t on the logarithms of the ratios; Holm (1979, A Simple Sequentially Rejective Multiple Test Procedure,
Scandinavian J. Statistics 6) keeps the chance of any false alarm, over all levels and metrics, at alpha. A sign-flip
test would need no normality, but with the 5 or 6 pairs that one can afford it cannot fall below p = 2/64, which no
correction for several levels survives; averages over whole runs are near enough to normal, and t is slow to alarm where
tails are heavier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import Floats, critical

Outcome = Literal["better", "worse", "same", "undecided"]
EXIT_CODES: dict[Outcome, int] = {"better": 0, "same": 0, "worse": 1, "undecided": 3}
# What the advice is about: a regression of 5 %, found with 80 % probability.
EFFECT, POWER = 0.05, 0.8
MOST_PAIRS = 10_000
# A side must have met itself so often: of one pair, the bound on noise is 16 times what was seen, of three 3 times.
LEAST_SELF_PAIRS = 3


class CompareError(ValueError):
    """The measurements cannot be compared; the message says why."""


@dataclass(frozen=True)
class Pair:
    """One metric at one level of the ladder: a[i] and b[i] were measured back to back. All are positive."""

    name: str
    a: Sequence[float]
    b: Sequence[float]
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Row:
    """`ratio` is B / A (the geometric mean) with its t interval, `p` two-sided that it is 1, `p_adjusted` Holm's over
    all rows. `p_same` is that of two one-sided tests that the ratio is within the margin (Schuirmann 1987). `floor` is
    what the machine's own noise looks like."""

    name: str
    better: Literal["higher", "lower"]
    ratio: Estimate
    p: float
    p_adjusted: float
    p_same: float
    margin: float
    floor: float
    verdict: Outcome


@dataclass(frozen=True)
class Comparison:
    """`worse` where any row is; else `better` where any is; `same` where all are; else `undecided`. `advice` says what
    an undecided comparison would take."""

    rows: list[Row]
    verdict: Outcome
    advice: str | None

    @property
    def exit_code(self) -> int:
        """0 better or same, 1 worse, 3 undecided."""
        return EXIT_CODES[self.verdict]


def compare(
    pairs: Sequence[Pair],
    margin: float | Mapping[str, float] = 0.02,
    floor: float | Mapping[str, float] = 0.0,
    alpha: float = 0.05,
) -> Comparison:
    """`margin`: the relative difference that does not matter; `floor`: the one that cannot be told from noise, as
    `noise_floor` of A/A runs is. Either for all pairs or by name.

    A row is better or worse where Holm's p is below alpha and the ratio found is beyond margin and floor; the same
    where it is within the margin at level alpha; otherwise undecided. The floor makes no row the same: where little
    can be seen, nothing was shown to be equal. Raises CompareError for no pairs, a margin or floor that is not there,
    and values that are not positive.
    """
    if not pairs:
        raise CompareError("there is nothing to compare: no level was measured on both sides")
    margins, floors = _of_each(pairs, margin, "margin"), _of_each(pairs, floor, "floor")
    logs = [log_ratios(pair) for pair in pairs]
    tests = [_test(log, math.log1p(least), alpha) for log, least in zip(logs, margins, strict=True)]
    adjusted = holm([p for _, p, _ in tests])
    rows = [
        Row(
            pair.name, pair.better, ratio, p, p_holm, p_same, least, noise,
            verdict=_verdict(pair, ratio, p_holm, p_same, max(least, noise), alpha),
        )
        for pair, least, noise, (ratio, p, p_same), p_holm in zip(pairs, margins, floors, tests, adjusted, strict=True)
    ]  # fmt: skip
    verdicts = {row.verdict for row in rows}
    overall: Outcome = "undecided"
    if "worse" in verdicts:
        overall = "worse"
    elif "better" in verdicts:
        overall = "better"
    elif verdicts == {"same"}:
        overall = "same"
    return Comparison(rows, overall, _advice(rows, logs, alpha) if overall == "undecided" else None)


def _of_each(pairs: Sequence[Pair], given: float | Mapping[str, float], what: str) -> list[float]:
    if not isinstance(given, Mapping):
        return [given] * len(pairs)
    if lacking := [pair.name for pair in pairs if pair.name not in given]:
        raise CompareError(f"there is no {what} for {', '.join(lacking)}")
    return [given[pair.name] for pair in pairs]


def log_ratios(pair: Pair) -> Floats:
    """log(b / a) of each pair. Raises CompareError."""
    a, b = np.asarray(pair.a, dtype=np.float64), np.asarray(pair.b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise CompareError(f"{pair.name}: A has {a.size} values and B {b.size}; both must be measured in each pair")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and min(a.min(), b.min()) > 0):
        raise CompareError(f"{pair.name}: ratios need positive values, and there are others; leave this metric out")
    logs: Floats = np.log(b / a)
    return logs


def _test(logs: Floats, margin: float, alpha: float) -> tuple[Estimate, float, float]:
    """The ratio, p that it is 1, p that it is beyond the margin (the larger of the two one-sided ones)."""
    n, middle = logs.size, float(logs.mean())
    if n < 2:
        return Estimate(value=math.exp(middle), n=n), 1.0, 1.0
    error = float(logs.std(ddof=1)) / math.sqrt(n)
    half = critical(1 - alpha, n - 1) * error
    ratio = Estimate(value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half), n=n)
    return ratio, 2 * _beyond(abs(middle), error, n - 1), _beyond(margin - abs(middle), error, n - 1)


def _beyond(distance: float, error: float, df: int) -> float:
    """One-sided p of a distance from the hypothesis."""
    if error == 0:
        return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
    return float(special.stdtr(df, -distance / error))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given."""
    order = np.argsort(ps, kind="stable")
    stepped = np.asarray(ps, dtype=np.float64)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    values: list[float] = adjusted.tolist()
    return values


def _verdict(pair: Pair, ratio: Estimate, p_adjusted: float, p_same: float, least: float, alpha: float) -> Outcome:
    change = math.log(ratio.value or 1.0) * (1 if pair.better == "higher" else -1)
    if p_adjusted < alpha and abs(change) > math.log1p(least):
        return "better" if change > 0 else "worse"
    return "same" if p_same < alpha else "undecided"


def _advice(rows: Sequence[Row], logs: Sequence[Floats], alpha: float) -> str:
    """How many pairs would do, from the noisiest row that is undecided."""
    open_rows = [(row, log) for row, log in zip(rows, logs, strict=True) if row.verdict == "undecided"]
    if any(log.size < 2 for _, log in open_rows):
        return "one pair tells nothing of the noise: measure at least 4"
    hidden = [row for row, _ in open_rows if row.p_adjusted < alpha and row.floor > row.margin]
    if hidden:
        worst = max(hidden, key=lambda row: row.floor)
        return (
            f"{worst.name} differs, but by less than one side differs from itself here ({worst.floor:.0%}): it takes "
            "a quieter machine or more pairs"
        )
    row, log = max(open_rows, key=lambda one: float(one[1].std(ddof=1)))
    spread, effect = float(log.std(ddof=1)), max(EFFECT, 2 * row.margin)
    which = f"{row.name} differs by {math.expm1(spread):.1%} from pair to pair"
    try:
        needed = required_pairs(spread, effect, alpha=alpha, comparisons=len(rows), margin=row.margin)
    except CompareError as error:
        return f"{which}: {error}"
    if needed <= log.size:
        return f"{which}: {log.size} pairs would show {effect:.0%}; what is undecided is smaller than that"
    return f"{which}: to find {effect:.0%} with {POWER:.0%} probability takes {needed} pairs, there are {log.size}"


def noise_floor(pairs: Sequence[Pair], confidence: float = 0.95) -> float | None:
    """The relative difference that A shows against itself: what is smaller cannot be told from noise. None where a
    level has fewer than three pairs on average, which tell next to nothing of it.

    `pairs` are A/A. The upper confidence bound of the standard deviation of a pair's mean log ratio, about zero (which
    is where it belongs: what A/A differs by on average is noise too). Metrics and levels of the same runs go up and
    down together: at worst all levels of a run tell the same once more, and then their squares together have at least
    as many degrees of freedom as a level has pairs on average. Give it the pairs of each metric by themselves where
    metrics differ in noise, and `compare` a floor by name.
    """
    logs = [log_ratios(pair) for pair in pairs]
    df = sum(log.size for log in logs) / max(1, len(logs))
    if df < LEAST_SELF_PAIRS:
        return None
    variance = float(np.mean(np.concatenate(logs) ** 2)) / df
    return math.expm1(math.sqrt(variance * df / float(special.chdtri(df, confidence))))


def required_pairs(
    sd: float,
    effect: float = EFFECT,
    power: float = POWER,
    alpha: float = 0.05,
    comparisons: int = 1,
    margin: float = 0.0,
) -> int:
    """How many pairs find a relative difference of `effect`, in one of so many comparisons, with probability `power`.

    `sd` is the standard deviation of the log ratio from pair to pair. With the noncentral t distribution, at the level
    of Holm's first step, alpha / comparisons; the difference found must exceed `margin` as well. Raises CompareError
    where more than 10,000 would be needed, or the effect is within the margin.
    """
    if not (sd >= 0 and 0 < power < 1 and 0 < alpha < 1 and comparisons >= 1 and effect > margin >= 0):
        raise CompareError("an effect above the margin, sd ≥ 0, and power and alpha between 0 and 1 are needed")
    size = math.log1p(effect)

    def enough(n: int) -> bool:
        return _power(n, sd, size, alpha / comparisons, math.log1p(margin)) >= power

    short, found = 1, 2
    while not enough(found):
        short, found = found, 2 * found
        if short >= MOST_PAIRS:
            raise CompareError(f"{effect:.1%} cannot be told from noise of {sd:.1%} by {MOST_PAIRS} pairs")
    while found - short > 1:
        middle = (short + found) // 2
        short, found = (short, middle) if enough(middle) else (middle, found)
    return found


def _power(n: int, sd: float, size: float, alpha: float, margin: float) -> float:
    """Probability that a mean of n exceeds both `margin` and the two-sided critical value of t, over the distribution
    of the estimated standard deviation (in 400 equally likely steps)."""
    if sd == 0:
        return 1.0
    error = sd / math.sqrt(n)
    steps = (np.arange(400) + 0.5) / 400
    estimated = error * np.sqrt(special.chdtri(n - 1, 1 - steps) / (n - 1))
    least = np.maximum(critical(1 - alpha, n - 1) * estimated, margin)
    return float(special.ndtr((size - least) / error).mean())
