"""Which provider serves each op on each GPU, for tiny models of every architecture on the meta device.

`python -m tests.kernels.selection_table` writes golden/selection.json anew, to be looked at before it is committed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skyline.checkpoint import ModelConfig, load_config
from skyline.engine.config import EngineConfig
from skyline.graph import Program
from skyline.kernels import Kernel, NoKernelError, Request, candidates, choose, others
from skyline.kernels.gpu import GPUS, Gpu
from skyline.models import create_model, kv_caches
from skyline.ops import OPS
from skyline.ops.formats import IntegerFormat, integers_of
from skyline.runner.decode_graphs import why_not_recorded
from skyline.runner.loader import build_program, choose_dtype
from skyline.runner.memory import KV_DTYPES, set_kv_format
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny

GOLDEN = Path(__file__).parent / "golden" / "selection.json"
COMMAND = "python -m tests.kernels.selection_table"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **FAMILIES,
}


@dataclass(frozen=True)
class Format:
    """Options of the engine, and what a checkpoint stores its linears and experts as, where a GPU takes that."""

    options: dict[str, Any] = field(default_factory=dict)
    stored: Callable[[Gpu], IntegerFormat | None] = lambda gpu: None


FORMATS: dict[str, Format] = {
    "bf16": Format(),
    "float16": Format({"dtype": "float16"}),
    "fp8 KV": Format({"kv_cache_dtype": "fp8"}),
    "int8 KV": Format({"kv_cache_dtype": "int8"}),
    "stored mxfp4": Format(stored=lambda gpu: IntegerFormat(4, 32, fp4=True)),
    "stored nvfp4": Format(stored=lambda gpu: IntegerFormat(4, 16, fp4=True)),
    "stored nvfp4, activations too": Format(stored=lambda gpu: IntegerFormat(4, 16, fp4=True, activations=True)),
    "stored fp8": Format(stored=lambda gpu: IntegerFormat(8, fp8=True) if gpu.fp8 else None),
    "stored fp8 blocks": Format(stored=lambda gpu: IntegerFormat(8, 128, fp8=True) if gpu.fp8 else None),
    "stored int8": Format(stored=lambda gpu: IntegerFormat(8)),
    "stored int4": Format(stored=lambda gpu: IntegerFormat(4, 128, zeros=True)),
    "fp8": Format({"quantization": "fp8"}),
    "mxfp4": Format({"quantization": "mxfp4"}),
    "int8": Format({"quantization": "int8"}),
    "int8-weight-only": Format({"quantization": "int8-weight-only"}),
    "int4": Format({"quantization": "int4"}),
    "batch-invariant": Format({"batch_invariant": True}),
}
# Of kernels: what a choice goes by, beside the op and the GPU.
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "float16": {"dtype": torch.float16},
    "fp8 KV": {"kv_dtype": torch.float8_e4m3fn},
    "int8 KV": {"kv_dtype": torch.int8},
    "FlashInfer preferred": {"prefer": "flashinfer"},
}
CACHED = (  # ops that go by the dtype of what is cached
    "attention_linear_fp8",
    "index_topk",
    "kv_write",
    "latent_attention",
    "latent_rope_write",
    "paged_attention",
    "rope_kv_write",
)
MACHINES: dict[str, Gpu] = {
    **GPUS,
    **{f"h200 without {library}": GPUS["h200"].without(library) for library in ("flashinfer", "triton")},
}


def table() -> dict[str, Any]:
    """Plain JSON data. What is equal is told once: for lists of architectures, ops, formats and GPUs.

    programs: by architecture, the ops of a step by provider, and why its decode steps are not recorded (null: they
    are), or why it cannot run. kernels: by op, the provider and why the others were not chosen.
    """
    programs, used = {}, set()
    for name, settings in ARCHITECTURES.items():
        found = []
        for where, program in _programs(name, settings):
            used.update(() if isinstance(program, str) else program.choices)
            found.append((where, {"refused": program} if isinstance(program, str) else _described(program)))
        programs[name] = [{"where": where, **program} for where, program in _grouped(found)]
    kernels = {}
    for op in sorted(used - {"split"}):  # a view
        found = [
            (f"{variant} on {key}", _told(_request(op, gpu, **options), gpu))
            for variant, options in VARIANTS.items()
            if "kv_dtype" not in options or op in CACHED
            for key, gpu in MACHINES.items()
        ]
        kernels[op] = [{"where": where, **choice} for where, choice in _grouped(found)]
    return {"programs": _named_together(programs), "kernels": _named_together(kernels)}


def _request(op: str, gpu: Gpu, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Request:
    return Request(OPS[op], "cuda", dtype, gpu=gpu, **options)


def _programs(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, Program | str]]:
    """By format and GPU, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), name, **settings)
        model_config = load_config(Path(folder))
    for name, format in FORMATS.items():
        program: Program | str = ""
        before: Gpu | None = None
        for key, gpu in GPUS.items():
            alike = before is not None and (before.fp4, format.stored(before)) == (gpu.fp4, format.stored(gpu))
            if isinstance(program, str) or not alike or _chosen(program, format, gpu) != _kernels(program):
                try:
                    program = _program(model_config, format, gpu)
                    assert _chosen(program, format, gpu) == _kernels(program), "the table lacks what a choice goes by"
                except (NoKernelError, ValueError) as error:
                    program = str(error).replace(gpu.name, "it")
            yield f"{name} on {key}", program
            before = gpu


def _program(model_config: ModelConfig, format: Format, gpu: Gpu) -> Program:
    config = EngineConfig(model="", device="cuda", **{"dtype": "bfloat16", "quantization": "none"} | format.options)
    dtype = choose_dtype(config, model_config)
    model = create_model(model_config, dtype, "meta")
    set_kv_format(config, kv_caches(model))
    stored: dict[int, IntegerFormat] = {}
    if (integers := format.stored(gpu)) is not None:
        # A checkpoint has as integers what the scheme for FP8 takes: all but the head, and what decides. In FP4 it also
        # has gpt-oss's experts, for which there is no scheme.
        build_program(EngineConfig(model="", device="cuda", quantization="fp8"), model, dtype, gpu=gpu)
        experts = (".experts.gate_up", ".experts.down") if integers.fp4 else ()
        stored = {
            id(weight): integers
            for name, weight in model.named_parameters()
            if integers_of(weight) is not None or name.endswith(experts)
        }
        config.quantization = None
    return build_program(config, model, dtype, stored=stored, gpu=gpu)


def _kernels(program: Program) -> list[Kernel]:
    return [choice.kernel for choice in program.choices.values()]


def _chosen(program: Program, format: Format, gpu: Gpu) -> list[Kernel]:
    """For this GPU, of the program's ops."""
    options: dict[str, Any] = {"kv_dtype": KV_DTYPES.get(format.options.get("kv_cache_dtype", "auto"))}
    if "dtype" in format.options:
        options["dtype"] = getattr(torch, format.options["dtype"])
    return [choose(_request(op, gpu, **options)).kernel for op in program.choices]


def _described(program: Program) -> dict[str, Any]:
    by_provider: dict[str, list[str]] = {}
    for op in sorted(program.launches()):
        by_provider.setdefault(program.choices[op].kernel.provider, []).append(op)
    ops = {provider: ", ".join(names) for provider, names in sorted(by_provider.items())}
    return {**ops, "not_recorded": why_not_recorded(program)}


def _told(request: Request, gpu: Gpu) -> dict[str, Any]:
    try:
        choice = choose(request)
    except NoKernelError:
        provider, refused = (
            None,
            [(kernel.provider, str(kernel.supports(request))) for kernel in candidates(request.op.name)],
        )
    else:
        provider, refused = choice.kernel.provider, others(request, choice)
    # That the CPU's kernels do not serve a GPU says nothing.
    return {"provider": provider, "others": {who: why.replace(gpu.name, "it") for who, why in refused if who != "cpu"}}


def _grouped(found: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is equal once, with all its keys."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for key, value in found:
        groups.setdefault(json.dumps(value), ([], value))[0].append(key)
    every = {key.partition(" on ")[0] for keys, _ in groups.values() for key in keys}
    for keys, value in groups.values():
        yield "everywhere" if len(groups) == 1 else _places(keys, every), value


def _places(keys: list[str], every: set[str]) -> str:
    """Formats that hold on the same GPUs together; none is named where all do. every: formats that there are."""
    by_format: dict[str, list[str]] = {}
    for key in keys:
        format, _, gpu = key.partition(" on ")
        by_format.setdefault(format, []).append(gpu)
    by_gpus: dict[str, list[str]] = {}
    for format, gpus in by_format.items():
        by_gpus.setdefault(_gpus(gpus), []).append(format)
    return "; ".join(
        gpus if set(formats) == every else f"{', '.join(formats)} on {gpus}" for gpus, formats in by_gpus.items()
    )


def _gpus(names: list[str]) -> str:
    whole = [name for name in names if name in GPUS]  # with all libraries
    missing = [name for name in GPUS if name not in names]
    if not missing:
        whole = ["all"]
    elif len(missing) < 3:
        whole = [f"all but {' and '.join(missing)}"]
    return ", ".join([*whole, *(name for name in names if name not in GPUS)])


def _named_together(tables: dict[str, Any]) -> dict[str, Any]:
    """What has equal tables under one name."""
    names: dict[str, list[str]] = {}
    for name, rows in tables.items():
        names.setdefault(json.dumps(rows), []).append(name)
    return {", ".join(alike): json.loads(rows) for rows, alike in names.items()}


def write() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(table(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    write()
