"""The weights of GGUF files under their Hugging Face names, against the checkpoints that they were converted from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

from skyline.checkpoint import CheckpointError
from skyline.checkpoint.config import load_config
from skyline.checkpoint.gguf import materialize
from skyline.checkpoint.weights import load
from skyline.models import create_model, destinations, ignorable
from skyline.ops import Fp4Weight, QuantizedWeight
from skyline.ops.quantized import ByteRows
from skyline.quantization.formats.gguf import GGUFWeights
from skyline.quantization.formats.stored import IntegerFormat
from tests.checkpoint.gguf.convert import convert, finish, random_blocks
from tests.models.harness import PagedRunner, save_tiny
from tests.tiny import make_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS: dict[str, tuple[str, MODEL_ARCH, dict[str, Any]]] = {
    "llama": ("Llama", MODEL_ARCH.LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", MODEL_ARCH.QWEN2, {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", MODEL_ARCH.QWEN3, {}),
    "qwen3moe": ("Qwen3Moe", MODEL_ARCH.QWEN3MOE, MOE),
    "glm4moe": (
        "Glm4Moe",
        MODEL_ARCH.GLM4_MOE,
        {"n_routed_experts": 3, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True},
    ),
    "minimax-m2": (
        "MiniMaxM2",
        MODEL_ARCH.MINIMAXM2,
        {"num_local_experts": 3, "num_experts_per_tok": 2, "rope_parameters": HALF},
    ),
    "gpt-oss": ("GptOss", MODEL_ARCH.GPT_OSS, {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma3": (
        "Gemma3",
        MODEL_ARCH.GEMMA3,
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
}


def made(
    folder: Path, model: str, kind: Callable[[str], Type], settings: dict[str, Any] | None = None, **keys: Any
) -> tuple[GGUFWeights, dict[str, Any]]:
    """The weights of a tiny model as GGUF, and the tensors of the checkpoint."""
    family, architecture, usual = MODELS[model]
    save_tiny(folder / "original", family, **{**SIZES, **usual, **(settings or {})})
    (folder / "made").mkdir()
    convert(folder / "original", folder / "made" / "model.gguf", architecture, kind, **keys)
    return GGUFWeights(folder / "made"), load_file(folder / "original" / "model.safetensors")


def value(weights: GGUFWeights, name: str) -> torch.Tensor:
    if name in weights:
        assert name not in weights.stored
        tensor = weights.get(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (weights.dtype(name), weights.shape(name))
        return tensor.float()
    stored = weights.stored[name]
    whole = stored.read(0, stored.shape[0])
    assert whole.dtype == torch.float32 and tuple(whole.shape) == stored.shape
    first, last = 1, stored.shape[0] - 1
    assert first < last
    assert torch.equal(stored.read(first, last), whole[first:last])
    assert stored.read(2, 2).shape == (0, *stored.shape[1:])
    return whole


@pytest.mark.parametrize("model", MODELS)
def test_plain_weights_are_those_of_the_checkpoint(tmp_path: Path, model: str) -> None:
    weights, expected = made(tmp_path, model, lambda name: Type.F32)
    assert {*weights, *weights.stored} == set(expected)
    for name, tensor in expected.items():
        # Gemma's norms had one added, which rounds.
        torch.testing.assert_close(value(weights, name), tensor, rtol=0.0, atol=1e-7 if model == "gemma3" else 0.0)
    # Only matrices that have to be put into another order are not plain.
    moved = {"llama": ("q_proj.weight", "k_proj.weight"), "gpt-oss": ("gate_up_proj", "down_proj")}.get(model, ())
    assert all(name.endswith(moved) for name in weights.stored) and bool(weights.stored) == bool(moved)
    assert len(weights) == len(expected) - len(weights.stored)


@pytest.mark.parametrize("model", ["llama", "qwen3moe"])
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0])
def test_every_type_in_a_model(tmp_path: Path, model: str, kind: Type) -> None:
    weights, expected = made(tmp_path, model, lambda name: kind)
    assert {*weights, *weights.stored} == set(expected)
    for name, tensor in expected.items():
        if tensor.dim() > 1 and "mlp.gate.weight" not in name:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
            assert torch.equal(value(weights, name), torch.from_numpy(rounded)), name
        else:
            assert torch.equal(value(weights, name), tensor), name


def test_what_is_said_of_a_weight(tmp_path: Path) -> None:
    kinds = {"token_embd.weight": Type.Q8_0, "blk.0.attn_k.weight": Type.BF16, "blk.0.ffn_up.weight": Type.F16}
    weights, _ = made(tmp_path, "llama", lambda name: kinds.get(name, Type.Q4_0))
    q = weights.stored["model.layers.0.self_attn.q_proj.weight"]
    assert (q.shape, q.parts, q.format) == ((64, 64), ("blk.0.attn_q.weight",), "GGUF Q4_0")
    assert not q.exact and q.integers == IntegerFormat(bits=4, group=32)
    k = weights.stored["model.layers.0.self_attn.k_proj.weight"]
    assert (k.format, k.exact, k.integers) == ("GGUF BF16", True, None)
    embedding = weights.stored["model.embed_tokens.weight"]
    assert not embedding.exact and embedding.shape == (97, 64)
    assert embedding.integers == IntegerFormat(bits=8, group=32, widened=True)
    assert weights.dtype("model.layers.0.mlp.up_proj.weight") == torch.float16
    with pytest.raises(CheckpointError, match=r"no plain tensor named 'model\.embed_tokens"):
        weights.get("model.embed_tokens.weight")


class AllPlain:
    """The weights as the loader takes them, the stored ones dequantized."""

    def __init__(self, weights: GGUFWeights) -> None:
        self.folder = weights.folder
        self.tensors = {name: weights.get(name) for name in weights}
        self.tensors |= {name: stored.read(0, stored.shape[0]) for name, stored in weights.stored.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()  # what is loaded may be given back to the system


# What config.json says and the configuration of a tiny model does not.
KEYS: dict[str, dict[str, Any]] = {
    "glm4moe": {"leading_dense_block_count": 1, "expert_shared_count": 1, "rope.dimension_count": 8},
    "minimax-m2": {"rope.dimension_count": 8},
    "gemma3": {"attention.sliding_window_pattern": 2},
    "gpt-oss": {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096},
}


@pytest.mark.parametrize("model", MODELS)
def test_our_model_of_the_file_computes_what_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("SKYLINE_CACHE", str(tmp_path / "cache"))
    family, architecture, settings = MODELS[model]
    theirs = save_tiny(tmp_path, family, **{**SIZES, "vocab_size": 512, **settings})
    make_tokenizer(tmp_path)
    convert(tmp_path, tmp_path / "m.gguf", architecture, **KEYS.get(model, {}))
    folder = materialize(tmp_path / "m.gguf")
    ours = create_model(load_config(folder), torch.float32, "cpu")
    load(AllPlain(GGUFWeights(folder)), destinations(ours), ignore=ignorable(ours))
    tokens = torch.randint(0, 512, (11,), generator=torch.Generator().manual_seed(0))
    (logits,) = PagedRunner(ours).step(("a", tokens.tolist()))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.MXFP4, Type.BF16])
def test_experts_that_are_joined_in_the_checkpoint(tmp_path: Path, kind: Type) -> None:
    weights, expected = made(tmp_path, "gpt-oss", lambda name: kind if "_exps" in name else Type.F32)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for name in (f"{experts}.gate_up_proj", f"{experts}.down_proj"):
            # Rounded along the inputs, which are last in the file.
            turned = np.ascontiguousarray(expected[name].numpy().swapaxes(1, 2))
            rounded = gguf.quants.dequantize(gguf.quants.quantize(turned, kind), kind).swapaxes(1, 2)
            assert torch.equal(value(weights, name), torch.from_numpy(np.ascontiguousarray(rounded)))
            stored = weights.stored[name]
            assert stored.exact == (kind != Type.Q8_0) and (stored.integers is None) == (kind != Type.MXFP4)
            if stored.integers is not None:  # of the matrices as they lie in the file: the later ones, then all
                for start in (1, 0):
                    fp4 = stored.levels(start, 3).dequantize().view(3 - start, turned.shape[1], -1)
                    assert torch.equal(fp4.transpose(1, 2), value(weights, name)[start:])
    joined = weights.stored["model.layers.1.mlp.experts.gate_up_proj"]
    assert joined.parts == ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    assert joined.format == f"GGUF {kind.name}" and joined.shape == (3, 64, 192)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_the_levels_of_q4_0_are_the_weight(tmp_path: Path, name: str) -> None:
    """Also where rows are in another order."""
    weights, _ = made(tmp_path, "llama", lambda name: Type.Q4_0)
    stored = weights.stored[f"model.layers.1.{name}.weight"]
    levels = stored.levels(3, 60)
    assert levels.values.dtype == torch.int8 and levels.scales.dtype == torch.float16 and levels.zeros is None
    assert levels.group == 32 and levels.scales.shape == (57, stored.shape[1] // 32)
    assert torch.equal(levels.dequantize(), stored.read(3, 60))


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q5_K, Type.Q6_K])
def test_other_levels_are_bytes(tmp_path: Path, kind: Type) -> None:
    data = random_blocks((50, 512), kind) if kind.name.endswith("K") else some_of(kind)
    stored = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, kind)}).stored["model.layers.1.mlp.up_proj.weight"]
    rows, is_k = stored.levels(3, 50), kind.name.endswith("K")
    assert isinstance(rows, ByteRows)
    assert stored.integers == IntegerFormat(
        6 if kind == Type.Q6_K else 8, 16 if is_k else 32, rows.offsets is not None, widened=True, blocks=is_k
    )
    assert torch.equal(rows.dequantize(), stored.read(3, 50))


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q4_K])
def test_four_bits_with_minima_get_zero_points(tmp_path: Path, kind: Type) -> None:
    """Within what rounding scales and zero points to float16 does."""
    data = random_blocks((50, 512), kind) if kind == Type.Q4_K else some_of(kind)
    stored = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, kind)}).stored["model.layers.1.mlp.up_proj.weight"]
    assert stored.integers == IntegerFormat(4, 32, zeros=True, blocks=kind == Type.Q4_K)
    assert torch.equal(stored.as_bytes(3, 50).dequantize(), stored.read(3, 50))
    rows, wanted = stored.levels(3, 50), stored.read(3, 50)
    assert isinstance(rows, QuantizedWeight) and rows.zeros is not None
    assert rows.values.min() == 0 and rows.values.max() == 15
    assert (rows.dequantize() - wanted).abs().max() < 2**-10 * wanted.abs().max()


@pytest.mark.parametrize("scale,minimum", [(0.0, 0.5), (1e-7, 0.5), (0.0, 0.0), (1e-5, -3.0)])
def test_groups_of_next_to_one_value(tmp_path: Path, scale: float, minimum: float) -> None:
    """Where no zero point is a number of float16."""
    data = some_of(Type.Q4_1).reshape(-1, 20)
    data[::3, :4] = np.array([scale, minimum], np.float16).view(np.uint8)
    data = data.reshape(50, -1)
    stored = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, Type.Q4_1)}).stored["model.layers.1.mlp.up_proj.weight"]
    found, wanted = stored.levels(0, 50).dequantize(), stored.read(0, 50)
    assert bool(found.isfinite().all()) and (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    """Each of their parts is a number of it."""
    data = random_blocks((4, 512), Type.Q4_K)
    data.reshape(-1, 144)[1, :4] = np.array([6e4, 6e4], np.float16).view(np.uint8)
    stored = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, Type.Q4_K)}).stored["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="a scale that is NaN, infinite or too large"):
        stored.levels(0, 4)


def some_of(kind: Type) -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((50, 512)).astype(np.float32)
    return np.asarray(gguf.quants.quantize(values, kind))


def test_mxfp4_is_a_weight_of_four_bit_floats(tmp_path: Path) -> None:
    """Every code, and scales over many powers of two."""
    data = np.random.default_rng(0).integers(0, 256, (64, 2 * 17), dtype=np.uint8)
    data[:, ::17] %= 250
    name = "model.layers.1.mlp.up_proj.weight"
    stored = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, Type.MXFP4)}).stored[name]
    assert stored.integers == IntegerFormat(4, 32, fp4=True)
    fp4 = stored.levels(3, 60)
    assert isinstance(fp4, Fp4Weight) and fp4.shape == (57, 64)
    assert torch.equal(fp4.dequantize(), stored.read(3, 60))
    data[2, 17] = 255
    stored = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, Type.MXFP4)}).stored[
        "model.layers.1.mlp.up_proj.weight"
    ]
    stored.levels(0, 2)
    with pytest.raises(CheckpointError, match="has a scale that is NaN"):
        stored.levels(0, 3)


def header_of(folder: Path, tensors: dict[str, tuple[np.ndarray, Type]]) -> GGUFWeights:
    """A file with these tensors and as much of a header as their names need."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3")
    writer.add_block_count(2)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return GGUFWeights(folder)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4])
def test_types_that_the_package_cannot_write_itself(tmp_path: Path, kind: Type) -> None:
    size, width = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 100, (10, 3 * width), dtype=np.uint8)  # no scale of these is infinite
    weights = header_of(tmp_path, {"blk.1.ffn_up.weight": (data, kind)})
    stored = weights.stored["model.layers.1.mlp.up_proj.weight"]
    assert stored.shape == (10, 3 * size) and stored.exact == (kind == Type.MXFP4)
    expected = gguf.quants.dequantize(data, kind)
    assert torch.equal(value(weights, "model.layers.1.mlp.up_proj.weight"), torch.from_numpy(expected))


def test_long_reads_go_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf.quants.quantize(np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32), Type.Q8_0)
    stored = header_of(tmp_path, {"blk.0.ffn_up.weight": (data, Type.Q8_0)}).stored
    weight = stored["model.layers.0.mlp.up_proj.weight"]
    whole = weight.read(0, 50)
    monkeypatch.setattr("skyline.quantization.formats.gguf._PIECE", 64 * 7)
    assert torch.equal(weight.read(0, 50), whole)


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    data = gguf.quants.quantize(np.ones((4, 64), np.float32), Type.Q4_0)
    data[2, 18:20] = np.array([np.inf], np.float16).view(np.uint8)
    weights = header_of(tmp_path, {"blk.0.ffn_up.weight": (data, Type.Q4_0)})
    stored = weights.stored["model.layers.0.mlp.up_proj.weight"]
    for read in (stored.read, stored.levels):
        read(0, 2)
        with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' has a scale that is NaN, infinite"):
            read(0, 4)


def test_tensors_without_a_counterpart_keep_their_names(tmp_path: Path) -> None:
    one = (np.ones((2, 2), np.float32), Type.F32)
    names = ["blk.0.attn_q.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.scale", "other", "rope_freqs.weight"]
    weights = header_of(tmp_path, dict.fromkeys(names, one))
    assert sorted(weights) == [
        "blk.0.attn_qkv.weight",
        "model.layers.0.self_attn.q_proj.scale",
        "model.layers.0.self_attn.q_proj.weight",
        "other",
    ]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    weights, expected = made(tmp_path, "glm4moe", lambda name: Type.F32, nextn_predict_layers=1)
    assert {*weights, *weights.stored} == {name for name in expected if ".layers.1." not in name}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blk.0.attn_q.weight", "blk.00.attn_q.weight"], "two tensors are model.layers.0.self_attn.q_proj.weight"),
        (["output.weight", "lm_head.weight"], "two tensors are lm_head.weight"),
    ],
)
def test_two_tensors_of_one_name(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        header_of(tmp_path, dict.fromkeys(names, (np.ones((2, 2), np.float32), Type.F32)))


def test_a_quantized_vector_is_refused(tmp_path: Path) -> None:
    data = gguf.quants.quantize(np.ones(32, np.float32), Type.Q8_0)
    with pytest.raises(CheckpointError, match="has one dimension and is quantized"):
        header_of(tmp_path, {"output_norm.weight": (data, Type.Q8_0)})
