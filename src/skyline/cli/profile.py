from __future__ import annotations

import importlib
import json
from typing import Annotated, Any

import typer

from skyline.cli import console, options

_STEPS = "Steps"
_PARTS = {
    "kernels": "kernels",
    "python": "Python between kernels",
    "sampling": "sampling",
    "preparation": "preparing batches",
    "idle": "idle before the step",
}


def profile(
    model: options.Model = None,
    machine: Annotated[
        bool, typer.Option("--machine", help="Measure this machine; without MODEL, nothing else.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Requests in a decode step.", rich_help_panel=_STEPS)] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that each of them has.",
            show_default="256, or what the model's context allows",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in a prefill step.",
            show_default="512, or what the model's context allows",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Steps of each kind; the median counts.", rich_help_panel=_STEPS)
    ] = 5,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 is greedy.", rich_help_panel=_STEPS)] = 0.0,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    load_format: options.Format = "auto",
    quantization: options.Quantize = None,
    quantization_group: options.QuantizationGroup = 64,
    weight_cache: options.WeightCache = False,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time every op of real steps on this CPU, against what its memory and its arithmetic can do at most."""
    import msgspec

    # By name, so that the import checker sees that nothing else of the CLI can reach torch.
    if machine and model is None:
        measured = importlib.import_module("skyline.kernels.cpu.machine").measure(threads)
        facts = msgspec.to_builtins(measured)
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        else:
            _show_machine(facts)
        return

    from skyline.checkpoint import load_config, resolve

    config = console.engine_config(
        model,
        starts=False,
        dtype=dtype,
        load_format=load_format,
        quantization=quantization,
        quantization_group=quantization_group,
        weight_cache=weight_cache,
        kv_cache_dtype=kv_cache_dtype,
        threads=threads,
    )
    with console.clear_errors():
        folder = resolve(config.model, revision)
        longest = load_config(folder).max_position_embeddings
    config = msgspec.structs.replace(config, model=str(folder))
    room = max(1, longest - 2 * (steps + 2) - 4 - batch)
    context = min(256, room) if context is None else context
    prefill = min(512, longest - 2) if prefill is None else prefill
    if max(context - room, prefill - longest + 2) > 0:
        console.fail(
            f"the model's context of {longest} tokens leaves room for {room} of context and {longest - 2} of prefill"
        )
    runner = importlib.import_module("skyline.runner.profile")
    memory = importlib.import_module("skyline.runner.memory")
    machines = importlib.import_module("skyline.kernels.cpu.machine")
    with console.clear_errors():
        try:
            limits = machines.measure(threads) if machine else machines.load_or_measure(threads)
            facts = runner.profile(
                config, limits, batch=batch, context=context, prefill=prefill, steps=steps, temperature=temperature
            )
        except (ValueError, memory.OutOfMemoryError) as error:
            console.fail(str(error))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console()
    _show_machine(facts["machine"])
    for name, step in facts["steps"].items():
        what = (
            f"{step['tokens']:,} tokens of one request"
            if name == "prefill"
            else f"{step['requests']:,} x 1 token, {step['context']:,} of context"
        )
        title = (
            f"{name.capitalize()}: {what}; {step['step_us']:,.0f} us a step. Without timing, as it is served: "
            f"{step['plain_us']:,.0f} us, {step['outside_us'] / step['plain_us']:.1%} of it beside the model's calls"
        )
        ops = Table(title=title, title_justify="left")
        ops.add_column("op")
        ops.add_column("shape")
        for column in ("calls", "us", "us a call", "GB/s", "GFLOP/s", "roofline", "step"):
            ops.add_column(column, justify="right")
        for op in step["ops"]:
            ops.add_row(
                op["op"],
                op["shape"],
                str(op["calls"]),
                f"{op['us']:,.0f}",
                f"{op['us_per_call']:,.1f}",
                f"{op['gb_per_s']:,.1f}",
                f"{op['gflop_per_s']:,.1f}",
                f"{op['roofline']:.0%}",
                f"{op['share']:.1%}",
            )
        ops.add_section()
        for part, us in step["parts_us"].items():
            ops.add_row(_PARTS[part], "", "", f"{us:,.0f}", "", "", "", "", f"{us / step['step_us']:.1%}", style="bold")
        out.print(ops)
    out.print("roofline: the least time that memory or arithmetic allows; above 100% the caches held what was read")


def _show_machine(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console()
    out.print(f"{facts['cpu']}, instruction set {facts['isa']}, {facts['threads']} threads", highlight=False)
    out.print(
        f"Memory is read at {facts['bandwidth'] / 1e9:,.1f} GB/s, "
        f"by one thread at {facts['bandwidth_one_thread'] / 1e9:,.1f} GB/s",
        highlight=False,
    )
    table = Table(title="Arithmetic, in 10^9 operations a second", title_justify="left")
    for column in ("format", "instruction", "in registers", "one thread", "our product", "torch's product"):
        table.add_column(column, justify="left" if column in ("format", "instruction") else "right")
    for name, peak in facts["peaks"].items():
        rates = (peak[rate] for rate in ("register", "register_one_thread", "product", "torch"))
        table.add_row(name, peak["instruction"], *("" if rate is None else f"{rate / 1e9:,.0f}" for rate in rates))
    out.print(table)
