"""Which requests kept an objective."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from skyline.bench.stats.dependence import Samples
from skyline.bench.suite import Slo


def meets(ttft: Samples, tpot: Samples, e2e: Samples, slo: Slo) -> npt.NDArray[np.bool_]:
    """One boolean a request, from arrays of seconds of one length (ValueError otherwise).

    A NaN in `tpot` stands for a request of one token, which has no time per further token and keeps it; in `ttft` or
    `e2e` it stands for one that brought no token or did not end, which keeps nothing that is asked of it.
    """
    first, each, whole = (np.asarray(times, dtype=np.float64) for times in (ttft, tpot, e2e))
    if not first.shape == each.shape == whole.shape or first.ndim != 1:
        raise ValueError(f"ttft, tpot and e2e differ in length: {first.shape}, {each.shape}, {whole.shape}")
    kept = np.ones(first.shape, dtype=np.bool_)
    if slo.ttft_s is not None:
        kept &= first <= slo.ttft_s
    if slo.tpot_s is not None:
        kept &= np.isnan(each) | (each <= slo.tpot_s)
    if slo.e2e_s is not None:
        kept &= whole <= slo.e2e_s
    return kept
