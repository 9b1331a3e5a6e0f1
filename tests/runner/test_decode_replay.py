"""Decode steps as recorded calls: the same tokens as call by call, for every kind of memory and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skyline.engine.config import EngineConfig
from skyline.engine.core import EngineCore
from skyline.engine.messages import EngineRequest
from skyline.engine.sampling_params import SamplingParams
from skyline.kernels.cpu import native
from skyline.kernels.tuning import Tunings
from skyline.runner.loader import LoadedModel, load_model
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny
from tests.tiny import make_tiny_checkpoint, make_tokenizer

pytestmark = pytest.mark.skipif(native.available() == "none", reason="needs the CPU kernels")

# One whose embedding stays in torch, one with two groups of caches, one with recurrent states and experts.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": dict(tie_word_embeddings=False),
    "Gemma3": FAMILIES["Gemma3"],
    "Qwen3Next": FAMILIES["Qwen3Next"],
}
FORMATS: tuple[dict[str, str], ...] = (
    dict(dtype="float32"),
    dict(dtype="bfloat16"),
    dict(dtype="bfloat16", quantization="int8", kv_cache_dtype="int8"),
    dict(dtype="float32", quantization="int4"),
)


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(path, request.param, vocab_size=512, eos_token_id=2, **MODELS[request.param])
    make_tokenizer(path)
    return path


def load(folder: Path, **settings: Any) -> LoadedModel:
    options = dict(threads=2, block_size=8, num_kv_blocks=64, max_num_seqs=5, max_num_batched_tokens=16)
    return load_model(EngineConfig(model=str(folder), **{**options, "max_model_len": 100, **settings}))


def run(loaded: LoadedModel, replayed: bool) -> dict[str, list[int]]:
    """Five requests that come one after the other and end one after the other; some sample, one is scored."""
    replay, loaded.runner._replay = loaded.runner._replay, loaded.runner._replay if replayed else None
    core = EngineCore(loaded.limits, loaded.runner)
    tokens: dict[str, list[int]] = {}
    waiting = [
        (
            str(number),
            [(number * 37 + place) % 500 + 1 for place in range(length)],
            SamplingParams(
                temperature=0.8 if number == 2 else 0,
                seed=number,
                max_tokens=new,
                ignore_eos=True,
                logprobs=2 if number == 1 else None,
                prompt_logprobs=1 if number == 3 else None,
            ),
        )
        for number, (length, new) in enumerate(((3, 25), (17, 14), (6, 17), (1, 32), (9, 20)))
    ]
    while waiting or core.has_work:
        if waiting:
            assert core.add(EngineRequest(*waiting.pop(0))) is None
        for output in core.step():
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    loaded.runner._replay = replay
    return tokens


@pytest.mark.parametrize("settings", FORMATS, ids=lambda settings: "-".join(settings.values()))
def test_the_same_tokens_as_call_by_call(folder: Path, settings: dict[str, str]) -> None:
    loaded = load(folder, **settings)
    expected = run(loaded, replayed=False)
    assert loaded.runner.recorded_sizes == []
    for _ in range(3):  # watched, compared, replayed
        assert run(loaded, replayed=True) == expected
    counts = loaded.runner.step_counts()
    assert {1, 3} <= set(loaded.runner.recorded_sizes) and counts.decode_replayed
    assert counts.decode_eager >= 2 * counts.decode_recorded, "the first two runs of a size go through Python"
    loaded.runner.close()


def test_new_tactics_are_recorded_anew(tmp_path: Path) -> None:
    loaded = load(make_tiny_checkpoint(tmp_path / "tiny"))
    expected = run(loaded, replayed=True)
    run(loaded, replayed=True)
    replay = loaded.runner._replay
    assert replay is not None
    before = {size: known.model for size, known in replay._known.items()}
    loaded.program.tune(Tunings(""))
    assert run(loaded, replayed=True) == expected
    assert all(replay._known[size].model is not model for size, model in before.items())
    loaded.runner.close()


def test_watched_calls_are_not_replayed(tmp_path: Path) -> None:
    loaded = load(make_tiny_checkpoint(tmp_path / "tiny"))
    seen: list[str] = []

    def around(call: Any, function: Any) -> Any:
        def watched(*values: Any) -> Any:
            seen.append(call.op.name)
            return function(*values)

        return watched

    expected = run(loaded, replayed=True)
    loaded.program.observe(around)
    assert run(loaded, replayed=True) == expected
    assert seen.count("paged_attention") >= 2 * 32, "each of two layers in each of the longest request's steps"
    loaded.program.observe(None)
    seen.clear()
    assert run(loaded, replayed=True) == expected and not seen
    loaded.runner.close()
