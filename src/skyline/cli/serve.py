from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from skyline.cli import console, options

if TYPE_CHECKING:
    from skyline.engine.messages import EngineReady

DEMO_NAME = "skyline-demo"
# In the words that the demonstration model was trained on; a test holds it to the right answer.
EXAMPLE = "Tom has 12 apples, gives half of them to a friend and then finds 7 more. How many apples does Tom have now?"
_HTTP, _FORMATS = "HTTP", "Chat formats"


def serve(
    model: options.Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.", rich_help_panel=_HTTP)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.", rich_help_panel=_HTTP)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that requests must carry. May be repeated.",
            envvar="SKYLINE_API_KEY",
            show_default="none is needed",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the model in the API. May be repeated.", show_default="MODEL", rich_help_panel=_HTTP
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web origin that browsers may call from (CORS). May be repeated.", rich_help_panel=_HTTP),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Serve the admin routes on this port of 127.0.0.1.",
            show_default="no admin routes",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_queued: Annotated[
        int,
        typer.Option(
            min=1, help="Sequences under way at once, running and waiting; more are refused.", rich_help_panel=_HTTP
        ),
    ] = 4096,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that running requests get after SIGTERM.", rich_help_panel=_HTTP),
    ] = 30.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="How much to log.", rich_help_panel=_HTTP)
    ] = "info",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    load_format: options.Format = "auto",
    quantization: options.Quantize = None,
    quantization_group: options.QuantizationGroup = 64,
    weight_cache: options.WeightCache = False,
    threads: options.Threads = None,
    prefer_kernels: options.PreferKernels = None,
    batch_invariant: options.BatchInvariant = False,
    seed: Annotated[int, typer.Option(help="For requests that bring no seed.", rich_help_panel=options.MODEL)] = 0,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests that run at once.", rich_help_panel=options.MEMORY)
    ] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in one step, of all requests.", rich_help_panel=options.MEMORY)
    ] = 2048,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
    num_kv_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="KV blocks; goes before --kv-cache-memory.",
            show_default="fitted",
            rich_help_panel=options.MEMORY,
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a KV block.", rich_help_panel=options.MEMORY)] = 16,
    memory_fraction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the free memory for the KV cache.",
            show_default="0.5 on a CPU, 0.9 on a GPU",
            rich_help_panel=options.MEMORY,
        ),
    ] = None,
    no_prefix_caching: Annotated[
        bool,
        typer.Option("--no-prefix-caching", help="Compute every prompt anew.", rich_help_panel=options.MEMORY),
    ] = False,
    sync_scheduling: Annotated[
        bool,
        typer.Option(
            "--sync-scheduling", help="Plan a step only after the one before.", rich_help_panel=options.MEMORY
        ),
    ] = False,
    no_cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--no-cuda-graphs",
            help="On a GPU, launch every kernel of a step anew.",
            rich_help_panel=options.MEMORY,
        ),
    ] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Jinja file to use instead of the checkpoint's template.",
            rich_help_panel=_FORMATS,
        ),
    ] = None,
    tool_call_parser: Annotated[
        str, typer.Option(help="auto, none or the name of a format.", rich_help_panel=_FORMATS)
    ] = "auto",
    reasoning_parser: Annotated[
        str, typer.Option(help="auto, none or the name of a format.", rich_help_panel=_FORMATS)
    ] = "auto",
) -> None:
    """Serve a model over HTTP: the OpenAI API, streaming, tools, structured output, metrics."""
    level = log_level.upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    os.environ["SKYLINE_LOG_LEVEL"] = level  # the engine process inherits it
    config = console.engine_config(
        model,
        dtype=dtype,
        device=device,
        load_format=load_format,
        quantization=quantization,
        quantization_group=quantization_group,
        weight_cache=weight_cache,
        threads=threads,
        prefer_kernels=prefer_kernels,
        batch_invariant=batch_invariant,
        seed=seed,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
        memory_fraction=memory_fraction,
        enable_prefix_caching=not no_prefix_caching,
        async_scheduling=not sync_scheduling,
        cuda_graphs=not no_cuda_graphs,
    )
    from skyline.server.options import ServerOptions
    from skyline.server.run import ServerStartError, run_server

    server = ServerOptions(
        host=host,
        port=port,
        admin_port=admin_port,
        api_keys=api_key or [],
        allowed_origins=allowed_origin or [],
        served_model_names=served_model_name or [],
        max_queued=max_queued,
        drain_timeout=drain_timeout,
        chat_template=None if chat_template is None else chat_template.read_text("utf-8"),
        tool_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        access_log=log_level == "debug",
    )
    try:
        server.validate()
    except ValueError as error:
        console.fail(str(error))
    if host not in ("127.0.0.1", "::1", "localhost") and not server.api_keys:
        typer.secho(
            "warning: whoever reaches this address can use the server; consider --api-key", fg="yellow", err=True
        )
    name = model or DEMO_NAME
    startup = _StartUp(name, needs_key=bool(server.api_keys))
    with console.clear_errors():
        try:
            run_server(
                config,
                server,
                model_name=name,
                revision=revision,
                on_listening=startup.listening,
                on_ready=startup.ready,
            )
        except ServerStartError as error:
            console.fail(str(error))


class _StartUp:
    """Says what was decided, and how to try it."""

    def __init__(self, name: str, needs_key: bool) -> None:
        self._name = name
        self._needs_key = needs_key
        self._address = ""

    def listening(self, host: str, port: int) -> None:
        # An address of every network is none that a client could connect to.
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        self._address = f"http://{host}:{port}"

    def ready(self, ready: EngineReady, seconds: float) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console.log_engine_errors(True)
        table = Table(show_header=False, box=None, pad_edge=False)
        rows = {"model": self._name, **ready.report}
        rows["ready"] = f"{_process_age(seconds):.2f} s after the process started, at {self._address}"
        for name, value in rows.items():
            # Text: brackets in a path are no markup.
            table.add_row(Text(name, style="bold"), Text(value))
        out = Console(stderr=True)
        out.print(table)
        body = json.dumps({"messages": [{"role": "user", "content": EXAMPLE}]})
        key = ' -H "Authorization: Bearer $SKYLINE_API_KEY"' if self._needs_key else ""
        # Neither wrapped nor indented, so that it can be copied.
        typer.echo(
            f"\ncurl {self._address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n  -d '{body}'\n",
            err=True,
        )


def _process_age(fallback: float) -> float:
    """Seconds since this process was started, Python's own start included."""
    try:
        # Field 22, counted after the command's name, which may hold spaces: start in clock ticks since boot.
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return fallback
