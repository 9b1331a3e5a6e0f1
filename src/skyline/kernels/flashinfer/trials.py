"""Whether a foreign kernel may be used: its result is compared once with ours, on the GPU and the numbers at hand.

FlashInfer builds or fetches kernels when they are first called, and what it takes depends on the GPU, the toolkit and
the shape. So the first call of each kind computes a result twice, and whatever goes wrong is said in one line. All of
its calls go through here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

# Of the root mean square. Two ways to add the same products differ by a tenth of that, a misread layout by 20 times it.
_TOLERANCE = 0.05

Kind = tuple[object, ...]  # what is computed, and what else its kernel may depend on

_reasons: dict[Kind, str | None] = {}  # of kinds that were tried: why not, or None


def refused() -> dict[Kind, str]:
    """The kinds that failed their trial, and why."""
    return {kind: why_not for kind, why_not in _reasons.items() if why_not is not None}


def checked(kind: Kind, foreign: Callable[[], Tensor], ours: Callable[[], Tensor]) -> Tensor:
    """What `foreign` gives if a call of this kind has passed its trial, else what `ours` does.

    The trial waits for the device, so there is none while a CUDA graph is recorded. Zeros tell nothing: they are none.
    """
    tried = kind in _reasons
    if tried and _reasons[kind] is None:
        return foreign()
    result = ours()
    recording = result.is_cuda and torch.cuda.is_current_stream_capturing()
    if not tried and not recording and bool(result.any()):
        why_not = _reasons[kind] = _why_not(foreign, result)
        if why_not is not None:
            what = " ".join(map(str, kind))
            _LOG.warning("FlashInfer is not used for %s, our own kernel computes it: %s", what, why_not)
    return result


def _why_not(foreign: Callable[[], Tensor], expected: Tensor) -> str | None:
    try:
        found = foreign()
    except Exception as error:  # of a compiler, a download, a check of arguments: all of them are its to raise
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"it gives {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    wide = expected.float()
    off = float((found.float() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp(min=1e-30))
    return None if off <= _TOLERANCE else f"its results are off by {off:.1%} of their size"
