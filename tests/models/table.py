"""The table of docs/models.md: what was compared with what, and how far apart it was.

python -m tests.models.table writes it anew. tests/models/test_table.py checks that every row of it is there and green.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from skyline.checkpoint.config import load_config
from skyline.checkpoint.gguf import materialize
from skyline.engine.sampling_params import SamplingParams
from skyline.models import create_model
from skyline.runner.checkpoint import Checkpoint
from tests.checkpoint.gguf.convert import convert
from tests.models import quantized
from tests.models.families import FAMILIES
from tests.models.harness import CPU, PagedRunner, save_tiny
from tests.oracle.engine import Job, run_engine
from tests.tiny import make_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.models.table -->", "<!-- end of the table -->"
TOLERANCE = 1e-4  # of logits in float32, whose standard deviation is about 1

VOCAB, EOS, NEW_TOKENS = 512, 2, 24
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": dict(
        head_dim=16,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "Mistral": dict(sliding_window=6),
    "Qwen2": {},
    "Qwen3": dict(head_dim=16, tie_word_embeddings=True),
    "Qwen3Moe": dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24),
    **FAMILIES,
}
PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 13, 60)
]


@dataclass(frozen=True)
class Row:
    """One line of the table. `error`: the largest difference of a logit."""

    architecture: str
    format: str
    compared: str
    error: float
    greedy_equal: bool

    @property
    def key(self) -> tuple[str, str, str]:
        return self.architecture, self.format, self.compared

    @property
    def green(self) -> bool:
        return self.error < TOLERANCE and self.greedy_equal

    def line(self) -> str:
        return f"| {' | '.join(self.key)} | {self.error:.0e} | {'yes' if self.greedy_equal else 'no'} |"


def their_tokens(theirs: Any, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        found = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
    generated: list[int] = found[0, len(prompt) :].tolist()
    return generated


def compare(folder: Path, theirs: Any, **settings: Any) -> tuple[float, bool]:
    """Logits of whole prompts in one batch, and what the engine generates greedily in chunks and with others."""
    config = load_config(folder)
    model = create_model(config, torch.float32, CPU)
    with Checkpoint(folder, config) as checkpoint:
        checkpoint.load(model, lambda target, rows: target.copy_(rows))
    ours = PagedRunner(model).step(*((str(index), prompt) for index, prompt in enumerate(PROMPTS)))
    with torch.inference_mode():
        expected = [theirs(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    error = max((a - b).abs().max().item() for a, b in zip(ours, expected, strict=True))
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    jobs = [Job(str(index), prompt, params, arrives=index) for index, prompt in enumerate(PROMPTS)]
    results, _ = run_engine(
        folder,
        jobs,
        dtype="float32",
        quantization="none",
        max_num_seqs=4,
        max_num_batched_tokens=16,
        block_size=8,
        num_kv_blocks=64,
        max_model_len=128,
        **settings,
    )
    equal = all(results[job.name].token_ids == their_tokens(theirs, job.prompt) for job in jobs)
    return error, equal


def plain_rows() -> Iterator[Row]:
    for family, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = save_tiny(folder, family, vocab_size=VOCAB, eos_token_id=EOS, **settings)
            make_tokenizer(folder)
            yield Row(f"{family}ForCausalLM", "safetensors", "transformers", *compare(folder, theirs))


def gguf_rows() -> Iterator[Row]:
    """Weights that the type holds exactly, in transformers' checkpoint and in the file that is made of it."""
    import gguf
    from gguf import GGMLQuantizationType as Type

    sizes = dict(hidden_size=64, intermediate_size=96, vocab_size=VOCAB, eos_token_id=EOS, head_dim=16)
    for family, architecture, kind in (
        ("Qwen3", gguf.MODEL_ARCH.QWEN3, Type.BF16),
        ("Qwen3", gguf.MODEL_ARCH.QWEN3, Type.Q8_0),
        ("Qwen3", gguf.MODEL_ARCH.QWEN3, Type.Q4_0),
        ("Llama", gguf.MODEL_ARCH.LLAMA, Type.Q8_0),
        ("Llama", gguf.MODEL_ARCH.LLAMA, Type.Q4_0),
    ):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = save_tiny(folder, family, **sizes)
            with torch.no_grad():
                for parameter in theirs.parameters():
                    if parameter.dim() == 2:
                        rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)
                        parameter.copy_(torch.from_numpy(rounded))
            theirs.save_pretrained(folder)
            make_tokenizer(folder)
            convert(folder, folder / "tiny.gguf", architecture, lambda _, kind=kind: kind)  # type: ignore[misc]
            with mock.patch("skyline.checkpoint.gguf.folder.cache_folder", return_value=folder / "cache"):
                made = materialize(folder / "tiny.gguf")
            yield Row(f"{family}ForCausalLM", f"GGUF {kind.name}", "transformers", *compare(made, theirs))


def quantized_rows() -> Iterator[Row]:
    sizes = dict(hidden_size=128, intermediate_size=256, head_dim=32)
    for family, format in (
        ("Qwen3", "fp8"),
        ("Qwen3", "nvfp4"),
        ("Qwen3", "mxfp4"),
        ("Qwen3", "int8"),
        ("Qwen3", "int4"),
        ("Llama", "int4"),
        ("Mistral", "fp8"),
    ):
        with _tiny(family, sizes) as (folder, theirs):
            theirs = quantized.compressed(folder, theirs, format)
            name = f"compressed-tensors {format}"
            yield Row(
                f"{family}ForCausalLM", name, "its library, transformers", *compare(folder.parent / "small", theirs)
            )
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    for family in ("DeepseekV3", "DeepseekV32", "Qwen3Moe", "Qwen3_5"):
        with _tiny(family, SETTINGS[family] | {"hidden_size": 160, "intermediate_size": 200}) as (folder, theirs):
            theirs = quantized.rewrite(folder, theirs, quantized.fp8_blocks(128), fp8)
            row = compare(folder.parent / "small", theirs)
            yield Row(f"{family}ForCausalLM", "fp8, blocks of 128x128", "its values, transformers", *row)
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    with _tiny("GptOss", SETTINGS["GptOss"] | {"hidden_size": 64, "intermediate_size": 96}) as (folder, theirs):
        theirs = quantized.rewrite(folder, theirs, quantized.mxfp4_experts, mxfp4)
        row = compare(folder.parent / "small", theirs)
        yield Row("GptOssForCausalLM", "mxfp4", "its values, transformers", *row)


@contextlib.contextmanager
def _tiny(family: str, settings: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "plain"
        theirs = save_tiny(folder, family, vocab_size=VOCAB, eos_token_id=EOS, **settings)
        make_tokenizer(folder)
        yield folder, theirs


def rows() -> Iterator[Row]:
    yield from plain_rows()
    yield from gguf_rows()
    yield from quantized_rows()


HEADER = [
    "| architecture | format | compared with | largest logit error | greedy tokens equal |",
    "|---|---|---|---|---|",
]


def table(found: list[Row]) -> str:
    return "\n".join([*HEADER, *(row.line() for row in found)])


def documented() -> list[str]:
    """The table's lines in the document, without the header."""
    text = DOCUMENT.read_text("utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[len(HEADER) :]


def main() -> None:
    found = list(rows())
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}", "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
