"""Command lines, precisions and counters of each adapter. Engines that cannot run here are tested this far."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from skyline.bench.engines import ENGINES, EngineError, Installation, check, get
from skyline.bench.engines.base import Job
from skyline.bench.engines.http import counter
from skyline.bench.engines.registry import any_counters
from skyline.bench.suite import EngineSpec, ModelSpec

PROGRAM = ("/venv/bin/engine",)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The folder of a checkpoint that is not quantized."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def _job(tmp_path: Path, source: str, *, cuda: bool = False, **fields: Any) -> Job:
    spec = EngineSpec.model_validate(fields)
    model = ModelSpec(name="m", source=source)
    log = tmp_path / "engine.log"
    return Job(spec, model, source, Installation(PROGRAM, "1"), 1234, 2, cuda, tmp_path, log)


def _command(tmp_path: Path, source: str, **fields: Any) -> list[str]:
    return get(fields["engine"]).launch(_job(tmp_path, source, **fields)).command


WHERE = ["--host", "127.0.0.1", "--port", "1234"]


def test_skyline(tmp_path: Path) -> None:
    command = _command(tmp_path, "org/model", engine="skyline", precision="int8", args=["--seed", "3"])
    expected = ["serve", "org/model", *WHERE, "--threads", "2", "--quantization", "int8", "--seed", "3"]
    assert command == [*PROGRAM, *expected]
    command = _command(tmp_path, "org/model", engine="skyline", cuda=True)
    assert command == [*PROGRAM, "serve", "org/model", *WHERE, "--device", "cuda", "--dtype", "bfloat16"]


def test_vllm_on_gpus(tmp_path: Path) -> None:
    launch = get("vllm").launch(
        _job(
            tmp_path,
            "org/model",
            cuda=True,
            engine="vllm",
            precision="fp8",
            tensor_parallel=4,
            data_parallel=2,
            expert_parallel=8,
            args=["--max-num-seqs", "64"],
        )
    )
    sizes = ["--tensor-parallel-size", "4", "--data-parallel-size", "2", "--enable-expert-parallel"]
    expected = [*PROGRAM, "org/model", *WHERE, "--quantization", "fp8", *sizes, "--max-num-seqs", "64"]
    assert launch.command == expected
    assert "VLLM_CPU_KVCACHE_SPACE" not in launch.variables


def test_vllm_on_a_cpu(tmp_path: Path) -> None:
    launch = get("vllm").launch(_job(tmp_path, "org/model", engine="vllm"))
    assert launch.command == [*PROGRAM, "org/model", *WHERE, "--dtype", "bfloat16"]
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert launch.variables["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cores))
    assert 1 <= int(launch.variables["VLLM_CPU_KVCACHE_SPACE"]) <= 40
    assert "LD_PRELOAD" not in launch.variables
    assert launch.text.startswith("VLLM_NO_USAGE_STATS=1 ")


def test_sglang(tmp_path: Path) -> None:
    command = _command(
        tmp_path, "org/model", engine="sglang", cuda=True, tensor_parallel=8, expert_parallel=8, data_parallel=2
    )
    sizes = ["--tp-size", "8", "--dp-size", "2", "--ep-size", "8"]
    expected = [*PROGRAM, "--model-path", "org/model", *WHERE, "--enable-metrics", "--dtype", "bfloat16", *sizes]
    assert command == expected


def test_tensorrt_llm(tmp_path: Path) -> None:
    command = _command(tmp_path, "org/model", engine="tensorrt-llm", cuda=True, tensor_parallel=2, expert_parallel=2)
    config = tmp_path / "engine.trtllm.yaml"
    sizes = ["--tp_size", "2", "--ep_size", "2"]
    assert command == [*PROGRAM, "org/model", *WHERE, *sizes, "--extra_llm_api_options", str(config)]
    assert config.read_text() == "return_perf_metrics: true\n"
    for args in (["--config", "mine.yaml"], ["--extra_llm_api_options=mine.yaml"]):
        command = _command(tmp_path, "org/model", engine="tensorrt-llm", args=args)
        assert command == [*PROGRAM, "org/model", *WHERE, *args]


def test_transformers(tmp_path: Path) -> None:
    launch = get("transformers").launch(_job(tmp_path, "org/model", engine="transformers", precision="fp32"))
    assert launch.command == [*PROGRAM, "serve", "org/model", *WHERE, "--device", "cpu", "--dtype", "float32"]
    assert launch.variables == {"OMP_NUM_THREADS": "2"}


def test_llama_cpp_takes_a_gguf_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(EngineError, match=f"m: there is no file {file}"):
        _command(tmp_path, str(file), engine="llama.cpp")
    file.write_bytes(b"GGUF")
    command = _command(tmp_path, str(file), engine="llama.cpp", precision="q5_k_m", args=["--parallel", "8"])
    expected = ["--model", str(file), *WHERE, "--metrics", "--threads", "2", "--parallel", "8"]
    assert command == [*PROGRAM, *expected]
    model = ModelSpec(name="m", source="org/model", sources={"llama.cpp": str(file)})
    assert get("llama.cpp").source(model) == str(file) and get("vllm").source(model) == "org/model"


@pytest.mark.parametrize("engine", ["skyline", "llama.cpp", "transformers"])
def test_parallelism_that_an_engine_does_not_have_is_refused(engine: str) -> None:
    with pytest.raises(EngineError, match=f"{engine} has no tensor_parallel here"):
        get(engine).check(EngineSpec(engine=engine, tensor_parallel=2))


def test_a_precision_must_be_made_or_be_the_checkpoints(tmp_path: Path, plain: Path) -> None:
    for engine in ("skyline", "vllm", "sglang", "transformers", "tensorrt-llm"):
        with pytest.raises(EngineError, match=f"{engine} cannot make {plain} fp4 while loading"):
            _command(tmp_path, str(plain), engine=engine, precision="fp4", cuda=True)
    (plain / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "modelopt"}}))
    command = _command(tmp_path, str(plain), engine="sglang", precision="fp4", cuda=True)
    assert command == [*PROGRAM, "--model-path", str(plain), *WHERE, "--enable-metrics"]
    with pytest.raises(EngineError, match="name a GGUF file of it"):
        _command(tmp_path, str(plain), engine="llama.cpp", precision="fp4")


def test_speculation_is_a_label_that_flags_must_stand_behind(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="speculation 'ngram' is only a label"):
        get("vllm").check(EngineSpec(engine="vllm", speculation="ngram"))
    flags = ["--speculative-config", '{"method": "ngram"}']
    get("vllm").check(EngineSpec(engine="vllm", speculation="ngram", args=flags))
    assert _command(tmp_path, "org/model", engine="vllm", speculation="ngram", args=flags)[-2:] == flags


METRICS = {
    "skyline": "skyline_prefix_cache_queried_tokens_total 90.0\nskyline_prefix_cache_hit_tokens_total 12.0\n",
    "vllm": 'vllm:prefix_cache_queries_total{engine="0",model_name="a b"} 60.0\n'
    'vllm:prefix_cache_queries_total{engine="1",model_name="a b"} 30.0\n'
    'vllm:prefix_cache_queries_created{engine="0",model_name="a b"} 1.79e9\n'
    'vllm:external_prefix_cache_queries_total{engine="0"} 5.0\n'
    'vllm:prefix_cache_hits_total{engine="0",model_name="a b"} 12.0\n',
    "sglang": 'sglang:prompt_tokens_total{is_streaming="true"} 90.0\n'
    'sglang:cached_tokens_total{cache_source="device"} 10.0\nsglang:cached_tokens_total{cache_source="host"} 2.0\n',
    "llama.cpp": "# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed\n"
    "llamacpp:prompt_tokens_total 78\nllamacpp:prompt_tokens_cached_total 12\n",
    "tensorrt-llm": 'trtllm_prompt_tokens_total{model_name="m"} 90.0\ntrtllm_prompt_cached_tokens_total 12.0\n',
}


@pytest.mark.parametrize("engine", METRICS)
def test_counters_of_prefix_caches(engine: str) -> None:
    text = f"# TYPE x counter\nx 1\n{METRICS[engine]}"
    assert ENGINES[engine].cache_counters(text) == (90, 12)
    assert any_counters(text) == (90, 12)
    assert ENGINES[engine].cache_counters("x 1\n") is None


def test_engines_that_have_served_nothing_from_their_cache_say_nothing_of_it() -> None:
    assert ENGINES["sglang"].cache_counters('sglang:prompt_tokens_total{a="b"} 7\n') == (7, 0)
    assert any_counters("<html>no metrics</html>") is None


def test_a_counter_is_summed_over_labels_and_broken_ones_are_none() -> None:
    assert counter('a_total{x="}"} 1\na_total{x="2"} 2.5e1\nab_total 9\n', "a") == 26.0
    assert counter("a_total NaN-ish\n", "a") is None
    assert counter("", "a") is None


def test_gpu_engines_say_that_they_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for engine, why in (("sglang", "built for NVIDIA GPUs"), ("tensorrt-llm", "needs an NVIDIA GPU")):
        with pytest.raises(EngineError, match=why):
            check(EngineSpec(engine=engine))


def test_building_llama_cpp_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"no C\+\+ compiler"):
        check(EngineSpec(engine="llama.cpp", version="1"))
    with pytest.raises(EngineError, match="there is no llama-server on PATH"):
        check(EngineSpec(engine="llama.cpp", version="installed"))


def test_a_llama_server_on_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'version: 8123 (abcdef0)' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    installation = get("llama.cpp").install(EngineSpec(engine="llama.cpp"), tmp_path)
    assert installation == Installation((str(program),), "8123 (abcdef0)", {})


def test_url_is_not_launched(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is not launched"):
        get("url").launch(_job(tmp_path, "m", engine="url", url="http://127.0.0.1:1"))
