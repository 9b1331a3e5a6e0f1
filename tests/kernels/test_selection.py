"""The choice of kernels for GPUs that are not there, against golden/selection.json."""

from __future__ import annotations

import json

from skyline.models.registry import MODELS
from tests.kernels import selection_table


def test_selection_is_as_recorded() -> None:
    """A change of it is either a mistake, or meant: then write the table anew and look at what has changed."""
    recorded = json.loads(selection_table.GOLDEN.read_text("utf-8"))
    found = selection_table.table()
    for section in ("programs", "kernels"):
        assert found[section].keys() == recorded[section].keys(), f"write it anew: {selection_table.COMMAND}"
        for name, entry in found[section].items():
            assert entry == recorded[section][name], f"{name} has changed; if that is meant: {selection_table.COMMAND}"


def test_every_architecture_is_in_the_table() -> None:
    assert {f"{name}ForCausalLM" for name in selection_table.ARCHITECTURES} == MODELS.keys()
