from __future__ import annotations

from typing import Annotated, Literal

import typer

from skyline.cli import console


def evaluate(
    context: typer.Context,
    suite: Annotated[Literal["demo"], typer.Argument(help="demo: the embedded model's held-out word problems.")],
    url: Annotated[
        str | None, typer.Option(help="A server that runs already.", show_default="start one and stop it afterwards")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.", show_default="the server's first")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of that server.", envvar="SKYLINE_API_KEY")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems.", show_default="all")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    at_least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with code 1 if the exact match is lower.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure answers through the HTTP server: the share that is exactly right.

    Options after -- are given to the server that is started, to measure the accuracy of other settings.
    """
    import asyncio
    import contextlib
    import dataclasses
    import json

    from skyline.cli.temporary_server import temporary_server
    from skyline.demo.evaluate import EvaluationError
    from skyline.demo.evaluate import evaluate as measure

    if url is not None and context.args:
        console.fail("options after -- are for a server that is started here; leave them out, or leave out --url")
    if url is None:
        console.model_or_demo(None)  # says what it is, and that it is there
    with console.clear_errors(), contextlib.nullcontext(url) if url else temporary_server(context.args) as base_url:
        try:
            result = asyncio.run(measure(base_url, model, limit=limit, concurrency=concurrency, api_key=api_key))
        except EvaluationError as error:
            console.fail(str(error))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        typer.echo(
            f"exact match {result.exact_match:.1%} ± {result.standard_error:.1%} ({result.correct} of {result.total}), "
            f"{result.output_tokens:,} tokens in {result.seconds:.1f} s"
        )
        for failure in result.failures[:3]:
            typer.echo(f"\nwrong: {failure.question}\nexpected {failure.expected}, got: {failure.got}")
    if at_least is not None and result.exact_match < at_least:
        console.fail(f"the exact match is {result.exact_match:.3f}, below {at_least}")
