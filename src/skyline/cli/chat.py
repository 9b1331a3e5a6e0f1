from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyline.cli import console, options

if TYPE_CHECKING:
    import asyncio

    from skyline.engine.sampling_params import SamplingParams
    from skyline.frontend.async_llm import AsyncLLM

_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends. Ctrl-C stops an answer."


def chat(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of one answer.", show_default="what the context holds", rich_help_panel=options.SAMPLING
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.SampleSeed = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    quantization: options.Quantize = None,
    quantization_group: options.QuantizationGroup = 64,
    weight_cache: options.WeightCache = False,
    threads: options.Threads = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
) -> None:
    """Talk with a model in the terminal; with piped input, each line is a turn."""
    config = console.engine_config(
        model,
        dtype=dtype,
        device=device,
        quantization=quantization,
        quantization_group=quantization_group,
        weight_cache=weight_cache,
        threads=threads,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        max_num_seqs=1,  # one conversation: the rest of the memory is its context
    )
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not None} | {"max_tokens": max_tokens}

    import asyncio

    from skyline.cli.stream import load

    # The runner lets Ctrl-C cancel the answer under way; between answers the terminal is read outside the event loop.
    with console.clear_errors(), asyncio.Runner() as runner:
        llm = runner.run(load(config, revision))
        try:
            _converse(runner, llm, system, chosen)
        finally:
            runner.run(llm.close())


def _converse(runner: asyncio.Runner, llm: AsyncLLM, system: str | None, chosen: dict[str, Any]) -> None:
    import msgspec

    from skyline.frontend.errors import InvalidRequestError
    from skyline.llm import with_defaults

    if llm.chat_template is None:
        raise InvalidRequestError("this model has no chat template; use `skyline generate`")
    params = msgspec.structs.replace(with_defaults(llm.generation_defaults), **chosen)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history
        console.note(_HELP)
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            typer.echo(_HELP, err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = runner.run(_answer(llm, messages, params))
                messages.append({"role": "assistant", "content": answer})
            except KeyboardInterrupt:
                if not interactive:
                    raise
                messages.pop()
                typer.echo("\n(stopped)", err=True)
            except InvalidRequestError as error:
                if not interactive:
                    raise
                messages.pop()
                typer.secho(f"{error} (/reset starts over)", fg="red", err=True)


async def _answer(llm: AsyncLLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    from skyline.checkpoint.chat_template import ChatTemplateError
    from skyline.cli.stream import print_answer
    from skyline.frontend.errors import InvalidRequestError

    assert llm.chat_template is not None
    try:
        text = llm.chat_template.render(messages)
    except ChatTemplateError as error:
        raise InvalidRequestError(str(error), "messages") from None
    return await print_answer(llm, await llm.tokenize(text, add_special_tokens=False), params)
