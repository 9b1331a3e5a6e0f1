"""The largest step and one of decoding, computed before there are caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.models import create_model, kv_caches, randomize
from skyline.ops import AttentionBatch
from skyline.runner import dry_run
from skyline.runner.loader import build_program
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["Llama", "Qwen3Next", "DeepseekV32"])
def test_steps_are_as_large_as_they_get(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, family, **FAMILIES.get(family, {}))
    model = create_model(load_config(tmp_path), torch.float32, "cpu")
    randomize(model, 1)
    program = build_program(EngineConfig(model=str(tmp_path), dtype="float32"), model, torch.float32)
    seen: list[tuple[list[int], list[int], int]] = []
    call = type(program).__call__

    def counted(self: Any, ids: Any, positions: Any, batch: AttentionBatch, rows: Any) -> torch.Tensor:
        seen.append((batch.host_query_lens, batch.host_context_lens, len(rows)))
        logits: torch.Tensor = call(self, ids, positions, batch, rows)
        assert logits.isfinite().all()
        return logits

    monkeypatch.setattr(type(program), "__call__", counted)
    peaks = iter([1000, 10, 400])

    def peak(run: Callable[[], object]) -> int:
        run()
        return next(peaks)

    caches = kv_caches(model)
    found = dry_run.measure(
        program, caches, CPU, tokens=44, recorded=20, requests=3, rows=7, max_model_len=16, block_size=4, peak=peak
    )
    assert found == dry_run.Measured(largest=1000, decode=10, prompts=400)
    assert seen == [([16, 16, 12], [16, 16, 16], 7), ([1, 1, 1], [16, 16, 16], 3), ([16, 4], [16, 16], 1)]
    assert all(part.numel() == 0 for cache in caches for part in cache.tensors), "memory for the real ones"


def test_what_cuda_s_allocator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = [100], [900]  # of loading
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: most.__setitem__(0, held[0]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most[0])

    def run() -> None:
        most[0], held[0] = 350, 120

    assert dry_run._peak(run, CPU) == 250
