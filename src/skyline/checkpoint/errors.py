"""The one exception of this folder."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or used. The message says what is wrong and what to do about it."""
