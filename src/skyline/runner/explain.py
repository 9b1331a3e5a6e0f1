"""What Skyline would do with a model and what that costs, told from its configuration alone.

The model is built on the meta device, captured and lowered like the real one, so no weight is read and the device need
not be there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import fx, nn

from skyline.checkpoint import CheckpointError, ModelConfig, load_config
from skyline.engine.config import EngineConfig
from skyline.graph import Call, Program, capture
from skyline.kernels import Request, others
from skyline.kernels.cpu.isa import REQUIRES, detect
from skyline.kernels.gpu import GPUS, Gpu
from skyline.kernels.gpu import detect as detect_gpu
from skyline.models import create_model, kv_caches
from skyline.ops import OPS, AttentionBatch, Cost, KVCache, LayerCache, Op
from skyline.ops import split as view
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.loader import build_program, choose_dtype, compiled_kinds, how_other_steps_run, why_call_by_call
from skyline.runner.memory import KV_DTYPES, set_kv_format

ISAS = (*REQUIRES, "none")
_MIXERS = (
    "paged_attention",
    "rope_attention",
    "attention_linear_fp8",
    "latent_attention",
    "gated_delta_rule",
)  # one in each layer
_DECODES = (1, 64)  # requests of the steps in which a GPU's launches are counted


def explain(
    config: EngineConfig,
    *,
    batch: int = 1,
    context: int = 256,
    prefill: int = 256,
    isa: str | None = None,
    hardware: str | None = None,
) -> dict[str, Any]:
    """Plain JSON data: the model, each op with its kernel and the reasons, and the cost of two steps.

    The steps are a decode of `batch` requests with `context` tokens each, and a prefill of `prefill` tokens. Their cost
    is the least that must be done (skyline.ops.Cost), with perfect reuse inside each op and none between ops.
    `launches` counts calls of kernels. A call on a GPU can be several kernels: `kernel_launches` counts those, of a
    decode of 1 request, of 64 and of `batch`, and of the prefill, at the least (Kernel.launches): what cuBLAS adds to
    a product, the sampler and a step's inputs are not in it.
    isa: instruction set of the CPU kernels, as in skyline.kernels.cpu.isa; None is this machine's. Nothing is built, so
    that it is not known here whether there is a compiler. hardware: one of skyline.kernels.gpu.GPUS; it need not be
    there, and means device "cuda". None is this machine's GPU, or an H200 where there is none.
    Raises CheckpointError, ValueError or NoKernelError.
    """
    if hardware is not None and hardware not in GPUS:
        raise ValueError(f"hardware must be one of {', '.join(GPUS)}, not {hardware!r}")
    if hardware is not None and isa is not None:
        raise ValueError("isa is of a CPU, hardware of a GPU: ask for one of them")
    config = config if hardware is None else msgspec.structs.replace(config, device="cuda")
    device_type = config.device.partition(":")[0]
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {config.device!r}")
    if isa is not None and isa not in ISAS:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, not {isa!r}")
    gpu = _gpu(config.device, hardware) if device_type == "cuda" else None
    isa = "none" if device_type != "cpu" else detect() if isa is None else isa
    model_config = load_config(Path(config.model))
    dtype = choose_dtype(config, model_config)
    longest = max(context, prefill)
    if longest > model_config.max_position_embeddings:
        raise ValueError(f"{longest} tokens exceed the model's context of {model_config.max_position_embeddings}")
    model = create_model(model_config, dtype, "meta")
    unfused = _launched(capture(model))
    checkpoint = _open(Path(config.model), model_config)
    kinds = compiled_kinds(config, dtype, isa) if device_type == "cpu" else frozenset()
    stored = checkpoint.integers(model, gpu, kinds) if checkpoint else None
    program = build_program(config, model, dtype, isa, stored, gpu)
    fused = [call.op.name for call in program.calls if not call.is_view]
    launches, per_layer = Counter(fused), _per_layer(fused)
    caches = kv_caches(model)
    set_kv_format(config, caches)

    memory = _memory(caches, config.block_size, model_config.max_position_embeddings)

    def request(name: str) -> Request:
        kv_dtype = KV_DTYPES.get(config.kv_cache_dtype)
        return Request(OPS[name], device_type, dtype, config.batch_invariant, kv_dtype, isa, gpu, config.prefer_kernels)

    decodes = {
        requests: _followed(program, [context - 1] * requests, [1] * requests, config.block_size, gpu)
        for requests in sorted({batch, *(() if gpu is None else _DECODES)})
    }
    prefilled = _followed(program, [0], [prefill], config.block_size, gpu)
    steps = {"decode": decodes[batch].costs, "prefill": prefilled.costs}
    kernel_launches = [
        {"step": step, "requests": requests, "tokens": tokens, **_kernel_launches(fused, followed.launches)}
        for step, requests, tokens, followed in (
            *(("decode", requests, requests, decoded) for requests, decoded in decodes.items()),
            ("prefill", 1, prefill, prefilled),
        )
    ]
    return {
        "model": config.model,
        "architecture": model_config.architecture,
        "device": config.device,
        "isa": isa if device_type == "cpu" else None,
        "hardware": None if gpu is None else _hardware(gpu, assumed=hardware is None and not torch.cuda.is_available()),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": model_config.num_hidden_layers,
        "hidden_size": model_config.hidden_size,
        "heads": {"query": model_config.num_attention_heads, "kv": model_config.num_key_value_heads},
        "head_dim": model_config.head_dim,
        "vocab_size": model_config.vocab_size,
        "max_model_len": model_config.max_position_embeddings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameter_bytes": _parameter_bytes(model),
        "kv_bytes_per_token": sum(cache.bytes_per_token() for cache in caches),
        "memory": memory,
        "kv_bytes_per_request": sum(entry["bytes_per_request"] for entry in memory),
        "stored": None
        if checkpoint is None or not checkpoint.method
        else {"method": checkpoint.method, "weights": checkpoint.report(model, dtype)},
        "fusions": program.fusions,
        "decode_call_by_call": None if device_type == "cpu" else why_call_by_call(config, program),
        "other_steps": None if device_type == "cpu" else how_other_steps_run(config, program),
        "launches": {
            "step": len(fused),
            "layer": _rounded(sum(per_layer.values())),
            "unfused_step": len(unfused),
            "unfused_layer": _rounded(sum(_per_layer(unfused).values())),
        },
        "kernel_launches": None if gpu is None else kernel_launches,
        "steps": {
            "decode": {"requests": batch, "context": context, **_figures(steps["decode"], gpu)},
            "prefill": {"requests": 1, "context": prefill, **_figures(steps["prefill"], gpu)},
        },
        "ops": [
            {
                "op": name,
                "provider": choice.kernel.provider,
                "reason": choice.reason,
                "weights": _weights(program, name),
                "rejected": [{"provider": who, "reason": why} for who, why in others(request(name), choice)],
                "launches": launches[name],
                "launches_per_layer": _rounded(per_layer.get(name, 0.0)),
                "decode": _figures({name: steps["decode"][name]}, gpu),
                "prefill": _figures({name: steps["prefill"][name]}, gpu),
            }
            for name, choice in program.choices.items()
            if launches[name]  # views are in no step's work
        ],
    }


def _weights(program: Program, op: str) -> list[str]:
    """The layouts that an op's kernel has its weights in, other than as they are stored."""
    names = {use.slot: use.layout.name for use in program.weights if use.layout is not None}
    return sorted(
        {names[slot] for call in program.calls if call.op.name == op for slot in call.arguments if slot in names}
    )


def _open(folder: Path, config: ModelConfig) -> Checkpoint | None:
    """The weights, if they are there: a configuration alone is enough to explain a model that is not quantized."""
    there = any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
    if not there and config.quantization_config is not None:
        raise CheckpointError(
            f"{folder} holds no weights, and only their names tell which are quantized; download the whole checkpoint"
        )
    return Checkpoint(folder, config) if there else None


def _memory(caches: list[LayerCache], block_size: int, length: int) -> list[dict[str, Any]]:
    """What the layers keep of a request, by kind; `bytes_per_request` for one of `length` tokens."""
    kinds: dict[tuple[str, int | None], list[LayerCache]] = {}
    for cache in caches:
        kinds.setdefault((cache.kind, cache.window if isinstance(cache, KVCache) else None), []).append(cache)
    found = []
    for (kind, window), members in kinds.items():
        token = sum(cache.bytes_per_token() for cache in members)
        state = 0 if token else sum(cache.bytes_per_block(block_size) for cache in members)
        found.append(
            {
                "kind": kind,
                "layers": len(members),
                "window": window,
                "bytes_per_token": token,
                "bytes_per_request": state or token * min(length, window or length),
            }
        )
    return found


def _launched(graph: fx.Graph) -> list[str]:
    """The op of each kernel launch of a step, in order. Views are none."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return [target.name for target in targets if isinstance(target, Op) and target is not view]


def _per_layer(launched: list[str], counts: list[int] | None = None) -> dict[str, float]:
    """Launches by op from one layer's attention to the next's, on average: a layer's worth, whatever was fused there.

    counts: how many kernels each call launches, where that is not one. A model of one layer has no next, so that there
    all of its step counts.
    """
    attention = [index for index, name in enumerate(launched) if name in _MIXERS]
    first, last, layers = (attention[0], attention[-1], len(attention) - 1) if len(attention) > 1 else (0, None, 1)
    between: Counter[str] = Counter()
    for name, count in zip(launched[first:last], (counts or [1] * len(launched))[first:last], strict=True):
        between[name] += count
    return {name: count / layers for name, count in between.items()}


def _kernel_launches(launched: list[str], counts: list[int]) -> dict[str, Any]:
    """Of a step, of a layer, and of a layer by op."""
    by_op = _per_layer(launched, counts)
    ops = {name: _rounded(count) for name, count in by_op.items()}
    return {"all": sum(counts), "layer": _rounded(sum(by_op.values())), "layer_by_op": ops}


def _rounded(count: float) -> float:
    """A whole number as one, where all layers are alike."""
    return int(count) if count.is_integer() else round(count, 2)


class _Followed(NamedTuple):
    """A step's cost by op, and of each call that is no view how many kernels it launches on a GPU."""

    costs: dict[str, Cost]
    launches: list[int]


def _followed(program: Program, starts: list[int], lengths: list[int], block_size: int, gpu: Gpu | None) -> _Followed:
    """The step that computes these tokens of each request and samples from its last."""
    blocks = [[0] * -(-(start + length) // block_size) for start, length in zip(starts, lengths, strict=True)]
    batch = AttentionBatch.build(blocks, starts, lengths, block_size, torch.device("cpu"))
    ids = torch.empty(sum(lengths), dtype=torch.int64, device="meta")
    rows = torch.empty(len(lengths), dtype=torch.int64, device="meta")
    found = _Followed(defaultdict(lambda: Cost(0, 0)), [])

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        found.costs[call.op.name] += call.op.cost(*arguments)
        if not call.is_view:
            count = call.kernel.launches
            found.launches.append(1 if gpu is None or count is None else count(gpu, *arguments))

    with torch.inference_mode():
        program.trace(ids, ids, batch, rows, visit=visit)
    return found


def _gpu(device: str, hardware: str | None) -> Gpu:
    if hardware is not None:
        return GPUS[hardware]
    return detect_gpu(torch.device(device).index or 0) if torch.cuda.is_available() else GPUS["h200"]


def _hardware(gpu: Gpu, assumed: bool) -> dict[str, Any]:
    """assumed: nobody asked for this GPU, and there is none."""
    return {
        "name": gpu.name,
        "assumed": assumed,
        "capability": ".".join(map(str, gpu.capability)),
        "multiprocessors": gpu.multiprocessors,
        "memory_bytes": gpu.memory,
        "bandwidth_bytes_per_second": gpu.bandwidth,
        "flops_per_second": gpu.flops,
        "libraries": sorted(gpu.libraries),
    }


def _figures(costs: dict[str, Cost], gpu: Gpu | None) -> dict[str, Any]:
    """Of ops together. `intensity`: floating point operations a byte. Below the device's ratio, memory is the limit.

    `floor`, of a GPU, in seconds: at the vendor's peaks moving the bytes takes `memory` and multiplying `compute`.
    Ops run one after the other, so that they take no less than `seconds`, the sum of each op's larger one.
    """
    cost = sum(costs.values(), Cost(0, 0))
    figures: dict[str, Any] = {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "intensity": round(cost.flops / cost.bytes, 3) if cost.bytes else 0.0,
    }
    if gpu is not None:
        floors = [(cost.bytes / gpu.bandwidth, cost.flops / _peak(name, gpu)) for name, cost in costs.items()]
        figures["floor"] = {
            "memory": sum(memory for memory, _ in floors),
            "compute": sum(compute for _, compute in floors),
            "seconds": sum(map(max, floors)),
        }
    return figures


def _peak(op: str, gpu: Gpu) -> float:
    """FLOP/s in the format that an op multiplies in. Integers of 8 bits go as fast as FP8, and were there before it."""
    plain = gpu.flops["bfloat16"]
    if "nvfp4" in op:
        return gpu.flops.get("float4", plain)
    return gpu.flops.get("float8", 2 * plain) if "fp8" in op or op.endswith("int8") else plain


def _parameter_bytes(model: nn.Module) -> int:
    # parameters() counts a tied embedding once, as memory does.
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
