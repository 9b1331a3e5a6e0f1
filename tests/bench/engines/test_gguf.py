"""The conversion to GGUF, read back with a reader written from the format's specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from skyline.bench.engines import EngineError, Installation, get
from skyline.bench.engines.base import Job
from skyline.bench.suite import EngineSpec, ModelSpec
from skyline.demo import DEMO_PATH

SIMPLE = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}


def _read(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_read(file, "<Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        inner, count = _read(file, "<I"), _read(file, "<Q")
        return [_value(file, inner) for _ in range(count)]
    return _read(file, SIMPLE[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Metadata, and (shape as in the file, type, bytes) of each tensor."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF" and _read(file, "<I") == 3
        tensors, facts = _read(file, "<Q"), _read(file, "<Q")
        metadata = {_text(file): _value(file, _read(file, "<I")) for _ in range(facts)}
        entries = []
        for _ in range(tensors):
            name, dimensions = _text(file), _read(file, "<I")
            shape = tuple(_read(file, "<Q") for _ in range(dimensions))
            entries.append((name, shape, _read(file, "<I"), _read(file, "<Q")))
        begin = -(-file.tell() // 32) * 32
        data = {}
        for name, shape, kind, offset in entries:
            assert offset % 32 == 0
            file.seek(begin + offset)
            data[name] = (shape, kind, file.read(int(np.prod(shape)) * {0: 4, 1: 2, 30: 2}[kind]))
        assert file.read() == b"\0" * (-file.tell() % 32)
        return metadata, data


def _convert(tmp_path: Path, source: Path, precision: str = "bf16") -> Path:
    spec = EngineSpec(engine="llama.cpp", precision=precision)
    model = ModelSpec(name="m", source=str(source))
    job = Job(
        spec, model, str(source), Installation(("/bin/llama-server",), "1"), 1, 1, False, tmp_path, tmp_path / "l"
    )
    command = get("llama.cpp").launch(job).command
    return Path(command[command.index("--model") + 1])


def _tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return {
        name: (tuple(entry["shape"]), raw[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def test_the_demo_model(tmp_path: Path) -> None:
    path = _convert(tmp_path, DEMO_PATH)
    metadata, tensors = read_gguf(path)
    assert metadata["general.architecture"] == "qwen3"
    assert metadata["qwen3.block_count"] == 4 and metadata["qwen3.attention.head_count_kv"] == 2
    assert metadata["qwen3.rope.freq_base"] == 10000.0
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert len(metadata["tokenizer.ggml.tokens"]) == 2048
    assert metadata["tokenizer.ggml.tokens"][2043] == "<|im_end|>" and metadata["tokenizer.ggml.eos_token_id"] == 2043
    assert metadata["tokenizer.ggml.token_type"][2043] == 3
    assert "im_start" in metadata["tokenizer.chat_template"]
    originals = _tensors(DEMO_PATH)
    assert len(tensors) == len(originals)
    shape, data = originals["model.layers.1.self_attn.k_proj.weight"]
    assert tensors["blk.1.attn_k.weight"] == (shape[::-1], 30, data)
    shape, data = originals["model.layers.3.self_attn.q_norm.weight"]
    wide = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    assert tensors["blk.3.attn_q_norm.weight"] == (shape, 0, wide.tobytes())


def test_it_is_converted_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(DEMO_PATH, source)
    path = _convert(tmp_path, source)
    made = path.stat().st_mtime_ns
    assert _convert(tmp_path, source) == path and path.stat().st_mtime_ns == made
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    assert _convert(tmp_path, source) != path


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    header, offset, kinds = {}, 0, {"float32": "F32", "float16": "F16", "float64": "F64"}
    for name, data in tensors.items():
        entry = {"dtype": kinds[data.dtype.name], "shape": data.shape, "data_offsets": [offset, offset + data.nbytes]}
        header[name] = entry
        offset += data.nbytes
    text = json.dumps(header).encode()
    blobs = b"".join(data.tobytes() for data in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + blobs)
    return folder


MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def test_experts_become_one_tensor(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray[Any, Any]:
        return random.standard_normal(shape).astype("<f2")

    tensors = {
        "model.embed_tokens.weight": some(2048, 8),
        "model.norm.weight": some(8),
        "lm_head.weight": some(2048, 8),
        "model.layers.0.mlp.gate.weight": some(3, 8),
    }
    for expert in range(3):
        tensors[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"] = some(4, 8)
        tensors[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"] = some(4, 8)
        tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = some(8, 4)
    metadata, found = read_gguf(_convert(tmp_path, _write(tmp_path / "moe", MOE, tensors)))
    assert metadata["general.architecture"] == "qwen3moe" and metadata["qwen3moe.expert_count"] == 3
    shape, kind, data = found["blk.0.ffn_down_exps.weight"]
    expected = np.stack([tensors[f"model.layers.0.mlp.experts.{i}.down_proj.weight"] for i in range(3)])
    assert (shape, kind, data) == ((4, 8, 3), 1, expected.tobytes())
    assert found["blk.0.ffn_gate_inp.weight"][1] == 0  # the router is float32
    assert found["output.weight"][2] == tensors["lm_head.weight"].tobytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "llama"}, "its model_type is 'llama', not qwen3 or qwen3_moe"),
        ({"quantization_config": {"bits": 4}}, "it is quantized"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "its rotary embedding is scaled"),
        ({}, "the checkpoint has no tensor model.norm.weight"),
    ],
)
def test_what_cannot_be_converted_says_why_and_what_to_do(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    tensors = {"model.embed_tokens.weight": np.zeros((2048, 8), "<f4")}
    folder = _write(tmp_path / "odd", {**MOE, **change}, tensors)
    with pytest.raises(EngineError, match=rf"{why}; make one with .*sources: {{llama.cpp: FILE.gguf}} to m"):
        _convert(tmp_path, folder)
    assert not list((tmp_path / "models").glob("*.gguf")) and not list((tmp_path / "models").glob("*.partial"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(DEMO_PATH, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match="its tokenizer is not the byte-level BPE of Qwen2 and Qwen3"):
        _convert(tmp_path, folder)


def test_quantizing_needs_the_builds_own_program(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"there is no /.*/llama-quantize to make int8 with"):
        _convert(tmp_path, DEMO_PATH, "int8")


def test_a_name_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="m: there is no folder"):
        _convert(tmp_path, tmp_path / "nothing")
