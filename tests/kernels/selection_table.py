"""Which provider serves each op on each GPU, for tiny models of many architectures on the meta device.

`python -m tests.kernels.selection_table` writes golden/selection.json anew, to be looked at before it is committed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from skyline.checkpoint import load_config
from skyline.engine.config import EngineConfig
from skyline.graph import Program
from skyline.kernels import Choice, NoKernelError, Request, choose
from skyline.kernels.gpu import GPUS, Gpu
from skyline.models import create_model, kv_caches
from skyline.ops import OPS
from skyline.ops.quantized import IntegerFormat
from skyline.runner.decode_graphs import why_not_recorded
from skyline.runner.loader import build_program
from skyline.runner.memory import KV_DTYPES, set_kv_dtype
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny

GOLDEN = Path(__file__).parent / "golden" / "selection.json"
COMMAND = "python -m tests.kernels.selection_table"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **FAMILIES,
}


@dataclass(frozen=True)
class Format:
    """Of weights, activations and cached keys and values. stored: what the checkpoint's weights are already."""

    quantization: Any = "none"
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: Any = "auto"
    stored: IntegerFormat | None = None

    @property
    def kind(self) -> str:
        """What an op's choice can depend on, beyond the op: "" for bfloat16 alone."""
        return "" if self.dtype == torch.bfloat16 and self.kv_dtype == "auto" else f" ({self.dtype}, {self.kv_dtype})"

    def request(self, op: str, gpu: Gpu) -> Request:
        return Request(OPS[op], "cuda", self.dtype, gpu=gpu, kv_dtype=KV_DTYPES.get(self.kv_dtype))


FORMATS = {
    "bf16": Format(),
    "fp16": Format(dtype=torch.float16),
    "int8": Format("int8"),
    "int8-weight-only": Format("int8-weight-only"),
    "int4": Format("int4"),
    "fp8": Format("fp8"),
    "fp8 in blocks, stored": Format(None, stored=IntegerFormat(8, 128, fp8=True)),
    "fp8 KV": Format(kv_dtype="fp8"),
    "int8 KV": Format(kv_dtype="int8"),
}


def table() -> dict[str, Any]:
    """Plain JSON data. What is equal is told once: for lists of GPUs and formats, separated by commas.

    programs: by architecture, the ops of a step, and why its decode steps are not recorded (null: they are), or why it
    cannot run. kernels: by op, the provider and why those before it were refused; of other types than bfloat16 only
    where they differ. "... alone": without FlashInfer.
    """
    programs: dict[str, Any] = {}
    used: dict[str, dict[str, Format]] = {}  # ops by kind
    for name, settings in ARCHITECTURES.items():
        found, plain = [], list[str]()
        for label, format, ops in _ops(name, settings):
            if isinstance(ops, str):
                found += [(f"{label} on {key}", {"error": ops}) for key in GPUS]
                continue
            plain = plain or ops  # of bfloat16, which is what a GPU that does not know FP8 makes of what is stored so
            for op in ops:
                used.setdefault(format.kind, {})[op] = format
            for key, gpu in GPUS.items():
                here = plain if format.stored and not gpu.fp8 else ops
                found.append((f"{label} on {key}", _program(here, format, gpu)))
        programs[name] = [{"where": where, **program} for where, program in _grouped(found)]
    kernels: dict[str, Any] = {}
    for kind, ops in sorted(used.items()):  # that of bfloat16 comes first
        for op, format in sorted(ops.items()):
            entry = _kernels(op, format)
            if kind == "" or entry != kernels.get(op):
                kernels[op + kind] = entry
    return {"programs": programs, "kernels": kernels}


def _kernels(op: str, format: Format) -> list[dict[str, Any]]:
    gpus = [(name, gpu) for key, gpu in GPUS.items() for name, gpu in _variants(key, gpu)]
    found = [(name, _told(lambda gpu=gpu: choose(format.request(op, gpu)), gpu)) for name, gpu in gpus]
    return [{"where": where, **choice} for where, choice in _grouped(found)]


def _variants(key: str, gpu: Gpu) -> Iterator[tuple[str, Gpu]]:
    yield key, gpu
    yield f"{key} alone", gpu.without("flashinfer")


def _ops(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, Format, list[str] | str]]:
    """By format, the ops of a step, or why there are none: on all GPUs the same, so one is enough to build it for."""
    gpu = GPUS["h200"]
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), name, **settings)
        model_config = load_config(Path(folder))
    for label, format in FORMATS.items():
        config = EngineConfig(
            model=folder, device="cuda", quantization=format.quantization, kv_cache_dtype=format.kv_dtype
        )
        model = create_model(model_config, format.dtype, "meta")
        stored = {id(weight): format.stored for weight in model.parameters() if format.stored and weight.dim() > 1}
        try:
            set_kv_dtype(config, kv_caches(model))
        except ValueError as error:
            yield label, format, str(error)
            continue
        program = build_program(config, model, format.dtype, stored=stored, gpu=gpu)
        for op, choice in program.choices.items():
            chosen = choose(format.request(op, gpu)).kernel
            assert choice.kernel is chosen, f"{op} was chosen by something that the table lacks"
        yield label, format, sorted(program.launches())


def _program(ops: list[str], format: Format, gpu: Gpu) -> dict[str, Any]:
    try:
        calls = [SimpleNamespace(op=OPS[op], kernel=choose(format.request(op, gpu)).kernel) for op in ops]
    except NoKernelError as error:
        return {"error": str(error).replace(gpu.name, "it")}
    why_not: Any = why_not_recorded(cast(Program, SimpleNamespace(calls=calls)))
    return {"ops": ", ".join(ops), "not_recorded": why_not}


def _told(ask: Callable[[], Choice], gpu: Gpu) -> dict[str, Any]:
    try:
        choice = ask()
    except NoKernelError as error:
        return {"error": str(error).replace(gpu.name, "it")}
    # Of what has no GPU kernel at all, that the CPU's do not serve it says nothing.
    refused = {who: why.replace(gpu.name, "it") for who, why in choice.rejected if who != "cpu"}
    return {"provider": choice.kernel.provider, "refused": refused}


def _grouped(found: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is equal once, with all its keys."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for key, value in found:
        groups.setdefault(json.dumps(value), ([], value))[0].append(key)
    whole = len(groups) == 1
    for keys, value in groups.values():
        yield "everywhere" if whole else _named(keys), value


def _named(keys: list[str]) -> str:
    """Formats that hold on the same GPUs together."""
    if " on " not in keys[0]:
        return ", ".join(keys)
    by_format: dict[str, list[str]] = {}
    for key in keys:
        format, _, gpu = key.partition(" on ")
        by_format.setdefault(format, []).append(gpu)
    by_gpus: dict[str, list[str]] = {}
    for format, gpus in by_format.items():
        by_gpus.setdefault("all" if len(gpus) == len(GPUS) else ", ".join(gpus), []).append(format)
    return "; ".join(f"{', '.join(formats)} on {gpus}" for gpus, formats in by_gpus.items())


def write() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(table(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    write()
