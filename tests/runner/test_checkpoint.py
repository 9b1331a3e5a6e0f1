"""Weights by the model's names, whatever a checkpoint calls them: those that also see hold a language model too."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from skyline.checkpoint.config import load_config
from skyline.checkpoint.errors import CheckpointError
from skyline.checkpoint.weights import load
from skyline.engine.config import EngineConfig
from skyline.graph import Program
from skyline.kernels.cpu import native
from skyline.kernels.cpu.packed import Format, PackedWeight
from skyline.kernels.fp4_layout import FP4
from skyline.kernels.gpu import GPUS
from skyline.kernels.triton.layouts import Fp4Words, unpack_fp4
from skyline.models import create_model, destinations, ignorable
from skyline.ops import Fp4Weight
from skyline.quantization.compress import mxfp4
from skyline.runner.checkpoint import Checkpoint
from skyline.runner.loader import build_program, compiled_kinds, load_model
from skyline.runner.weight_store import WeightStore
from tests.checkpoint.gguf.test_gguf_weights import AllPlain, made
from tests.models import quantized
from tests.models.families import FAMILIES
from tests.models.harness import CPU, PagedRunner, save_tiny

TOKENS = [5, 9, 3, 60, 2, 8, 8, 41, 7, 30, 12]
_TEXT: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=None,
)


def _save(folder: Path, family: str) -> torch.Tensor:
    """Write a tiny checkpoint with a vision tower; returns the logits of TOKENS."""
    import transformers

    text = {**_TEXT, **FAMILIES[family]}
    if family == "Gemma3":
        vision: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      image_size=28, patch_size=14)  # fmt: skip
    else:
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and float(parameter.mean()) > 0.5 else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * 0.2)
        expected: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    model.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("family", ["Gemma3", "Qwen3_5", "Qwen3_5Moe"])
def test_the_language_model_of_one_that_sees(family: str, tmp_path: Path) -> None:
    expected = _save(tmp_path, family)
    config = load_config(tmp_path)
    assert config.architecture == f"{family}ForCausalLM" and config.eos_token_ids == [2]
    model = create_model(config, torch.float32, CPU)
    with Checkpoint(tmp_path, config) as checkpoint:
        assert (
            checkpoint.method == ""
            and checkpoint.integers(model) == {}
            and checkpoint.report(model, torch.float32) == []
        )
        checkpoint.load(model, lambda target, rows: target.copy_(rows))
    logits = PagedRunner(model).step(("a", TOKENS))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("inner", [128, 96])
def test_experts_in_blocks_of_fp8(inner: int, tmp_path: Path) -> None:
    """They stay as stored where blocks end with gate and with up; their values are those of the checkpoint."""
    settings = {**_TEXT, "hidden_size": 160, "moe_intermediate_size": inner, "num_experts": 3, "num_experts_per_tok": 2}
    theirs = save_tiny(tmp_path / "plain", "Qwen3Moe", **settings)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    theirs = quantized.rewrite(tmp_path / "plain", theirs, quantized.fp8_blocks(128), fp8)
    folder = tmp_path / "small"
    config = load_config(folder)
    model = create_model(config, torch.float32, CPU, allocate=False)
    with Checkpoint(folder, config) as checkpoint:
        stored = checkpoint.integers(model, GPUS["h200"])
        asked = EngineConfig(model=str(folder), device="cuda", dtype="float32")
        program = build_program(asked, model, torch.float32, stored=stored, gpu=GPUS["h200"])
        store = WeightStore(model, program, CPU)
        checkpoint.load(model, store.write)
        assert store.finish() == []
    experts = [call for call in program.calls if "experts" in call.op.name]
    names = {"moe_experts_fp8"} if inner == 128 else {"fused_experts"}
    assert {call.op.name for call in experts} == names and len(experts) == 3
    for index, call in enumerate(experts):
        theirs_here = theirs.model.layers[index].mlp.experts
        for slot, wanted in zip(call.arguments[1:3], (theirs_here.gate_up_proj, theirs_here.down_proj), strict=True):
            found = program.constant(slot)
            plain = found if isinstance(found, torch.Tensor) else found.dequantize()
            assert isinstance(found, torch.Tensor) == (inner != 128)
            torch.testing.assert_close(plain, wanted.detach(), rtol=1e-6, atol=0)


def _on_a_gpu(
    folder: Path, name: str = "h200", **options: Any
) -> tuple[Program, torch.nn.Module, list[dict[str, Any]]]:
    """As it is loaded for a GPU, into this machine's memory, and what is reported of the weights."""
    config = load_config(folder)
    model = create_model(config, torch.bfloat16, CPU, allocate=False)
    with Checkpoint(folder, config) as checkpoint:
        stored = checkpoint.integers(model, GPUS[name])
        asked = EngineConfig(model=str(folder), device="cuda", dtype="bfloat16", **options)
        program = build_program(asked, model, torch.bfloat16, stored=stored, gpu=GPUS[name])
        checkpoint.load(model, WeightStore(model, program, CPU).write)
        return program, model, checkpoint.report(model, torch.bfloat16)


def _on_a_cpu(folder: Path, **options: Any) -> tuple[Program, torch.nn.Module, list[dict[str, Any]]]:
    asked = EngineConfig(model=str(folder), **options)
    config = load_config(folder)
    model = create_model(config, torch.bfloat16, CPU, allocate=False)
    with Checkpoint(folder, config) as checkpoint:
        stored = checkpoint.integers(model, None, compiled_kinds(asked, torch.bfloat16, native.available()))
        program = build_program(asked, model, torch.bfloat16, stored=stored)
        store = WeightStore(model, program, CPU)
        checkpoint.load(model, store.write)
        assert store.finish() == []
        return program, model, checkpoint.report(model, torch.bfloat16)


def test_gpt_oss_keeps_its_experts_in_mxfp4(tmp_path: Path) -> None:
    """Rows of gate and up, which lie in turns in the file, are put one after the other as they are; nothing is lost."""
    settings = {**_TEXT, **FAMILIES["GptOss"], "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    theirs = save_tiny(tmp_path / "plain", "GptOss", **settings)
    theirs = quantized.rewrite(tmp_path / "plain", theirs, quantized.mxfp4_experts, {"quant_method": "mxfp4"})
    program, _, report = _on_a_gpu(tmp_path / "small")
    assert report == [{"format": "mxfp4, groups of 32", "becomes": "mxfp4, as stored", "weights": 6}]
    experts = [call for call in program.calls if "experts" in call.op.name]
    assert [call.op.name for call in experts] == ["moe_experts_clamped_fp4"] * 3
    assert {call.kernel.provider for call in experts} == {"triton"}
    for layer, call in zip(theirs.model.layers, experts, strict=True):
        gate_up, bias, down = (program.constant(slot) for slot in call.arguments[1:4])
        turned = layer.mlp.experts.gate_up_proj.detach().transpose(1, 2)
        assert torch.equal(gate_up.dequantize(), torch.cat((turned[:, 0::2], turned[:, 1::2]), 1))
        assert torch.equal(down.dequantize(), layer.mlp.experts.down_proj.detach().transpose(1, 2))
        theirs_bias = layer.mlp.experts.gate_up_proj_bias.detach()
        assert torch.equal(bias.float(), torch.cat((theirs_bias[:, 0::2], theirs_bias[:, 1::2]), 1).bfloat16().float())


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_linears_and_experts_stay_in_fp4(format: str, family: str, tmp_path: Path) -> None:
    """Parts of a fused weight, each of which has a scale of its own in NVFP4, come out with their values."""
    mixture = {"moe_intermediate_size": 96, "num_experts": 3, "num_experts_per_tok": 2} if family == "Qwen3Moe" else {}
    settings = {**_TEXT, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **mixture}
    theirs = quantized.compressed(tmp_path / "plain", save_tiny(tmp_path / "plain", family, **settings), format)
    program, model, report = _on_a_gpu(tmp_path / "small")
    assert {entry["becomes"] for entry in report} == {f"{format}, as stored"}
    ops = Counter(call.op.name for call in program.calls if "fp4" in call.op.name)
    assert ops == ({"fused_linear_fp4": 12} if family == "Qwen3" else {"fused_linear_fp4": 6, "moe_experts_fp4": 3})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(use.parameter)]: program.constant(use.slot) for use in program.weights}
    attention = theirs.model.layers[1].self_attn
    wanted = torch.cat([getattr(attention, f"{part}_proj").weight.detach() for part in "qkv"])
    torch.testing.assert_close(
        found["model.layers.1.self_attn.qkv_proj.weight"].dequantize(), wanted, rtol=1e-6, atol=0
    )
    if format == "nvfp4":
        assert len(found["model.layers.1.self_attn.qkv_proj.weight"].row_scales.unique()) == 3


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe"])
def test_nvfp4_with_scales_of_inputs(family: str, tmp_path: Path) -> None:
    """Its activations are quantized too, where a GPU multiplies FP4; in a fused weight all parts must say so."""
    mixture = {"moe_intermediate_size": 96, "num_experts": 3, "num_experts_per_tok": 2} if family == "Qwen3Moe" else {}
    settings = {**_TEXT, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **mixture}
    quantized.compressed(tmp_path / "plain", save_tiny(tmp_path / "plain", family, **settings), "nvfp4")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    inputs = {f"{module}.input_global_scale": torch.tensor([50.0]) for module in modules}
    save_file({**tensors, **inputs}, file)

    def ops(gpu: str = "b200") -> Counter[str]:
        program, _, report = _on_a_gpu(tmp_path / "small", gpu)
        assert all(entry["becomes"].startswith("nvfp4") for entry in report)
        return Counter(call.op.name for call in program.calls if "fp4" in call.op.name)

    linears, experts = (6, 3) if mixture else (12, 0)
    both = Counter({"fused_linear_nvfp4": linears, "moe_experts_nvfp4": experts})
    weights = Counter({"fused_linear_fp4": linears, "moe_experts_fp4": experts})
    assert ops() == both and ops("rtx-blackwell") == both
    assert ops("h200") == weights
    del inputs["model.layers.0.self_attn.v_proj.input_global_scale"]
    save_file({**tensors, **inputs}, file)
    both.update(fused_linear_nvfp4=-1, fused_linear_fp4=1)
    assert ops() == both
    save_file({**tensors, **{f"{module}.input_scale": torch.tensor([0.5]) for module in modules}}, file)
    assert ops() == weights, "activations in FP8"


def test_experts_with_up_first_hold_the_checkpoint_s_weights(tmp_path: Path) -> None:
    """As FlashInfer wants them; each expert's gate and up are two tensors of the file."""
    experts = {"moe_intermediate_size": 96, "num_experts": 3, "num_experts_per_tok": 2}
    theirs = save_tiny(tmp_path, "Qwen3Moe", **{**_TEXT, "hidden_size": 64, "intermediate_size": 96, **experts})
    program, model, _ = _on_a_gpu(tmp_path, prefer_kernels="flashinfer")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(use.parameter)]: program.constant(use.slot) for use in program.weights}
    for index, layer in enumerate(theirs.model.layers):
        weight = found[f"model.layers.{index}.mlp.experts.gate_up"]
        wanted = layer.mlp.experts.gate_up_proj.detach().bfloat16()
        assert torch.equal(weight.turned(), wanted) and not torch.equal(weight.values, wanted)


@pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_on_a_cpu_too(format: str, tmp_path: Path) -> None:
    """In the panels of its kernels."""
    settings = {**_TEXT, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    theirs = quantized.compressed(tmp_path / "plain", save_tiny(tmp_path / "plain", "Qwen3", **settings), format)
    program, model, report = _on_a_cpu(tmp_path / "small")
    assert {entry["becomes"] for entry in report} == {f"{format}, as stored"}
    linears = [call for call in program.calls if call.op.name.endswith("linear_fp4")]
    assert len(linears) == 12 and {call.kernel.provider for call in linears} == {"cpu"}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(use.parameter)]: program.constant(use.slot) for use in program.weights}
    mlp = theirs.model.layers[1].mlp
    wanted = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
    packed = found["model.layers.1.mlp.gate_up_proj.weight"]
    assert packed.layout.gated
    torch.testing.assert_close(packed.dense(), wanted, rtol=1e-6, atol=0)


@pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe"])
@pytest.mark.parametrize("blocks", [True, False])
def test_fp8_stays_on_a_cpu(blocks: bool, family: str, tmp_path: Path) -> None:
    """Its kernels take blocks that end anywhere: 96 rows of gate and 96 of up, where a GPU's want whole ones."""
    mixture = {"moe_intermediate_size": 96, "num_experts": 3, "num_experts_per_tok": 2} if family == "Qwen3Moe" else {}
    settings = {**_TEXT, "hidden_size": 160, "intermediate_size": 96, "head_dim": 16, **mixture}
    theirs = save_tiny(tmp_path / "plain", family, **settings)
    if blocks:
        fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        theirs = quantized.rewrite(tmp_path / "plain", theirs, quantized.fp8_blocks(128), fp8)
    else:
        theirs = quantized.compressed(tmp_path / "plain", theirs, "fp8")
    program, model, report = _on_a_cpu(tmp_path / "small")
    assert {entry["becomes"] for entry in report} == {f"fp8{' in blocks of 128x128' if blocks else ''}, as stored"}
    ops = Counter((call.op.name, call.kernel.provider) for call in program.calls if "fp8" in call.op.name)
    experts = {("moe_experts_fp8", "cpu"): 3} if mixture else {}
    assert ops == {("linear_fp8", "cpu"): 6 if mixture else 12, **experts}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(use.parameter)]: program.constant(use.slot) for use in program.weights}
    mlp = theirs.model.layers[1].mlp
    if mixture:
        packed, wanted = found["model.layers.1.mlp.experts.gate_up"].expert(2), mlp.experts.gate_up_proj[2]
    else:
        packed = found["model.layers.1.mlp.gate_up_proj.weight"]
        wanted = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    assert packed.layout.gated
    torch.testing.assert_close(packed.dense(), wanted.detach().float(), rtol=1e-6 if blocks else 4e-3, atol=0)


@pytest.mark.parametrize("options", [{"prefer_kernels": "torch"}, {"dtype": "float32"}])
def test_small_floats_become_plain_where_torch_computes(options: dict[str, str], tmp_path: Path) -> None:
    """Where blocks of FP8 begin within a fused weight, torch's form of it has no place for their scales."""
    theirs = save_tiny(tmp_path / "plain", "Qwen3", **{**_TEXT, "hidden_size": 160, "intermediate_size": 96})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantized.rewrite(tmp_path / "plain", theirs, quantized.fp8_blocks(128), fp8)
    asked = EngineConfig(model=str(tmp_path / "small"), **options)
    dtype = torch.float32 if "dtype" in options else torch.bfloat16
    assert compiled_kinds(asked, dtype, native.available()).isdisjoint({"fp8", "fp4", "bytes"})
    if "dtype" not in options:
        program, _, report = _on_a_cpu(tmp_path / "small", **options)
        assert {entry["becomes"] for entry in report} == {"bfloat16, rounded"}
        assert not any("fp8" in call.op.name for call in program.calls)
    with pytest.raises(ValueError, match=r"fp8 needs the CPU.s compiled kernels.*else use int8"):
        load_model(EngineConfig(model=str(tmp_path / "plain"), quantization="fp8", **options))


@pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")
def test_experts_of_gpt_oss_on_a_cpu(tmp_path: Path) -> None:
    settings = {**_TEXT, **FAMILIES["GptOss"], "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    theirs = save_tiny(tmp_path / "plain", "GptOss", **settings)
    theirs = quantized.rewrite(tmp_path / "plain", theirs, quantized.mxfp4_experts, {"quant_method": "mxfp4"})
    program, model, _ = _on_a_cpu(tmp_path / "small")
    experts = [call for call in program.calls if "experts" in call.op.name]
    assert [(call.op.name, call.kernel.provider) for call in experts] == [("moe_experts_clamped_fp4", "cpu")] * 3
    for layer, call in zip(theirs.model.layers, experts, strict=True):
        gate_up = program.constant(call.arguments[1])
        turned = layer.mlp.experts.gate_up_proj.detach().transpose(1, 2)
        for expert, matrix in enumerate(torch.cat((turned[:, 0::2], turned[:, 1::2]), 1)):
            assert torch.equal(gate_up.expert(expert).dense(), matrix)
    exact = theirs(input_ids=torch.tensor([TOKENS])).logits[0].detach()
    replayed = PagedRunner(model, run=program).step(("a", TOKENS))[0]
    assert (replayed.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("load", [_on_a_cpu, _on_a_gpu], ids=["cpu", "h200"])
def test_experts_of_gpt_oss_from_gguf(load: Callable[..., Any], tmp_path: Path) -> None:
    """Where gate and up are two tensors, whose rows take turns in a checkpoint of transformers."""
    if load is _on_a_cpu and native.available() == "none":
        pytest.skip("no compiled kernels here")
    weights, _ = made(tmp_path, "gpt-oss", lambda name: Type.MXFP4 if "_exps.weight" in name else Type.F32)
    shutil.copy(tmp_path / "original" / "config.json", weights.folder)
    program, _, report = load(weights.folder)
    assert report == [{"format": "GGUF MXFP4", "becomes": "mxfp4, as stored", "weights": 4}]
    experts = [call for call in program.calls if call.op.name == "moe_experts_clamped_fp4"]
    assert len(experts) == 2
    for index, call in enumerate(experts):
        for place, name in ((1, "gate_up_proj"), (3, "down_proj")):
            wanted = weights.stored[f"model.layers.{index}.mlp.experts.{name}"].read(0, 3).transpose(1, 2)
            if name == "gate_up_proj":
                wanted = torch.cat((wanted[:, 0::2], wanted[:, 1::2]), 1)
            found = program.constant(call.arguments[place])
            whole = found.dequantize() if isinstance(found, Fp4Words) else None
            for expert in range(3):
                assert torch.equal(found.expert(expert).dense() if whole is None else whole[expert], wanted[expert])


@pytest.mark.skipif(native.available() == "none", reason="no compiled kernels here")
@pytest.mark.parametrize("down", [Type.Q6_K, Type.Q8_0])
@pytest.mark.parametrize("model", ["qwen3", "qwen3moe"])
def test_k_types_from_gguf_on_a_cpu(model: str, down: Type, tmp_path: Path) -> None:
    """As in files of Q4_K_M: a fused weight of several types is bytes, and so are an expert's two if one is."""

    def kind(name: str) -> Type:
        if any(part in name for part in ("attn_v", "ffn_down", "token_embd", "output.")):
            return Type.Q4_K if "blk.1" in name else down if "ffn_down" in name else Type.Q6_K
        return Type.Q4_K if name.endswith(".weight") and "norm" not in name and "gate_inp" not in name else Type.F32

    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "moe_intermediate_size": 256}
    weights, _ = made(tmp_path, model, kind, settings=wide)
    shutil.copy(tmp_path / "original" / "config.json", weights.folder)
    program, ours, report = _on_a_cpu(weights.folder)
    downs = {("GGUF Q8_0", "int8 in groups of 32 for bfloat16, as stored")} if down == Type.Q8_0 else set()
    assert {(entry["format"], entry["becomes"]) for entry in report} == downs | {
        ("GGUF Q4_K", "int4 in groups of 32 with zero points, as stored"),
        ("GGUF Q4_K", "int8 in groups of 16 for bfloat16, as stored"),
        ("GGUF Q6_K", "int8 in groups of 16 for bfloat16, as stored"),
        ("GGUF Q6_K", "int6 in groups of 16 for bfloat16, as stored"),
        ("GGUF Q6_K", "bfloat16, rounded"),  # the embedding, of which a step reads some rows only
    }
    plain = create_model(load_config(weights.folder), torch.bfloat16, CPU)
    load(AllPlain(weights), destinations(plain), ignore=ignorable(plain))
    wanted, kept = dict(plain.named_parameters()), 0
    for use in program.weights:
        packed = program.constant(use.slot)
        name = next(name for name, parameter in ours.named_parameters() if parameter is use.parameter)
        if not isinstance(packed, PackedWeight) or packed.layout.format not in (
            Format.BYTES,
            Format.SIX_BITS,
            Format.INT4,
        ):
            continue
        kept += 1
        experts = range(packed.shape[0]) if len(packed.shape) == 3 else [0]
        found = torch.stack([packed.expert(expert).dense(torch.bfloat16) for expert in experts]).view(packed.shape)
        if packed.layout.format is Format.INT4:  # whose scales are float16
            torch.testing.assert_close(found, wanted[name].detach(), rtol=2**-7, atol=1e-3)
        else:
            assert torch.equal(found, wanted[name])
    assert kept == 9
    ours_ = PagedRunner(ours, run=program).step(("a", TOKENS))[0].float()
    theirs = PagedRunner(plain).step(("a", TOKENS))[0].float()
    # Activations are int8 to the int4, and a router may choose other experts for a token.
    assert (ours_ - theirs).abs().median() < 0.05 * theirs.std()


def test_what_is_not_all_fp4_becomes_plain(tmp_path: Path) -> None:
    """Of a fused weight, one part is stored as it was."""
    settings = {**_TEXT, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    quantized.compressed(tmp_path / "plain", save_tiny(tmp_path / "plain", "Qwen3", **settings), "mxfp4")
    weights, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "plain"))
    name = "model.layers.0.self_attn.k_proj.weight"
    del weights[f"{name}_packed"], weights[f"{name}_scale"]
    save_file({**weights, name: plain[name]}, tmp_path / "small" / "model.safetensors")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["quantization_config"]["ignore"] = [name.removesuffix(".weight")]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    program, _, report = _on_a_gpu(tmp_path / "small")
    assert {entry["becomes"]: entry["weights"] for entry in report} == {
        "mxfp4, as stored": 18,
        "bfloat16, exactly": 2,
    }
    assert sum(call.op.name.endswith("linear_fp4") for call in program.calls) == 11


def test_other_checkpoints_that_see_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": {"hidden_size": 8}}'
    )
    with pytest.raises(CheckpointError, match=r"multimodal.*Gemma3ForConditionalGeneration"):
        load_config(tmp_path)


def test_a_checkpoint_in_bfloat16_becomes_mxfp4_for_a_gpu(tmp_path: Path) -> None:
    """By the rule of `skyline quantize`; gpt-oss's experts as well."""
    settings = {**_TEXT, **FAMILIES["GptOss"], "hidden_size": 64, "intermediate_size": 48, "head_dim": 16}
    theirs = save_tiny(tmp_path, "GptOss", **settings)
    config = load_config(tmp_path)
    model = create_model(config, torch.float32, CPU, allocate=False)
    asked = EngineConfig(model=str(tmp_path), device="cuda", dtype="float32", quantization="mxfp4")
    with Checkpoint(tmp_path, config) as checkpoint:
        program = build_program(asked, model, torch.float32, gpu=GPUS["h200"])
        checkpoint.load(model, WeightStore(model, program, CPU).write)
    ops = Counter(call.op.name for call in program.calls if "fp4" in call.op.name)
    assert ops == {"fused_linear_fp4": 6, "moe_experts_clamped_fp4": 3}
    down = next(program.constant(call.arguments[3]) for call in program.calls if "experts" in call.op.name)
    wanted = theirs.model.layers[0].mlp.experts.down_proj.detach().transpose(1, 2).reshape(-1, 48)
    made = mxfp4(torch.nn.functional.pad(wanted, (0, 16)))
    rows = unpack_fp4(down)
    assert torch.equal(rows.values.flatten(0, 1), made["weight_packed"][:, :24])
    assert torch.equal(rows.scales.flatten(0, 1), made["weight_scale"])


def test_nvfp4_is_not_made_of_rows() -> None:
    target = FP4[16].allocate((2, 32), torch.bfloat16)
    with pytest.raises(ValueError, match="skyline quantize"):
        FP4[16].write(target, 0, torch.ones(2, 32))
    with pytest.raises(ValueError, match="33 values"):
        FP4[32].write(target, 0, torch.ones(2, 33))


def test_scales_that_kernels_cannot_multiply_are_refused() -> None:
    def rows(code: int) -> Fp4Weight:
        values, scales = (torch.full((2, k), code if k == 1 else 0, dtype=torch.uint8) for k in (16, 1))
        return Fp4Weight(values, scales, torch.ones(2), 32)

    target = FP4[32].allocate((2, 32), torch.bfloat16)
    FP4[32].write(target, 0, rows(240))
    with pytest.raises(ValueError, match="--quantization none"):
        FP4[32].write(target, 0, rows(241))
