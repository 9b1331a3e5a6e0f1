"""The table of docs/models.md is what these comparisons give, and all of it is green."""

from __future__ import annotations

import pytest

from skyline.models import MODELS

from . import table


@pytest.fixture(scope="module")
def found() -> list[table.Row]:
    return list(table.rows())


def test_every_row_is_green(found: list[table.Row]) -> None:
    assert [row.line() for row in found if not row.green] == []


def test_the_document_shows_these_rows(found: list[table.Row]) -> None:
    """Errors differ between machines; what was compared does not, and nobody may write a better figure than 'yes'."""
    shown = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.documented()]
    assert [cells[:3] for cells in shown] == [row.key for row in found], "run python -m tests.models.table"
    for *_, error, greedy in shown:
        assert float(error) < table.TOLERANCE and greedy == "yes"


def test_every_architecture_is_in_the_table(found: list[table.Row]) -> None:
    assert {row.architecture for row in found} == MODELS.keys()
