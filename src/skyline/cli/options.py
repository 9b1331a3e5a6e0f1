"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from skyline.engine.config import DType, KVCacheDType, LoadFormat, Provider, Quantization

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate(("k", "m", "g", "t"), start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """ "4GiB" is 4 * 2**30, "4GB" and "4G" are 4 * 10**9, "4096" are bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 4GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


MODEL, MEMORY, SAMPLING = "Model", "Memory and batching", "Sampling"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A folder with a Hugging Face checkpoint, or a hub id such as Qwen/Qwen3-0.6B.",
        show_default="the embedded demonstration model",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the hub repository.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    DType,
    typer.Option("--dtype", help="Type of weights and activations; auto: as stored.", rich_help_panel=MODEL),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=MODEL)]
Format = Annotated[
    LoadFormat, typer.Option("--load-format", help="dummy: random weights, to measure speed.", rich_help_panel=MODEL)
]
Quantize = Annotated[
    Quantization | None,
    typer.Option(
        "--quantization",
        help="Weights of linear layers in fewer bits; int8, and on CPUs int4, take activations to int8, too.",
        show_default="none",
        rich_help_panel=MODEL,
    ),
]
QuantizationGroup = Annotated[
    int,
    typer.Option(help="Weights that share an int4 scale: 32, 64 or 128.", rich_help_panel=MODEL),
]
WeightCache = Annotated[
    bool,
    typer.Option(
        "--weight-cache",
        help="Keep the weights on disk, packed and quantized, for faster starts on this CPU.",
        rich_help_panel=MODEL,
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Compute threads.", show_default="all usable cores", rich_help_panel=MODEL)
]
PreferKernels = Annotated[
    Provider | None,
    typer.Option(
        "--prefer-kernels",
        help="Whose kernels go first wherever they support the case.",
        show_default="the usual order",
        rich_help_panel=MODEL,
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="The same request gives the same bits whatever else is in the batch.",
        rich_help_panel=MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of prompt and output together.",
        show_default="the checkpoint's, fitted to the memory",
        rich_help_panel=MEMORY,
    ),
]
KVCacheDtype = Annotated[
    KVCacheDType,
    typer.Option(
        "--kv-cache-dtype",
        help="Type of cached keys and values, or latents; auto: that of the activations. On a CPU torch computes fp8.",
        rich_help_panel=MEMORY,
    ),
]
KVCacheMemory = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes, metavar="SIZE", help="Memory of the KV cache, such as 4GiB.", rich_help_panel=MEMORY
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="0 is greedy.", show_default="the checkpoint's", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Nucleus sampling.", show_default="the checkpoint's", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Only the K most likely tokens.", show_default="the checkpoint's", rich_help_panel=SAMPLING),
]
SampleSeed = Annotated[
    int | None, typer.Option("--seed", help="Makes sampling reproducible.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the output. May be repeated.", rich_help_panel=SAMPLING)
]
