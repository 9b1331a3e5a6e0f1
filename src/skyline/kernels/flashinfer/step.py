"""What all layers of a step share: lengths on the device, and plans."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import flashinfer
import numpy as np
import torch
from torch import Tensor

from skyline.kernels.flashinfer import calls
from skyline.kernels.flashinfer.calls import Pages, Shape
from skyline.ops import AttentionBatch
from skyline.ops.batch import to_device

_WORKSPACE = 128 << 20  # bytes, FlashInfer's advice

# Kept by purpose and device: recorded steps go on using them. Decode kernels leave zeros in theirs that they rely on:
# nothing else may use it.
_workspaces: dict[tuple[str, torch.device], Tensor] = {}
_wrappers: dict[tuple[Shape, torch.device], Any] = {}
# A plan is written to a buffer of its wrapper's on the host, from where the device copies it when it gets there.
_copied: dict[tuple[Shape, torch.device], Any] = {}


def workspace(purpose: str, device: torch.device) -> Tensor:
    key = (purpose, device)
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
    return _workspaces[key]


class Step:
    """Of one AttentionBatch."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self.decodes = all(queries == 1 for queries in batch.host_query_lens)
        self._lengths: tuple[Tensor, Tensor] | None = None
        self._planned: set[Shape] = set()

    def lengths(self) -> tuple[Tensor, Tensor]:
        """context_lens with 1 for a row of padding, [R], for no kernel says what it does with 0; and which rows are."""
        if self._lengths is None:
            contexts = self.batch.context_lens
            self._lengths = contexts.clamp(min=1), (contexts == 0).unsqueeze(1)
        return self._lengths

    def wrapper(self, shape: Shape, tables: Tensor, backend: str) -> Any:
        """The BatchPrefillWithPagedKVCacheWrapper of a shape, planned for this step."""
        key = (shape, tables.device)
        if key not in _wrappers:
            arguments = calls.prefill_wrapper(workspace("prefill", tables.device), backend)
            _wrappers[key] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(**arguments)
        wrapper = _wrappers[key]
        if shape not in self._planned:
            if key in _copied:
                _copied[key].synchronize()  # the device may be a step behind, and still to read the last plan
            wrapper.plan(**calls.prefill_plan(shape, pages(self.batch, tables, shape.block_size)))
            self._planned.add(shape)
            if tables.is_cuda:
                _copied[key] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                _copied[key].record()
        return wrapper


def pages(batch: AttentionBatch, tables: Tensor, block_size: int) -> Pages:
    """tables [R, longest] int32. Only numbers of the host are looked at."""
    contexts = np.array(batch.host_context_lens, np.int64)
    counts = -(-contexts // block_size)
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.concatenate(([0], np.cumsum(counts)))
    places = rows * tables.shape[1] + np.arange(len(rows)) - starts[rows]
    return Pages(
        torch.tensor([0, *accumulate(batch.host_query_lens)], dtype=torch.int32),
        torch.from_numpy(starts.astype(np.int32)),
        tables.reshape(-1).index_select(0, to_device(places, tables.device)),
        torch.from_numpy((contexts - (counts - 1) * block_size).astype(np.int32)),
    )


_current: Step | None = None


def of(batch: AttentionBatch) -> Step:
    """The step's, made at its first layer. One thread runs a model, one step at a time."""
    global _current
    if _current is None or _current.batch is not batch:
        _current = Step(batch)
    return _current
