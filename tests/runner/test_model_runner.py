"""The runner's own thread."""

from __future__ import annotations

import pytest
import torch

from skyline.runner import model_runner


def test_worker_takes_over_threads_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are settings of a thread: a new one would compute on every core, and record its events on the first GPU."""
    threads: list[int] = []
    devices: list[torch.device] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for name in ("cpu", "cuda", "cuda:1"):
        model_runner._prepare_worker(torch.device(name), 3, False)
    assert threads == [3, 3, 3]
    assert devices == [torch.device("cuda:1")]
