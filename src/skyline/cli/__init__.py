"""The `skyline` command: one file a subcommand.

Whatever takes time to import is imported inside the functions that need it, so that `skyline --help` is instant.
"""

from __future__ import annotations

import os
import sys

import typer

from skyline.cli.bench import bench as bench_app
from skyline.cli.chat import chat
from skyline.cli.evaluate import evaluate
from skyline.cli.examples import examples
from skyline.cli.explain import explain
from skyline.cli.generate import generate
from skyline.cli.kernels import kernels
from skyline.cli.profile import profile
from skyline.cli.quantize import quantize
from skyline.cli.serve import serve
from skyline.cli.tune import tune
from skyline.cli.version import version

app = typer.Typer(
    name="skyline",
    help="LLM inference at the Pareto frontier of throughput and interactivity.\n\n"
    "Without MODEL, commands use the small demonstration model that comes with the package.",
    epilog="Start with [bold]skyline serve[/bold], or with a model of the Hugging Face hub: "
    "[bold]skyline serve Qwen/Qwen3-0.6B[/bold]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback, which a report can quote in full
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command(
    epilog=examples(
        "skyline serve",
        "skyline serve Qwen/Qwen3-0.6B --port 9000 --api-key secret",
        "skyline serve ./my-model --device cuda --max-model-len 8192 --kv-cache-memory 4GiB",
    )
)(serve)
app.command(
    epilog=examples(
        'skyline generate Qwen/Qwen3-0.6B-Base --prompt "Once upon a time" --temperature 0',
        "cat prompt.txt | skyline generate Qwen/Qwen3-0.6B-Base --max-tokens 500",
    )
)(generate)
app.command(
    epilog=examples(
        "skyline chat",
        'skyline chat Qwen/Qwen3-0.6B --system "Answer in one sentence."',
        'echo "What is 17 plus 25?" | skyline chat',
    )
)(chat)
app.command(
    epilog=examples(
        "skyline explain",
        "skyline explain Qwen/Qwen3-0.6B --device cuda --batch 64 --context 4096",
        "skyline explain --json",
    )
)(explain)
app.command(
    epilog=examples(
        "skyline profile --machine",
        "skyline profile Qwen/Qwen3-0.6B --batch 32 --context 1024",
        "skyline profile --quantization int8 --json",
    )
)(profile)
app.command(
    epilog=examples(
        "skyline tune Qwen/Qwen3-0.6B",
        "skyline tune Qwen/Qwen3-0.6B --quantization int4 --budget 30",
    )
)(tune)
app.command(
    epilog=examples(
        "skyline quantize Qwen/Qwen3-0.6B ./qwen3-int4 --format int4",
        "skyline quantize ./my-model ./my-model-fp8 --format fp8",
    )
)(quantize)
app.command(
    "eval",
    epilog=examples(
        "skyline eval demo",
        "skyline eval demo --json --at-least 0.9",
        "skyline eval demo -- --dtype float32 --batch-invariant",
    ),
    # What follows "--" belongs to `skyline serve`.
    context_settings={"allow_extra_args": True},
)(evaluate)
app.command(epilog=examples("skyline kernels", "skyline kernels --build"))(kernels)
app.add_typer(bench_app, name="bench")
app.command()(version)


def main() -> None:
    try:
        app()
    except BrokenPipeError:
        # The reader has gone, as in `skyline ... | head`. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
