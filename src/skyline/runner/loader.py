"""From a checkpoint folder to a runner that is ready to take plans."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from skyline.checkpoint.config import ModelConfig, effective_eos_token_ids, load_config, load_generation_defaults
from skyline.engine.config import EngineConfig
from skyline.engine.scheduler import MAX_LOGIT_ROWS, Limits
from skyline.graph import Program, capture, lower, quantize_linears, run_passes
from skyline.kernels import Request, choose, tuning
from skyline.kernels.cpu import native
from skyline.kernels.flashinfer import tuning as flashinfer
from skyline.kernels.gpu import Gpu, detect
from skyline.models import create_model, kv_caches
from skyline.ops import OPS, KVCache, LayerCache
from skyline.ops.formats import IntegerFormat
from skyline.runner import decode_knobs, dry_run
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.decode_graphs import why_not_recorded
from skyline.runner.grammar import GrammarCompiler
from skyline.runner.memory import (
    KV_DTYPES,
    MemoryPlan,
    OutOfMemoryError,
    available_bytes,
    group_caches,
    peak_activation_bytes,
    plan_memory,
    set_kv_format,
)
from skyline.runner.model_runner import ModelRunner
from skyline.runner.prompt_graphs import MOST_TOKENS, PromptGraphs, cut, padded, why_not_in_pieces
from skyline.runner.sampler import Sampler
from skyline.runner.weight_cache import WeightCache
from skyline.runner.weight_store import WeightStore

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadedModel:
    runner: ModelRunner
    program: Program
    limits: Limits
    eos_token_ids: frozenset[int]
    vocab_size: int
    report: dict[str, str] = field(default_factory=dict)  # what was decided, for the start-up table


def choose_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    name = (model.dtype or "bfloat16") if config.dtype == "auto" else config.dtype
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)
    if dtype is None:
        raise ValueError(f"the checkpoint's dtype {name!r} is not supported; choose one with --dtype")
    return dtype


def choose_device(name: str) -> torch.device:
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no usable CUDA device here; use --device cpu or check the driver")
    return device


def build_program(
    config: EngineConfig,
    model: torch.nn.Module,
    dtype: torch.dtype,
    isa: str | None = None,
    stored: Mapping[int, IntegerFormat] | None = None,
    gpu: Gpu | None = None,
) -> Program:
    """Capture, quantize, fuse, lower.

    isa: of the CPU to choose for; None is this machine's, building its kernels. stored: by a parameter's id, the
    integers that the checkpoint has of it, which are used unless another quantization, or none, is asked for. gpu: to
    choose for; None is this machine's.
    """
    device = torch.device(config.device)
    if gpu is None and device.type == "cuda":
        gpu = detect(device.index or 0)
    graph = capture(model)
    if config.quantization != "none":
        quantize_linears(graph, config.quantization, config.quantization_group, stored)
    fusions = run_passes(graph, device.type, gpu is None or gpu.fp8, gpu is not None and gpu.fp4)
    if isa is None:
        isa = native.available() if config.device == "cpu" else "none"
    program = lower(
        graph,
        model,
        device,
        dtype,
        batch_invariant=config.batch_invariant,
        isa=isa,
        gpu=gpu,
        prefer=config.prefer_kernels,
        kv_dtype=KV_DTYPES.get(config.kv_cache_dtype),
    )
    program.fusions = fusions
    return program


# By the kind of a weight (skyline.ops.formats.IntegerFormat).
_OP_ON = {"fp8": "linear_fp8", "fp4": "linear_fp4", "int8": "linear_int8", "int4": "linear_int4", "bytes": "linear"}


def compiled_kinds(config: EngineConfig, dtype: torch.dtype, isa: str) -> frozenset[str]:
    """Kinds of weights that the kernels of such a CPU take as they are stored; torch computes with others slowly."""
    found = set()
    for kind, op in _OP_ON.items():
        if kind == "bytes" and dtype != torch.bfloat16:  # which they are read as
            continue
        request = Request(OPS[op], "cpu", dtype, isa=isa, prefer=config.prefer_kernels)
        if choose(request).kernel.provider == native.PROVIDER:
            found.add(kind)
    return frozenset(found)


def load_model(config: EngineConfig) -> LoadedModel:
    """Raises CheckpointError, OutOfMemoryError or ValueError with what to do about it."""
    config.validate()
    device = choose_device(config.device)
    if config.threads is not None:  # else torch's own choice: the cores of this process, or OMP_NUM_THREADS
        torch.set_num_threads(config.threads)
    folder = Path(config.model)
    model_config = load_config(folder)
    dtype = choose_dtype(config, model_config)
    began = time.perf_counter()
    model = create_model(model_config, dtype, device, config.max_model_len, allocate=False)
    checkpoint = None if config.load_format == "dummy" else Checkpoint(folder, model_config)
    gpu = detect(device.index or 0) if device.type == "cuda" else None
    if gpu is not None and (slow := why_slow(config, gpu)):
        _LOG.warning("%s", slow)
    kinds = compiled_kinds(config, dtype, native.available()) if device.type == "cpu" else frozenset()
    if gpu is None and (why := why_refused(config, kinds)):
        raise ValueError(why)
    stored_as = checkpoint.integers(model, gpu, kinds) if checkpoint else None
    program = build_program(config, model, dtype, stored=stored_as)
    capture_seconds = time.perf_counter() - began

    began = time.perf_counter()
    tunings = None
    if device.type == "cpu" and native.available() != "none":
        _, tunings = tuning.kept(config.threads)
        program.tune(tunings)
    store = WeightStore(model, program, device)
    if checkpoint is None:
        store.randomize(model, config.seed)
        source = "random weights"
    else:
        source = _read_weights(config, model, checkpoint, store, dtype)
    load_seconds = time.perf_counter() - began

    limit_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    logits = (limit_rows + MAX_LOGIT_ROWS) * model_config.vocab_size * 4
    tokens = config.max_num_seqs * (config.max_model_len or model_config.max_position_embeddings) * 4
    predicted = peak_activation_bytes(program, config.max_num_batched_tokens, limit_rows)
    caches = kv_caches(model)
    set_kv_format(config, caches)
    scaled, stored = 0, ""
    if checkpoint is not None:
        scaled, stored = checkpoint.scale_keys_and_values(model), _stored(checkpoint, model, dtype)
        checkpoint.close()
    groups = group_caches(caches)
    call_by_call = why_call_by_call(config, program)
    largest, recorded, prompts = predicted, 0, None
    most = min(MOST_TOKENS, config.max_num_batched_tokens)
    if device.type == "cuda":
        found = _dry_run(config, model_config, program, caches, device, limit_rows + MAX_LOGIT_ROWS, padded(most))
        # Graphs share a memory of their own, those of decode steps one and all others another.
        largest, recorded = found.largest, 0 if call_by_call else found.decode
        if config.cuda_graphs:
            prompts = PromptGraphs(program, device, most, found.prompts)
            recorded += found.prompts if prompts.why_not is None else 0
    activations = largest + recorded + 4 * logits + tokens
    memory = plan_memory(config, model_config.max_position_embeddings, groups, activations, available_bytes(device))
    for cache in caches:
        cache.allocate(memory.groups[cache.group].num_blocks, config.block_size, device)

    tokenizer_file = folder / "tokenizer.json"
    eos = frozenset(effective_eos_token_ids(model_config, load_generation_defaults(folder)))
    compiler = GrammarCompiler(tokenizer_file.read_text("utf-8"), model_config.vocab_size, sorted(eos))
    shape = (config.max_num_seqs + 1, memory.max_model_len + 1)  # the last row is for padding
    token_ids = torch.zeros(shape, dtype=torch.int32, device=device)
    sampler = Sampler(
        vocab_size=model_config.vocab_size,
        max_slots=config.max_num_seqs,
        device=device,
        token_ids=token_ids,
        eos_token_ids=sorted(eos),
        grammar_compiler=compiler,
    )
    if device.type == "cpu":
        program.reserve(config.max_num_batched_tokens, limit_rows + MAX_LOGIT_ROWS)
    runner = ModelRunner(
        program,
        sampler,
        token_ids,
        block_size=config.block_size,
        device=device,
        threads=config.threads,
        table_groups=sum(not group.state for group in memory.groups),
        graphs=config.cuda_graphs if device.type == "cuda" and why_not_recorded(program) is None else None,
        knobs=decode_knobs.kept(config, model_config)[1] if device.type == "cuda" else None,
        prompts=prompts,
    )
    limits = Limits(
        num_blocks=memory.groups[0].num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=memory.max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        groups=memory.groups,
    )
    report = _report(config, model_config, model, program, memory, dtype, source, store.nbytes)
    if device.type == "cuda":
        report["memory"] += (
            f"; the largest step took {largest / 2**20:,.0f} MiB, {predicted / 2**20:,.0f} were predicted"
        )
        report["decode steps"] = call_by_call or "recorded as CUDA graphs while there is nothing else to do"
        report["other steps"] = how_other_steps_run(config, program)
        if any(flashinfer.has_tactics(call.kernel) for call in program.calls):
            tactics = decode_knobs.tactics_file(decode_knobs.kept(config, model_config)[0])
            found_tactics = flashinfer.read(tactics)
            report["FlashInfer"] = (
                "tactics measured by `skyline tune`" if found_tactics else "its own choice of tactics"
            )
    if stored:
        report["stored"] = stored
    if config.kv_cache_dtype == "fp8" and any(isinstance(cache, KVCache) for cache in caches):
        source_of = f"the checkpoint's, in {scaled} layers" if scaled else "1, for the checkpoint has none"
        report["KV scales"] = source_of
    if tunings is not None and tunings.tactics:
        report["tuning"] = f"tactics of {len(tunings.tactics)} products, measured by `skyline tune`"
    report["load"] = f"{load_seconds:.2f} s weights, {capture_seconds * 1000:.0f} ms capture"
    return LoadedModel(runner, program, limits, eos, model_config.vocab_size, report)


def why_refused(config: EngineConfig, kinds: frozenset[str]) -> str:
    """Why a CPU cannot be asked for this quantization, for which torch has no more than a reference; "" if it can."""
    kind = {"fp8": "fp8", "mxfp4": "fp4"}.get(config.quantization or "")
    if kind is None or kind in kinds:
        return ""
    instead = "int8" if kind == "fp8" else "int4"
    return (
        f"quantization {config.quantization} needs the CPU's compiled kernels and activations in bfloat16 "
        f"(--dtype bfloat16, a C++ compiler); else use {instead}"
    )


def why_slow(config: EngineConfig, gpu: Gpu) -> str:
    """What to say of FP8 on a GPU that does not know it; "" where there is nothing to say."""
    asked = [option for option in ("quantization", "kv_cache_dtype") if getattr(config, option) == "fp8"]
    if gpu.fp8 or not asked:
        return ""
    options = " and ".join(f"--{option.replace('_', '-')} int8" for option in asked)
    return f"{gpu.name} does not know FP8, so torch computes it, far slower; for {options} there are kernels"


def why_call_by_call(config: EngineConfig, program: Program) -> str:
    """Why decode steps on a GPU are not replayed from CUDA graphs; "" if they are."""
    why_not = why_not_recorded(program) if config.cuda_graphs else "CUDA graphs are switched off"
    return f"call by call: {why_not}" if why_not else ""


def how_other_steps_run(config: EngineConfig, program: Program) -> str:
    """Those on a GPU that are not of decodes alone."""
    pieces = cut(program)
    why_not = why_not_in_pieces(program, pieces) if config.cuda_graphs else "CUDA graphs are switched off"
    if why_not is not None:
        return f"call by call: {why_not}"
    recorded = sum(piece.recorded for piece in pieces)
    launched = sum(not call.is_view for piece in pieces if not piece.recorded for call in piece.calls)
    most = min(MOST_TOKENS, config.max_num_batched_tokens)
    return f"up to {most:,} tokens as {recorded} recorded pieces and {launched} calls between them, else call by call"


def _dry_run(
    config: EngineConfig,
    model: ModelConfig,
    program: Program,
    caches: list[LayerCache],
    device: torch.device,
    rows: int,
    recorded: int,
) -> dry_run.Measured:
    try:
        return dry_run.measure(
            program,
            caches,
            device,
            tokens=config.max_num_batched_tokens,
            recorded=recorded,
            requests=config.max_num_seqs,
            rows=rows,
            max_model_len=config.max_model_len or model.max_position_embeddings,
            block_size=config.block_size,
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a step of {config.max_num_batched_tokens:,} tokens does not fit beside the weights: lower "
            f"max_num_batched_tokens or max_num_seqs, or free memory ({error})"
        ) from error


def _read_weights(
    config: EngineConfig, model: torch.nn.Module, checkpoint: Checkpoint, store: WeightStore, dtype: torch.dtype
) -> str:
    """Fill the store, and say from where."""
    cache = WeightCache(config, dtype, native.available(), store.tensors()) if config.weight_cache else None
    if cache is not None and cache.read():
        return f"{cache.nbytes / 2**20:,.0f} MiB from the weight cache"
    read = checkpoint.load(model, store.write)
    source = f"{read.bytes / 2**20:,.0f} MiB"
    if (otherwise := store.finish()) and cache is not None:
        _LOG.warning("%s cannot be compressed, so that the weights are not cached", ", ".join(otherwise))
    elif cache is not None and cache.write():
        source += f", {cache.nbytes / 2**20:,.0f} MiB written to the weight cache"
    return source


def _report(
    config: EngineConfig,
    model_config: ModelConfig,
    model: torch.nn.Module,
    program: Program,
    memory: MemoryPlan,
    dtype: torch.dtype,
    source: str,
    weight_bytes: int,
) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    providers = sorted({choice.kernel.provider for choice in program.choices.values()})
    native_threads = config.device == "cpu" and native.available() != "none"
    threads = native.thread_count(config.threads) if native_threads else torch.get_num_threads()
    weights = "weights as they are" if config.quantization in (None, "none") else f"weights in {config.quantization}"
    rows = {
        "architecture": f"{model_config.architecture}, {parameters / 1e6:,.1f} M parameters, {source}",
        "dtype": f"{str(dtype).removeprefix('torch.')}, {weights}, {weight_bytes / 2**20:,.0f} MiB of them in memory",
        "device": f"{config.device}, {threads} threads, kernels: {', '.join(providers)}",
        "program": f"{sum(program.launches().values())} launches a step",
        "KV cache": f"{_blocks(memory, config.block_size)}, {memory.kv_bytes / 2**20:,.0f} MiB",
        "memory": f"{memory.available_bytes / 2**20:,.0f} MiB were available, "
        f"{memory.activation_bytes / 2**20:,.0f} MiB kept for activations",
        "limits": f"context {memory.max_model_len:,} tokens, {config.max_num_seqs} requests and "
        f"{config.max_num_batched_tokens:,} tokens a step",
    }
    if memory.note:
        rows["note"] = memory.note
    return rows


def _stored(checkpoint: Checkpoint, model: torch.nn.Module, dtype: torch.dtype) -> str:
    """What a quantized checkpoint's weights were and have become; "" if there are none."""
    parts = [f"{e['weights']} of {e['format']} -> {e['becomes']}" for e in checkpoint.report(model, dtype)]
    return "; ".join(parts)


def _blocks(memory: MemoryPlan, block_size: int) -> str:
    parts = []
    for group in memory.groups:
        if group.state:
            parts.append(f"{group.num_blocks:,} recurrent states")
        elif group.window is not None and len(memory.groups) > 1:
            parts.append(f"{group.num_blocks:,} for windows of {group.window:,}")
        else:
            parts.append(f"{group.num_blocks:,} blocks of {block_size} tokens")
    return ", ".join(parts)
