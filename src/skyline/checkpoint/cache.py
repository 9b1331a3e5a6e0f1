"""Where Skyline keeps what it can make again: kernels, tunings, packed weights, converted headers."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """SKYLINE_CACHE, else the user's cache folder."""
    base = os.environ.get("SKYLINE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyline"
