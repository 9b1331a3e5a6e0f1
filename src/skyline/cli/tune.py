from __future__ import annotations

import importlib
import json
from typing import Annotated, Any

import typer

from skyline.cli import console, options


def tune(
    model: options.Model = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds; what is left then keeps its default.")] = 120.0,
    rows: Annotated[
        int, typer.Option(min=1, help="The most tokens of a step to measure for; on a GPU, requests.")
    ] = 2048,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    load_format: options.Format = "auto",
    quantization: options.Quantize = None,
    quantization_group: options.QuantizationGroup = 64,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    kv_cache_dtype: options.KVCacheDtype = "auto",
    prefer_kernels: options.PreferKernels = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time what kernels can choose from, on a model's weights; later starts use the fastest.

    On a CPU that are the tactics of each product; on a GPU settings of decode steps, for numbers of requests up to 256,
    and with --prefer-kernels flashinfer what that library's own autotuner times.
    """
    import msgspec

    from skyline.checkpoint import resolve

    on_gpu = device.startswith("cuda")
    if kv_cache_dtype != "auto" and not on_gpu:
        console.fail("--kv-cache-dtype plays no part in what is measured on a CPU; leave it out")
    config = console.engine_config(
        model,
        starts=False,
        dtype=dtype,
        load_format=load_format,
        quantization=quantization,
        quantization_group=quantization_group,
        threads=threads,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        prefer_kernels=prefer_kernels,
    )
    # By name, so that the import checker sees that nothing else of the CLI can reach torch.
    tuner = importlib.import_module("skyline.runner.tune_gpu" if on_gpu else "skyline.runner.tune")
    memory = importlib.import_module("skyline.runner.memory")
    with console.clear_errors():
        try:
            config = msgspec.structs.replace(config, model=str(resolve(config.model, revision)))
            facts = tuner.tune(config, budget, rows)
        except (ValueError, memory.OutOfMemoryError) as error:
            console.fail(str(error))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif on_gpu:
        _show_steps(facts)
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out, table = Console(), Table(title="Products whose default is not the fastest", title_justify="left")
    table.add_column("place")
    table.add_column("tactic")
    for column in ("default, us", "us"):
        table.add_column(column, justify="right")
    for place in facts["places"]:
        if place["seconds"] < place["default_s"]:
            tactic = ", ".join(f"{name} {value}" for name, value in place["tactic"].items())
            table.add_row(place["place"], tactic, f"{place['default_s'] * 1e6:,.0f}", f"{place['seconds'] * 1e6:,.0f}")
    out.print(table)
    left = f"; {facts['left']} left for want of time" if facts["left"] else ""
    out.print(f"{len(facts['places'])} measured{left}; kept in {facts['file']}", highlight=False, soft_wrap=True)


def _show_steps(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"Decode steps with contexts of {facts['context']:,} tokens"
    out, table = Console(), Table(title=title, title_justify="left")
    for column in ("requests", "default, ms", "ms"):
        table.add_column(column, justify="right")
    table.add_column("settings")
    for row in facts["sizes"]:
        settings = ", ".join(f"{name} {value}" for name, value in row["knobs"].items())
        table.add_row(str(row["requests"]), f"{row['default_s'] * 1e3:.3f}", f"{row['seconds'] * 1e3:.3f}", settings)
    out.print(table)
    files = facts["file"] if facts["flashinfer"] is None else f"{facts['file']} and {facts['flashinfer']}"
    out.print(f"kept in {files}", highlight=False, soft_wrap=True)
