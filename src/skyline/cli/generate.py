from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyline.cli import console, options

if TYPE_CHECKING:
    from skyline.engine.config import EngineConfig

DEFAULT_MAX_TOKENS = 256


def generate(
    model: options.Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue.", show_default="standard input")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=str(DEFAULT_MAX_TOKENS),
            rich_help_panel=options.SAMPLING,
            help="Tokens to generate at most.",
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.SampleSeed = None,
    stop: options.Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.", rich_help_panel=options.SAMPLING)
    ] = False,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    load_format: options.Format = "auto",
    quantization: options.Quantize = None,
    quantization_group: options.QuantizationGroup = 64,
    weight_cache: options.WeightCache = False,
    threads: options.Threads = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
) -> None:
    """Continue a text, streaming to standard output."""
    import asyncio

    config = console.engine_config(
        model,
        dtype=dtype,
        device=device,
        load_format=load_format,
        quantization=quantization,
        quantization_group=quantization_group,
        weight_cache=weight_cache,
        threads=threads,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        max_num_seqs=1,  # one request: the rest of the memory is its context
    )
    if prompt is None:
        if sys.stdin.isatty():
            console.note("Type the prompt, then Ctrl-D.")
        prompt = sys.stdin.read()
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "max_tokens": max_tokens}
    chosen = {name: value for name, value in given.items() if value is not None}
    with console.clear_errors():
        asyncio.run(_generate(config, revision, prompt, {**chosen, "stop": stop or [], "ignore_eos": ignore_eos}))


async def _generate(config: EngineConfig, revision: str | None, prompt: str, chosen: dict[str, Any]) -> None:
    import msgspec

    from skyline.cli.stream import loaded, print_answer
    from skyline.llm import with_defaults

    async with loaded(config, revision) as llm:
        ids = await llm.tokenize(prompt)
        defaults = with_defaults(llm.generation_defaults)
        defaults.max_tokens = max(1, min(DEFAULT_MAX_TOKENS, llm.max_model_len - len(ids)))
        await print_answer(llm, ids, msgspec.structs.replace(defaults, **chosen))
