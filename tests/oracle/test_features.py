"""Every pair of features gives what the naive loop gives."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skyline.engine.sampling_params import SamplingParams
from skyline.kernels.cpu import isa, native
from tests.models.families import FAMILIES
from tests.models.harness import save_tiny
from tests.oracle.engine import Job, NaiveModel, run_engine
from tests.tiny import make_tokenizer

EOS = frozenset({2})


@pytest.fixture(scope="module")
def naive(tiny_checkpoint: Path) -> NaiveModel:
    return NaiveModel(tiny_checkpoint)


def _jobs(seed: int, neighbours: bool, aborts: bool) -> list[Job]:
    """Prompts that share a prefix with an earlier one, arriving over time."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 512) for _ in range(40)]
    jobs = []
    for index in range(6 if neighbours else 1):
        own = [draw.randrange(3, 512) for _ in range(draw.randrange(1, 30))]
        prompt = shared[: draw.choice([0, 8, 24, 40])] + own
        params = SamplingParams(temperature=0, max_tokens=draw.randrange(8, 30))
        aborted_at = draw.randrange(1, 12) if aborts and index % 2 == 1 else None
        jobs.append(
            Job(f"r{index}", prompt, params, arrives=draw.randrange(0, 8) if index else 0, aborted_at=aborted_at)
        )
    return jobs


@pytest.mark.parametrize(
    "prefix_cache,budget,preemption,asynchronous,aborts",
    list(itertools.product((True, False), (8, 2048), (True, False), (True, False), (True, False))),
)
def test_feature_combinations(
    tiny_checkpoint: Path,
    naive: NaiveModel,
    prefix_cache: bool,
    budget: int,
    preemption: bool,
    asynchronous: bool,
    aborts: bool,
) -> None:
    jobs = _jobs(seed=budget + aborts, neighbours=True, aborts=aborts)
    results, core = run_engine(
        tiny_checkpoint,
        jobs,
        enable_prefix_caching=prefix_cache,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        block_size=8,
        max_model_len=104,
        num_kv_blocks=16 if preemption else 64,
        async_scheduling=asynchronous,
    )
    for job in jobs:
        expected = naive.generate(job.prompt, job.params.max_tokens or 0, EOS)
        actual = results[job.name].token_ids
        if results[job.name].finish_reason == "abort":
            assert actual == expected[: len(actual)]
        else:
            assert actual == expected, job.name
    if preemption and not aborts:
        assert core.scheduler.num_preemptions > 0, "this case was meant to run out of blocks"
    if prefix_cache and not preemption:
        assert core.scheduler.prefix_hit_tokens > 0, "this case was meant to hit the prefix cache"


# One architecture for each kind of memory; small, so that greedy choices of fused and naive runs agree.
_HYBRIDS = ("GptOss", "DeepseekV3", "DeepseekV32", "Qwen3Next", "Gemma3")


@pytest.fixture(scope="module", params=_HYBRIDS)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param, vocab_size=512, eos_token_id=2, **FAMILIES[request.param])
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def naive_hybrid(hybrid: Path) -> NaiveModel:
    return NaiveModel(hybrid)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("preemption", [True, False])
@pytest.mark.parametrize("budget", [8, 2048])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_feature_combinations_of_every_kind_of_memory(
    hybrid: Path, naive_hybrid: NaiveModel, prefix_cache: bool, budget: int, preemption: bool, asynchronous: bool
) -> None:
    """Windows, latents, index keys and recurrent states under prefix caching, chunking, preemption and asynchrony."""
    jobs = _jobs(seed=budget, neighbours=True, aborts=False)
    results, core = run_engine(
        hybrid,
        jobs,
        dtype="float32",
        enable_prefix_caching=prefix_cache,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        block_size=8,
        max_model_len=104,
        num_kv_blocks=15 if preemption else 64,
        async_scheduling=asynchronous,
    )
    for job in jobs:
        assert results[job.name].token_ids == naive_hybrid.generate(job.prompt, job.params.max_tokens or 0, EOS)
    if preemption:
        assert core.scheduler.num_preemptions > 0, "this case was meant to run out of blocks"
    if prefix_cache and not preemption:
        assert core.scheduler.prefix_hit_tokens > 0, "this case was meant to hit the prefix cache"


def test_a_whole_prompt_in_the_cache_is_answered_the_same(tiny_checkpoint: Path, naive: NaiveModel) -> None:
    """A cached prompt of whole blocks still has to recompute its last token."""
    prompt = list(range(10, 42))
    params = SamplingParams(temperature=0, max_tokens=12)
    jobs = [
        Job("first", prompt, params),
        Job("again", prompt, params, arrives=20),
        Job("third", prompt, params, arrives=21),
    ]
    results, _ = run_engine(tiny_checkpoint, jobs, block_size=8)
    expected = naive.generate(prompt, 12, EOS)
    assert all(result.token_ids == expected for result in results.values())
    assert results["again"].outputs[0].cached_tokens == 24


# By default, then every format and memory that has kernels of its own, then torch's kernels.
INVARIANT: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "quantization": "int8"},
    {"dtype": "bfloat16", "quantization": "int8-weight-only"},
    {"dtype": "bfloat16", "quantization": "int4", "quantization_group": 32},
    {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    {"dtype": "float32", "quantization": "int8"},
    {"dtype": "bfloat16", "batch_invariant": True, "isa": "none"},
    {"dtype": "float32", "batch_invariant": True, "isa": "none"},
    {"dtype": "bfloat16", "isa": "avx512"},
    {"dtype": "bfloat16", "isa": "avx2"},
]


@pytest.mark.parametrize("settings", INVARIANT, ids=lambda settings: "-".join(map(str, settings.values())) or "default")
def test_twenty_mixes_give_the_same_bits(tiny_checkpoint: Path, settings: dict[str, Any]) -> None:
    """One request, seeded and random, in 20 different batches and chunkings: tokens and log-probabilities."""
    settings = dict(settings)
    set_of_kernels = settings.pop("isa", "best")
    if set_of_kernels not in ("best", "none", *isa.supported()):
        pytest.skip(f"this CPU has no {set_of_kernels}")
    if set_of_kernels == "best" and native.available() == "none":
        pytest.skip("needs the CPU kernels")
    draw = random.Random(0)
    prompt = [draw.randrange(3, 512) for _ in range(50)]
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24, logprobs=3)
    seen = set()
    preemptions = 0
    with contextlib.nullcontext() if set_of_kernels == "best" else native.using(set_of_kernels):
        for mix in range(20):
            jobs = [Job("x", prompt, params, arrives=draw.randrange(0, 4))]
            for index in range(mix % 7):
                other = [draw.randrange(3, 512) for _ in range(draw.randrange(1, 60))]
                temperature = draw.choice([0.0, 1.0])
                jobs.append(
                    Job(f"n{index}", other, SamplingParams(temperature=temperature, max_tokens=draw.randrange(1, 30)))
                )
            results, core = run_engine(
                tiny_checkpoint,
                jobs,
                **settings,
                max_num_seqs=8,
                max_model_len=104,
                max_num_batched_tokens=draw.choice([8, 13, 40, 2048]),
                block_size=8,
                num_kv_blocks=draw.choice([16, 40, 200]),
                async_scheduling=mix % 2 == 0,
            )
            preemptions += core.scheduler.num_preemptions
            entries = [entry for output in results["x"].outputs for entry in output.logprobs or ()]
            seen.add((tuple(results["x"].token_ids), msgspec.json.encode(entries)))
    assert preemptions, "some of the mixes were meant to run out of blocks"
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["Gemma3", "Qwen3_5"])
def test_twenty_mixes_of_windows_and_states_give_the_same_bits(family: str, dtype: str, tmp_path: Path) -> None:
    """As above, where a prefix comes from the cache only if a window, or a kept state, is there too."""
    if native.available() == "none":
        pytest.skip("needs the CPU kernels")
    save_tiny(tmp_path, family, vocab_size=512, eos_token_id=2, **FAMILIES[family])
    make_tokenizer(tmp_path)
    draw = random.Random(1)
    prompt = [draw.randrange(3, 512) for _ in range(50)]
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=24, ignore_eos=True, logprobs=3)
    seen = set()
    preemptions = hits = 0
    for mix in range(20):
        # From the second on, its own beginning is in the cache, as another request's.
        jobs = [Job("first", prompt[: draw.randrange(1, 50)], SamplingParams(temperature=0, max_tokens=3))]
        jobs += [Job("x", prompt, params, arrives=draw.randrange(0, 8))]
        for index in range(mix % 6):
            other = prompt[: draw.randrange(0, 40)] + [draw.randrange(3, 512) for _ in range(draw.randrange(1, 30))]
            jobs.append(Job(f"n{index}", other, SamplingParams(temperature=0, max_tokens=draw.randrange(1, 30))))
        results, core = run_engine(
            tmp_path,
            jobs,
            dtype=dtype,
            max_num_seqs=8,
            max_model_len=104,
            max_num_batched_tokens=draw.choice([8, 13, 40, 2048]),
            block_size=8,
            num_kv_blocks=draw.choice([16, 40, 200]),
            async_scheduling=mix % 2 == 0,
        )
        preemptions += core.scheduler.num_preemptions
        hits += core.scheduler.prefix_hit_tokens
        entries = [entry for output in results["x"].outputs for entry in output.logprobs or ()]
        seen.add((tuple(results["x"].token_ids), msgspec.json.encode(entries)))
    assert preemptions and hits, "some of the mixes were meant to run out of blocks, and to hit the prefix cache"
    assert len(seen) == 1


def test_min_tokens_holds_back_the_end(tiny_checkpoint: Path, naive: NaiveModel) -> None:
    prompt = list(range(30, 50))
    first = naive.generate(prompt, 1)[0]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[first])
    results, _ = run_engine(
        tiny_checkpoint,
        [
            Job("stops", prompt, params),
            Job("waits", prompt, SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[first], min_tokens=5)),
        ],
    )
    assert results["stops"].token_ids == [first] and results["stops"].finish_reason == "stop"
    assert first not in results["waits"].token_ids[:5]


def test_context_end_is_a_length_finish(tiny_checkpoint: Path) -> None:
    jobs = [Job("x", list(range(3, 60)), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))]
    results, _ = run_engine(tiny_checkpoint, jobs, max_model_len=64)
    assert results["x"].finish_reason == "length" and len(results["x"].token_ids) == 64 - 57


def test_prompt_logprobs_survive_chunking_and_preemption(tiny_checkpoint: Path, naive: NaiveModel) -> None:
    import torch

    prompt = list(range(5, 45))
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=2, ignore_eos=True)
    noise = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = torch.log_softmax(naive.logits(prompt), -1)
    for budget, blocks in ((2048, 64), (8, 64), (16, 12)):
        jobs = [Job("n", list(range(60, 90)), noise), Job("x", prompt, params, arrives=1)]
        results, _ = run_engine(
            tiny_checkpoint,
            jobs,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            block_size=8,
            num_kv_blocks=blocks,
            max_model_len=96,
        )
        entries = results["x"].outputs[0].prompt_logprobs
        assert entries is not None and len(entries) == len(prompt) - 1
        for position, entry in enumerate(entries):
            assert entry.ids[0] == prompt[position + 1]
            assert entry.logprobs[0] == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-3)


def test_nan_weights_fail_requests_and_not_the_engine(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.tiny import make_tiny_checkpoint

    folder = make_tiny_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    results, _ = run_engine(folder, [Job("x", [5, 6, 7], SamplingParams(temperature=0, max_tokens=4))])
    assert results["x"].finish_reason == "error"
    assert "nan" in (results["x"].outputs[-1].error or "").lower()
