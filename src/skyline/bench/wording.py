"""Words for people."""

from __future__ import annotations


def number_of(count: int, noun: str) -> str:
    """1 point, 2 points."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
