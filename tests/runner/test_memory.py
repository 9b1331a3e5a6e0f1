"""What is available to the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyline.runner import memory


@pytest.mark.parametrize(
    "limit,usage,prefix", [("memory.max", "memory.current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")]
)
def test_page_cache_of_a_container_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, usage: str, prefix: str
) -> None:
    """The kernel charges the checkpoint's cached pages to the control group, but takes them back when asked."""
    folder = tmp_path
    if prefix:
        folder = tmp_path / "memory"
        folder.mkdir()
        limit, usage = f"memory.{limit}", f"memory.{usage}"
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("900\n")
    (folder / "memory.stat").write_text(f"anon 300\n{prefix}active_file 200\n{prefix}inactive_file 350\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes(torch.device("cpu")) == 650
