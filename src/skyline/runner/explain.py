"""What Skyline would do with a model and what that costs, told from its configuration alone.

The model is built on the meta device, captured and lowered like the real one, so no weight is read and the device need
not be there.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skyline.checkpoint import load_config
from skyline.engine.config import EngineConfig
from skyline.graph import Call, Program
from skyline.kernels import Choice, Request, candidates
from skyline.models import create_model, kv_caches
from skyline.ops import OPS, AttentionBatch, Cost
from skyline.runner.loader import build_program, choose_dtype


def explain(config: EngineConfig, *, batch: int = 1, context: int = 256, prefill: int = 256) -> dict[str, Any]:
    """Plain JSON data: the model, each op with its kernel and the reasons, and the cost of two steps.

    The steps are a decode of `batch` requests with `context` tokens each, and a prefill of `prefill` tokens. Their cost
    is the least that must be done (skyline.ops.Cost), with perfect reuse inside each op and none between ops.
    Raises CheckpointError, ValueError or NoKernelError.
    """
    device_type = config.device.partition(":")[0]
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {config.device!r}")
    model_config = load_config(Path(config.model))
    dtype = choose_dtype(config, model_config)
    longest = max(context, prefill)
    if longest > model_config.max_position_embeddings:
        raise ValueError(f"{longest} tokens exceed the model's context of {model_config.max_position_embeddings}")
    model = create_model(model_config, dtype, "meta")
    program = build_program(config, model, dtype)
    layers = model_config.num_hidden_layers
    launches = program.launches()
    caches = kv_caches(model)
    steps = {
        "decode": _cost(program, [context - 1] * batch, [1] * batch, config.block_size),
        "prefill": _cost(program, [0], [prefill], config.block_size),
    }
    return {
        "model": config.model,
        "architecture": model_config.architecture,
        "device": config.device,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "hidden_size": model_config.hidden_size,
        "heads": {"query": model_config.num_attention_heads, "kv": model_config.num_key_value_heads},
        "head_dim": model_config.head_dim,
        "vocab_size": model_config.vocab_size,
        "max_model_len": model_config.max_position_embeddings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameter_bytes": _parameter_bytes(model),
        "kv_bytes_per_token": sum(cache.bytes_per_token() for cache in caches),
        "launches": {"step": launches.total(), "layer": sum(count // layers for count in launches.values())},
        "steps": {
            "decode": {"requests": batch, "context": context, **_summary(steps["decode"])},
            "prefill": {"requests": 1, "context": prefill, **_summary(steps["prefill"])},
        },
        "ops": [
            {
                "op": name,
                "provider": choice.kernel.provider,
                "reason": choice.reason,
                "rejected": _rejected(Request(OPS[name], device_type, dtype, config.batch_invariant), choice),
                "launches": launches[name],
                "launches_per_layer": launches[name] // layers,
                "decode": _figures(steps["decode"][name]),
                "prefill": _figures(steps["prefill"][name]),
            }
            for name, choice in program.choices.items()
            if launches[name]  # views are in no step's work
        ],
    }


def _rejected(request: Request, choice: Choice) -> list[dict[str, str]]:
    """Every other candidate: those that could not serve, then those that were not needed."""
    before = [{"provider": provider, "reason": reason} for provider, reason in choice.rejected]
    after = []
    for kernel in candidates(request.op.name)[len(before) + 1 :]:
        why_not = kernel.supports(request)
        after.append(
            {"provider": kernel.provider, "reason": why_not or f"supported, but {choice.kernel.provider} goes first"}
        )
    return before + after


def _cost(program: Program, starts: list[int], lengths: list[int], block_size: int) -> dict[str, Cost]:
    """By op: what one step costs that computes these tokens of each request and samples from its last."""
    blocks = [[0] * -(-(start + length) // block_size) for start, length in zip(starts, lengths, strict=True)]
    batch = AttentionBatch.build(blocks, starts, lengths, block_size, torch.device("cpu"))
    ids = torch.empty(sum(lengths), dtype=torch.int64, device="meta")
    rows = torch.empty(len(lengths), dtype=torch.int64, device="meta")
    costs: defaultdict[str, Cost] = defaultdict(lambda: Cost(0, 0))

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        costs[call.op.name] += call.op.cost(*arguments)

    with torch.inference_mode():
        program.trace(ids, ids, batch, rows, visit=visit)
    return costs


def _summary(costs: dict[str, Cost]) -> dict[str, Any]:
    return _figures(sum(costs.values(), Cost(0, 0)))


def _figures(cost: Cost) -> dict[str, Any]:
    """`intensity`: floating point operations a byte. Below the device's ratio of the two, memory is the limit."""
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "intensity": round(cost.flops / cost.bytes, 3) if cost.bytes else 0.0,
    }


def _parameter_bytes(model: nn.Module) -> int:
    # parameters() counts a tied embedding once, as memory does.
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
