from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyline.cli import console, options

if TYPE_CHECKING:
    from rich.table import Table

_STEPS = "Steps"


def explain(
    model: options.Model = None,
    batch: Annotated[
        int, typer.Option(min=1, max=65536, help="Requests in the decode step.", rich_help_panel=_STEPS)
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that each of them has.",
            show_default="1024, or the model's context",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in the prefill step.",
            show_default="512, or the model's context",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: Annotated[
        str, typer.Option(help="cpu or cuda; it need not be there.", rich_help_panel=options.MODEL)
    ] = "cpu",
    isa: Annotated[
        str | None,
        typer.Option(
            help="Instruction set of the CPU: amx, avx512, avx2 or none; it need not be there.",
            show_default="this machine's",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="GPU to choose kernels for, which implies --device cuda: a100, l4, h100, h200, b200, gb200 or "
            "rtx-blackwell; it need not be there.",
            show_default="this machine's",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    quantization: options.Quantize = None,
    quantization_group: options.QuantizationGroup = 64,
    prefer_kernels: options.PreferKernels = None,
    batch_invariant: options.BatchInvariant = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which kernel serves each op of a model and why, and what a step costs. Loads no weights."""
    import msgspec

    from skyline.checkpoint import load_config, resolve

    config = console.engine_config(
        model,
        starts=False,
        dtype=dtype,
        device=device if hardware is None else "cuda",
        quantization=quantization,
        quantization_group=quantization_group,
        prefer_kernels=prefer_kernels,
        batch_invariant=batch_invariant,
    )
    with console.clear_errors():
        folder = resolve(config.model, revision, weights=False)
        longest = load_config(folder).max_position_embeddings
    config = msgspec.structs.replace(config, model=str(folder))
    # By name, so that the import checker sees that nothing else of the CLI can reach torch: this is the one command
    # that computes in its own process.
    runner = importlib.import_module("skyline.runner.explain")
    kernels = importlib.import_module("skyline.kernels")
    with console.clear_errors():
        try:
            facts = runner.explain(
                config,
                batch=batch,
                context=min(1024, longest) if context is None else context,
                prefill=min(512, longest) if prefill is None else prefill,
                isa=isa,
                hardware=hardware,
            )
        except (ValueError, kernels.NoKernelError) as error:
            console.fail(str(error))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def _steps(facts: dict[str, Any]) -> dict[str, str]:
    """How they run on a GPU."""
    if facts["other_steps"] is None:
        return {}
    return {
        "decode steps": facts["decode_call_by_call"] or "recorded as CUDA graphs",
        "other steps": facts["other_steps"],
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console()
    summary = Table(show_header=False, box=None, pad_edge=False)
    heads = facts["heads"]
    for name, value in {
        "model": facts["model"],
        "architecture": f"{facts['architecture']}, {facts['layers']} layers, hidden size {facts['hidden_size']:,}, "
        f"{heads['query']} query and {heads['kv']} KV heads of {facts['head_dim']}, {facts['vocab_size']:,} tokens",
        "parameters": f"{facts['parameters']:,}, {_size(facts['parameter_bytes'])} in {facts['dtype']}",
        "KV cache": f"{_size(facts['kv_bytes_per_token'])} a token, "
        f"{_size(facts['kv_bytes_per_request'])} for a context of {facts['max_model_len']:,}",
        **_steps(facts),
        "calls of kernels": f"{facts['launches']['step']} a step, {facts['launches']['layer']} a layer",
        "device": facts["device"] + (f", instruction set {facts['isa']}" if facts["isa"] else ""),
    }.items():
        summary.add_row(f"[bold]{name}[/bold]", value)
    if (gpu := facts["hardware"]) is not None:
        rates = ", ".join(f"{rate / 1e12:,.0f} TFLOP/s in {name}" for name, rate in gpu["flops_per_second"].items())
        value = f"{gpu['name']}, {gpu['bandwidth_bytes_per_second'] / 1e12:,.2f} TB/s, {rates}"
        assumed = "; taken for granted, for there is no GPU here: choose one with --hardware" if gpu["assumed"] else ""
        summary.add_row("[bold]hardware[/bold]", value + assumed)
    out.print(summary)

    if facts["stored"] is not None:
        stored = Table(title=f"Stored weights: {facts['stored']['method']}", title_justify="left")
        for column in ("format", "weights", "in memory"):
            stored.add_column(column, justify="right" if column == "weights" else "left")
        for entry in facts["stored"]["weights"]:
            stored.add_row(entry["format"], str(entry["weights"]), entry["becomes"])
        out.print(stored)

    if len(facts["memory"]) > 1:
        memory = Table(title="Memory of a request", title_justify="left")
        for column in ("kind", "layers", "a token", f"for {facts['max_model_len']:,} tokens"):
            memory.add_column(column, justify="left" if column == "kind" else "right")
        for entry in facts["memory"]:
            kind = entry["kind"] if entry["window"] is None else f"{entry['kind']} of {entry['window']:,}"
            token, whole = _size(entry["bytes_per_token"]), _size(entry["bytes_per_request"])
            memory.add_row(kind, str(entry["layers"]), token, whole)
        out.print(memory)

    launches = facts["launches"]
    fusions = Table(title="Fusions", title_justify="left")
    fusions.add_column("pass")
    fusions.add_column("matches", justify="right")
    for name, matches in facts["fusions"].items():
        fusions.add_row(name, str(matches))
    out.print(fusions)
    out.print(
        f"Calls a layer: {launches['unfused_layer']} -> {launches['layer']}; "
        f"a step: {launches['unfused_step']} -> {launches['step']}"
    )

    if facts["kernel_launches"] is not None:
        out.print(_launches_a_layer(facts))

    ops = Table(title="Kernels", title_justify="left")
    for column in ("op", "kernel", "calls", "why, and why not the others"):
        ops.add_column(column, justify="right" if column == "calls" else "left")
    for op in facts["ops"]:
        others = [f"{other['provider']}: {other['reason']}" for other in op["rejected"]]
        weights = [f"weights: {'; '.join(op['weights'])}"] if op["weights"] else []
        ops.add_row(op["op"], op["provider"], str(op["launches"]), "\n".join([op["reason"], *weights, *others]))
    out.print(ops)

    decode, prefill = facts["steps"]["decode"], facts["steps"]["prefill"]
    requests = f"{decode['requests']} request{'s' if decode['requests'] > 1 else ''} with"
    for name, title in (
        ("decode", f"Decode: one token for {requests} {decode['context']:,} tokens of context"),
        ("prefill", f"Prefill: {prefill['context']:,} tokens of one request"),
    ):
        costs = Table(title=title, title_justify="left")
        costs.add_column("op")
        floors = ("memory", "compute") if gpu else ()
        for column in ("bytes", "FLOPs", "FLOPs a byte", *floors):
            costs.add_column(column, justify="right")
        for op in sorted(facts["ops"], key=lambda op: -int(op[name]["bytes"])):
            costs.add_row(op["op"], *_figures(op[name]))
        costs.add_section()
        costs.add_row("all", *_figures(facts["steps"][name]), style="bold")
        out.print(costs)
        if gpu is not None:
            floor = facts["steps"][name]["floor"]
            moving, computing = _time(floor["memory"]), _time(floor["compute"])
            out.print(
                f"At least {_time(floor['seconds'])} on {gpu['name']}: memory takes {moving}, compute {computing}"
            )


def _launches_a_layer(facts: dict[str, Any]) -> Table:
    """Kernels that a layer's calls launch on a GPU."""
    from rich.table import Table

    table = Table(
        title="Kernel launches a layer",
        title_justify="left",
        caption="At the least: cuBLAS may cut a product in two; sampling and a step's inputs come on top.",
        caption_justify="left",
    )
    steps = facts["kernel_launches"]
    titles = [_of_step(step) for step in steps]
    table.add_column("op")
    for column in ("calls", *titles):
        table.add_column(column, justify="right")
    for op in facts["ops"]:
        if op["launches_per_layer"]:
            launched = (str(step["layer_by_op"][op["op"]]) for step in steps)
            table.add_row(op["op"], str(op["launches_per_layer"]), *launched)
    table.add_section()
    launches = facts["launches"]
    table.add_row("all of a layer", str(launches["layer"]), *(str(step["layer"]) for step in steps), style="bold")
    table.add_row("all of a step", str(launches["step"]), *(str(step["all"]) for step in steps), style="bold")
    return table


def _of_step(step: dict[str, Any]) -> str:
    if step["step"] == "prefill":
        return f"prefill, {step['tokens']:,} tokens"
    return f"decode, {step['requests']:,} request{'s' if step['requests'] > 1 else ''}"


def _figures(cost: dict[str, Any]) -> tuple[str, ...]:
    floor = cost.get("floor", {})
    times = (_time(floor[name]) for name in ("memory", "compute") if floor)
    return _size(cost["bytes"]), _number(cost["flops"]), f"{cost['intensity']:,.1f}", *times


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:,.2f} {unit}"
    return f"{seconds * 1e6:,.2f} µs"


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"


def _number(count: int) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return str(count)
