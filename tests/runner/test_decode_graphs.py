"""Decode steps as they are recorded on a GPU: static inputs, padding, block tables that stay on the device.

Without a GPU the same steps run call by call, on kernels in Triton's interpreter; with one they are recorded, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyline.checkpoint.config import load_config
from skyline.engine.config import EngineConfig
from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineRequest
from skyline.engine.sampling_params import SamplingParams
from skyline.engine.scheduler import Limits
from skyline.kernels.gpu import GPUS
from skyline.models import create_model, kv_caches, randomize
from skyline.runner import decode_graphs
from skyline.runner.decode_graphs import graph_sizes, why_not_recorded
from skyline.runner.loader import build_program
from skyline.runner.memory import group_caches
from skyline.runner.model_runner import ModelRunner
from skyline.runner.sampler import Sampler
from tests.kernels.triton import conftest  # noqa: F401  mends the interpreter
from tests.tiny import make_tiny_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, LENGTH, BLOCK = 5, 64, 4


def engine(folder: Path, graphs: bool | None, device: str, **changes: object) -> tuple[EngineCore, ModelRunner]:
    config = EngineConfig(model=str(folder), device=device, block_size=BLOCK, dtype="float32")
    model_config = load_config(folder)
    model = create_model(model_config, torch.float32, DEVICE if device == "cuda" else "cpu")
    randomize(model, 1)
    gpu = GPUS["h200"] if device == "cuda" and DEVICE.type == "cpu" else None
    program = build_program(config, model, torch.float32, gpu=gpu)
    place = DEVICE if device == "cuda" else torch.device("cpu")
    groups = group_caches(kv_caches(model))
    for group in groups:
        for cache in group.caches:
            cache.allocate(40, BLOCK, place)
            for part in cache.tensors:
                part.fill_(float("nan"))
    token_ids = torch.zeros((SLOTS + 1, LENGTH + 1), dtype=torch.int32, device=place)
    sampler = Sampler(
        vocab_size=model_config.vocab_size,
        max_slots=SLOTS,
        device=place,
        token_ids=token_ids,
        eos_token_ids=[],
        grammar_compiler=None,
    )
    runner = ModelRunner(program, sampler, token_ids, block_size=BLOCK, device=place, graphs=graphs)
    limits = Limits(
        num_blocks=40, block_size=BLOCK, max_num_seqs=SLOTS, max_num_batched_tokens=16, max_model_len=LENGTH
    )
    return EngineCore(limits, runner), runner


def run(core: EngineCore, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    waiting = list(requests.items())
    while waiting or core.has_work:
        if waiting:  # they come one after the other, so that the number of rows changes
            name, (prompt, params) = waiting.pop(0)
            assert core.add(EngineRequest(name, prompt, params)) is None
        for output in core.step():
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("graphs", [False, True] if DEVICE.type == "cuda" else [False])
def test_the_same_tokens_as_on_the_cpu(tmp_path: Path, graphs: bool) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    requests = {
        str(number): (
            [(number * 37 + place) % 500 + 1 for place in range(length)],
            SamplingParams(temperature=0.8 if number == 2 else 0, seed=number, max_tokens=tokens),
        )
        for number, (length, tokens) in enumerate(((3, 9), (17, 4), (6, 7), (1, 12)))
    }
    core, runner = engine(folder, graphs, "cuda")
    assert runner.recorded_sizes == []
    got = run(core, requests)
    runner.close()
    other, plain = engine(folder, None, "cpu")
    assert got == run(other, requests)
    plain.close()
    assert bool(runner.recorded_sizes) == graphs


def test_sizes_leave_little_padding() -> None:
    for most in (1, 5, 64, 256, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
        for count in range(1, most + 1):
            size = next(size for size in sizes if size >= count)
            assert size - count <= max(2, count // 2, 0) or size - count < 8
            assert size - count < size * (0.3 if count >= 17 else 0.5)


def test_ops_that_look_at_values_are_not_recorded(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "qwen3")
    model = create_model(load_config(folder), torch.float32, "meta")
    config = EngineConfig(model=str(folder), device="cuda")
    assert why_not_recorded(build_program(config, model, torch.float32, gpu=GPUS["h200"])) is None
    old = build_program(config, model, torch.float32, gpu=GPUS["h200"].without("triton"))
    reason = why_not_recorded(old)
    assert reason is not None and "torch" in reason
    assert decode_graphs.graph_sizes(1) == [1]
