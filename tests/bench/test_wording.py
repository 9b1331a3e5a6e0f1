from __future__ import annotations

from skyline.bench.wording import number_of


def test_one_is_singular() -> None:
    assert [number_of(n, "point") for n in (0, 1, 2)] == ["0 points", "1 point", "2 points"]
