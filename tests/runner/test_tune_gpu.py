"""The search among settings of decode steps, and what is kept of it. Steps are timed on GPUs only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from torch import Tensor

from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.kernels import candidates, gpu, tuning
from skyline.kernels.triton.knobs import CANDIDATES, Knobs, current, using
from skyline.ops import AttentionBatch
from skyline.runner import decode_knobs, tune_gpu
from skyline.runner.decode_knobs import DecodeKnobs
from skyline.runner.tune_gpu import _names, _Search

_MIXTURES: tuple[set[str], ...] = ({"fused_experts"}, {"moe_experts_fp8"}, {"moe_experts_int4_weight_only"})


def test_candidates_begin_with_the_default() -> None:
    assert all(values[0] == getattr(Knobs(), name) for name, values in CANDIDATES.items())
    for size in (1, 16, 256):
        for ops in ({"linear"}, {"linear_fp8", "moe_experts_fp8"}, {"fused_experts"}, {"moe_experts_clamped_fp4"}):
            names = _names(size, ops)
            assert len(set(names)) == len(names) and set(names) <= CANDIDATES.keys()


def test_every_knob_belongs_to_some_step() -> None:
    steps = [
        _names(size, ops)
        for size in (1, 16)
        for ops in ({"linear"}, {"attention_linear_fp8"}, {"fused_linear_fp4"}, *_MIXTURES)
    ]
    assert {name for names in steps for name in names} == CANDIDATES.keys()
    tiles = {"experts_band", "experts_rows", "experts_stages", "experts_warps"}
    for ops, streamed in zip(_MIXTURES, ("experts_stream", "experts_fp8", "words_down"), strict=True):
        one, few = (set(_names(size, ops)) for size in (1, 4))
        assert tiles <= few and streamed in one and not tiles & one


def test_tiles_are_tried_only_where_they_are_used() -> None:
    tried = {size: "experts_rows" in _names(size, {"moe_experts_nvfp4", "fused_linear_nvfp4"}) for size in (1, 16, 64)}
    assert tried == {1: False, 16: True, 64: False}
    assert "experts_rows" in _names(64, {"moe_experts_fp4"})


def test_the_search_keeps_what_is_faster_and_goes_on_from_there() -> None:
    seen: list[Knobs] = []

    def seconds(knobs: Knobs) -> float:
        seen.append(knobs)
        if knobs.stages == 5:
            raise RuntimeError("does not fit")
        # Eight splits are the fastest; keys of 32 help by less than is worth it, of 128 by more.
        return 1.0 - 0.1 * (knobs.splits == 8) - {32: 0.001, 64: 0.0, 128: 0.05}[knobs.keys]

    found = _Search(seconds, float("inf")).run(["splits", "stages", "keys"])
    assert found["knobs"] == Knobs(splits=8, keys=128)
    assert found["default_s"] == 1.0 and found["seconds"] == pytest.approx(0.85)
    assert all(knobs.splits == 8 for knobs in seen[-2:]), "later knobs are tried with the best of those before"
    assert [entry for entry in found["tried"] if "error" in entry] == [
        {"stages": 5, "error": "RuntimeError: does not fit"}
    ]
    assert len(_Search(seconds, 0.0).run(["splits"])["tried"]) == 0, "no time, no trials"


def test_kept_for_this_gpu_model_and_options(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu, "detect", lambda index=0: gpu.GPUS["h200"])
    config, model = EngineConfig(model=str(tiny_checkpoint), device="cuda"), load_config(tiny_checkpoint)
    file, nothing = decode_knobs.kept(config, model)
    assert nothing.sizes == {} and nothing.of(7) == Knobs()
    mine = Knobs(splits=8)
    nothing.sizes = {4: mine, 64: Knobs(keys=32)}
    tuning.save(file, nothing)
    known = decode_knobs.kept(config, model)[1]
    assert [known.of(count).keys for count in (1, 4, 5, 64, 200)] == [64, 64, 32, 32, 32] and known.of(3) == mine
    assert decode_knobs.kept(msgspec.structs.replace(config, quantization="fp8"), model)[0] != file
    monkeypatch.setattr(gpu, "detect", lambda index=0: gpu.GPUS["b200"])
    assert decode_knobs.kept(config, model) == (file, DecodeKnobs(decode_knobs.kept(config, model)[1].measured_on))
    file.write_text("{")
    assert decode_knobs.kept(config, model)[1].sizes == {}


def test_knobs_hold_for_a_block() -> None:
    before = current()
    with pytest.raises(ZeroDivisionError), using(Knobs(splits=8)):
        assert current().splits == 8
        raise ZeroDivisionError
    assert current() is before


@pytest.mark.parametrize("op, shown", [("fused_experts", True), ("paged_attention", False)])
def test_flashinfer_s_autotuner_is_shown_the_largest_step(
    op: str, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the model has something that it tunes: once as it is, for what is still to be tried out, once to be timed."""
    kernel = next(kernel for kernel in candidates(op) if kernel.provider == "flashinfer")
    seen: list[str] = []

    class Program:
        calls = (SimpleNamespace(kernel=kernel),)

        def __call__(self, ids: Tensor, positions: Tensor, batch: AttentionBatch, rows: Tensor) -> None:
            assert batch.host_query_lens == [len(ids)] and rows.tolist() == [len(ids) - 1]
            seen.append(f"{len(ids)} tokens")

    @contextmanager
    def timed(file: Path) -> Iterator[None]:
        assert file.parent.is_dir() and not file.exists()
        seen.append("timed:")
        yield
        file.write_text("{}")

    monkeypatch.setattr(tune_gpu.flashinfer, "tuning", timed)
    runner = SimpleNamespace(between_steps=lambda run: run())
    loaded: Any = SimpleNamespace(program=Program(), runner=runner, limits=SimpleNamespace(max_model_len=100))
    config = EngineConfig(model="", max_num_batched_tokens=512)
    file = tmp_path / "new" / "flashinfer-1.json"
    for _ in range(2):  # what was kept is timed anew
        seen.clear()
        assert tune_gpu._tune_flashinfer(loaded, config, file) == shown == file.exists()
    assert seen == (["100 tokens", "timed:", "100 tokens"] if shown else [])
    assert decode_knobs.tactics_file(tmp_path / "decode-1f.json").name == "flashinfer-1f.json"
