"""Several runs of one measurement, joined."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skyline.bench.estimate import Estimate
from skyline.bench.stats.dependence import critical


def combine(estimates: Sequence[Estimate], confidence: float = 0.95) -> Estimate:
    """The mean over independent replicates. Refused where one of them is: what is left would be a selection.

    What a run says of its own spread knows nothing of how runs differ (another start, another layout of memory, another
    hour), so the interval is Student's over the replicates' values, which holds both. Few replicates may agree by
    chance: the interval is never narrower than the replicates' own intervals make the mean (Röver, Knapp, Friede 2015,
    Hartung-Knapp-Sidik-Jonkman Approach and Its Modification, BMC Medical Research Methodology 15). Two replicates give
    a wide interval (t is 12.7), as they say next to nothing of how runs differ; three or four are worth their time.

    Of positive values with positive ends the interval is built on logarithms and stays positive. A single replicate is
    returned as it is. `n` is the sum. Raises ValueError for no replicate at all.
    """
    if not estimates:
        raise ValueError("there is no replicate to combine")
    if len(estimates) == 1:
        return estimates[0]
    n = sum(estimate.n for estimate in estimates)
    values = []
    for place, estimate in enumerate(estimates, 1):
        if estimate.value is None:
            return Estimate.refuse(f"replicate {place} of {len(estimates)}: {estimate.refused}", n)
        values.append(estimate.value)
    value = math.fsum(values) / len(values)
    between = critical(confidence, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    below = max(between, _within([estimate.low for estimate in estimates], values))
    above = max(between, _within([estimate.high for estimate in estimates], values))
    if min(values) > 0 and all(estimate.low is None or estimate.low > 0 for estimate in estimates):
        return Estimate(value=value, low=value * math.exp(-below / value), high=value * math.exp(above / value), n=n)
    return Estimate(value=value, low=value - below, high=value + above, n=n)


def _within(ends: Sequence[float | None], values: Sequence[float]) -> float:
    """Half the width of the mean's interval, to one side, from the replicates' own; exact ones add nothing."""
    return math.hypot(
        *(end - value if end is not None else 0.0 for end, value in zip(ends, values, strict=True))
    ) / len(values)
