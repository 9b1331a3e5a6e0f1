"""Which provider serves each op on each GPU, for tiny models of many architectures on the meta device.

`python -m tests.kernels.selection_table` writes golden/selection.json anew, to be looked at before it is committed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from skyline.checkpoint import load_config
from skyline.engine.config import EngineConfig
from skyline.kernels import Choice, NoKernelError, Request, choose
from skyline.kernels.gpu import GPUS, Gpu
from skyline.models import create_model
from skyline.ops import OPS
from skyline.runner.decode_graphs import why_not_recorded
from skyline.runner.loader import build_program
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny

GOLDEN = Path(__file__).parent / "golden" / "selection.json"
COMMAND = "python -m tests.kernels.selection_table"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{name: FAMILIES[name] for name in ("GptOss", "DeepseekV3", "DeepseekV32", "Qwen3Next", "MiniMaxM2")},
}
FORMATS = ("bf16", "int8", "int4", "fp8")


def table() -> dict[str, Any]:
    """Plain JSON data. What is equal is told once: for lists of GPUs and formats, separated by commas.

    programs: by architecture, the ops of a step, and why its decode steps are not recorded (null: they are), or why it
    cannot run. kernels: by op, the provider and why those before it were refused. "... alone": without FlashInfer.
    """
    programs, used = {}, set()
    for name, settings in ARCHITECTURES.items():
        found = list(_programs(name, settings))
        used.update(op for _, program in found if "ops" in program for op in program["ops"].split(", "))
        programs[name] = [{"where": where, **program} for where, program in _grouped(found)]
    gpus = {name: gpu for key, gpu in GPUS.items() for name, gpu in _variants(key, gpu)}
    kernels = {}
    for op in sorted(used):
        found = [(key, _told(choose(_request(op, gpu)), gpu)) for key, gpu in gpus.items()]
        kernels[op] = [{"where": where, **choice} for where, choice in _grouped(found)]
    return {"programs": programs, "kernels": kernels}


def _variants(key: str, gpu: Gpu) -> Iterator[tuple[str, Gpu]]:
    yield key, gpu
    yield f"{key} alone", gpu.without("flashinfer")


def _request(op: str, gpu: Gpu) -> Request:
    return Request(OPS[op], "cuda", torch.bfloat16, gpu=gpu)


def _programs(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), name, **settings)
        model_config = load_config(Path(folder))
    for format in FORMATS:
        quantization: Any = "none" if format == "bf16" else format
        config = EngineConfig(model=folder, device="cuda", dtype="bfloat16", quantization=quantization)
        model = create_model(model_config, torch.bfloat16, "meta")
        for key, gpu in GPUS.items():
            try:
                program = build_program(config, model, torch.bfloat16, gpu=gpu)
            except NoKernelError as error:
                yield f"{format} on {key}", {"error": str(error).replace(gpu.name, "it")}
                continue
            for op, choice in program.choices.items():
                assert choice.kernel is choose(_request(op, gpu)).kernel, "chosen by something that the table lacks"
            ops = ", ".join(sorted(program.launches()))
            yield f"{format} on {key}", {"ops": ops, "not_recorded": why_not_recorded(program)}


def _told(choice: Choice, gpu: Gpu) -> dict[str, Any]:
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
