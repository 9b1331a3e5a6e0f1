"""`skyline tune` on a GPU: settings of decode steps, compared on recorded steps of the model itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.kernels import tuning
from skyline.kernels.flashinfer import tuning as flashinfer
from skyline.kernels.triton.knobs import CANDIDATES, Knobs
from skyline.ops import AttentionBatch
from skyline.ops.nvfp4 import FEW_ROWS
from skyline.runner import decode_knobs
from skyline.runner.decode_graphs import DecodeGraphs
from skyline.runner.loader import LoadedModel, load_model

SIZES = (1, 4, 16, 64, 256)
CONTEXT = 1024  # tokens of each request in the steps that are timed, at most
_STREAMED = frozenset({"moe_experts", "fused_experts", "moe_experts_clamped"})  # of one token, without tiles
_IN_WORDS = frozenset(
    {"moe_experts_fp4", "moe_experts_clamped_fp4", "moe_experts_int4_weight_only", "moe_experts_nvfp4"}
)
_MARGIN = 0.005  # what is not faster by so much is not worth another setting


@dataclasses.dataclass
class _Search:
    """Coordinate descent: one knob after the other, each with the best of those before it."""

    time_step: Callable[[Knobs], float]
    until: float

    def run(self, names: list[str]) -> dict[str, Any]:
        best = Knobs()
        default_s = best_s = self.time_step(best)
        tried: list[dict[str, Any]] = []
        for name in names:
            for value in CANDIDATES[name]:
                if value == getattr(best, name) or time.perf_counter() > self.until:
                    continue
                knobs = msgspec.structs.replace(best, **{name: value})
                try:
                    seconds = self.time_step(knobs)
                except Exception as error:  # one that does not compile or fit here
                    tried.append({name: value, "error": f"{type(error).__name__}: {str(error)[:200]}"})
                    continue
                tried.append({name: value, "seconds": seconds})
                if seconds < best_s * (1 - _MARGIN):
                    best, best_s = knobs, seconds
        return {"knobs": best, "default_s": default_s, "seconds": best_s, "tried": tried}


def tune(config: EngineConfig, budget: float, most: int) -> dict[str, Any]:
    """Load the model, measure steps of up to `most` requests, and keep what was found for later starts.

    Plain JSON data. budget: seconds. Raises CheckpointError, OutOfMemoryError or ValueError, also where decode steps
    cannot be recorded.
    """
    loaded = load_model(config)
    try:
        return tune_loaded(loaded, config, budget, tuple(size for size in SIZES if size <= most))
    finally:
        loaded.runner.close()


def tune_loaded(loaded: LoadedModel, config: EngineConfig, budget: float, sizes: tuple[int, ...]) -> dict[str, Any]:
    """`tune` of a model that is loaded and idle; what is in its KV cache is lost."""
    graphs = loaded.runner.graphs
    if graphs is None:
        raise ValueError("tune compares recorded decode steps, and this model's cannot be recorded here")
    file, kept = decode_knobs.kept(config, load_config(Path(config.model)))
    context = min(CONTEXT, loaded.limits.max_model_len)
    fits = [size for size in sizes if size <= config.max_num_seqs]
    fits = [size for size in fits if size * (context // config.block_size + 1) <= loaded.limits.num_blocks]
    ops = {call.op.name for call in loaded.program.calls}
    began = time.perf_counter()
    results = []
    for done, size in enumerate(fits):
        share = (began + budget - time.perf_counter()) / (len(fits) - done)
        found = loaded.runner.between_steps(lambda: _tune_size(graphs, context, size, ops, share))  # noqa: B023
        kept.sizes[size] = found["knobs"]
        results.append({"requests": size, **found, "knobs": msgspec.structs.asdict(found["knobs"])})
    graphs.set_knobs(kept)
    tactics = decode_knobs.tactics_file(file)
    try:
        tuning.save(file, kept)
        tuned = _tune_flashinfer(loaded, config, tactics)
    except OSError as error:
        raise ValueError(f"the measurements cannot be kept in {file}: {error.strerror}") from error
    return {
        "model": config.model,
        "measured_on": kept.measured_on,
        "file": str(file),
        "flashinfer": str(tactics) if tuned else None,
        "context": context,
        "sizes": results,
    }


def _tune_flashinfer(loaded: LoadedModel, config: EngineConfig, file: Path) -> bool:
    """Show its autotuner a step with as many tokens as there can be; False if there was nothing that it tuned.

    It times tactics for all smaller numbers of tokens at once, for as long as it takes. Raises OSError.
    """
    program = loaded.program
    if not any(flashinfer.has_tactics(call.kernel) for call in program.calls):
        return False
    device, block_size = torch.device(config.device), config.block_size
    tokens = min(config.max_num_batched_tokens, loaded.limits.max_model_len)

    def step() -> None:
        batch = AttentionBatch.build([[0] * -(-tokens // block_size)], [0], [tokens], block_size, device)
        positions = torch.arange(tokens, device=device)
        with torch.inference_mode():
            program(torch.zeros_like(positions), positions, batch, positions[-1:])  # tries out what it has not yet
            with flashinfer.tuning(file):
                program(torch.zeros_like(positions), positions, batch, positions[-1:])

    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # what it holds would not be timed again, and of other versions not be replaced
    loaded.runner.between_steps(step)
    return file.exists()


def _tune_size(graphs: DecodeGraphs, context: int, size: int, ops: set[str], seconds: float) -> dict[str, Any]:
    search = _Search(lambda knobs: graphs.time_step(size, context, knobs), time.perf_counter() + seconds)
    with torch.inference_mode():
        return search.run(_names(size, ops))


def _names(size: int, ops: set[str]) -> list[str]:
    """The knobs that such a step of a model with these ops has."""
    fp8 = any(op.endswith("linear_fp8") for op in ops)
    names = ["splits", "stages", "keys"]
    experts = {op for op in ops if op.startswith("moe_experts") or op == "fused_experts"}
    if size == 1 and experts & _STREAMED:
        names.append("experts_stream")
    elif size == 1 and "moe_experts_fp8" in experts:
        names.append("experts_fp8")
    elif size == 1 and experts & _IN_WORDS:
        names += ["words_gated", "words_down"]
    elif experts - ({"moe_experts_nvfp4"} if size > FEW_ROWS else set()):  # many rows of those have tiles of their own
        names += ["experts_band", "experts_rows", "experts_stages", "experts_warps"]
    words = any(op.endswith(("linear_fp4", "linear_int4", "linear_int4_weight_only", "linear_nvfp4")) for op in ops)
    if size == 1 and words:
        names += ["words"] if "words_gated" in names else ["words", "words_gated"]
        names += ["vector"] * any(op in ("linear", "fused_linear") for op in ops)  # the head
    elif size == 1:
        names += ["fp8_vector", "fp8_normed", "fp8_gated"] if fp8 else ["vector", "gated"]
    elif fp8 and size <= 64:
        names += ["early_scales", "bands"]
    return names
