"""Whatever a request asks of sampling, it gets the same tokens alone, among others, in chunks and after preemptions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from skyline.engine.sampling_params import GrammarSpec, SamplingParams
from tests.oracle.engine import Job, run_engine

PARAMS = {
    "seeded": SamplingParams(temperature=1.0, seed=3, max_tokens=30),
    "filters": SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=4, max_tokens=30),
    "penalties": SamplingParams(
        temperature=0.7, presence_penalty=0.5, frequency_penalty=0.8, repetition_penalty=1.2, seed=5, max_tokens=30
    ),
    "bias": SamplingParams(temperature=0, logit_bias={9: 5.0, 11: -100.0}, max_tokens=30, ignore_eos=True),
    "words": SamplingParams(temperature=0, bad_words_token_ids=[[40, 41], [7]], max_tokens=30, ignore_eos=True),
    "allowed": SamplingParams(temperature=1.0, seed=6, allowed_token_ids=list(range(3, 40)), max_tokens=30),
    "grammar": SamplingParams(
        temperature=1.0, seed=7, grammar=GrammarSpec("regex", r"([a-z]{3}[0-9]){12}"), max_tokens=80
    ),
    "schema": SamplingParams(
        temperature=1.0,
        seed=8,
        grammar=GrammarSpec(
            "json_schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 6, "maxItems": 9}'
        ),
        max_tokens=80,
    ),
    "logprobs": SamplingParams(temperature=0.5, seed=9, logprobs=4, prompt_logprobs=1, max_tokens=30),
}


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": False}], ids=["async", "sync"])
def test_alone_and_among_others(tiny_checkpoint: Path, settings: dict[str, bool]) -> None:
    draw = random.Random(0)
    shared = [draw.randrange(3, 512) for _ in range(24)]
    jobs = []
    for number, (name, params) in enumerate(PARAMS.items()):
        prompt = shared + [draw.randrange(3, 512) for _ in range(draw.randrange(1, 20))]
        jobs.append(Job(name, prompt, params, arrives=number % 4))
    together, core = run_engine(
        tiny_checkpoint,
        jobs,
        max_num_seqs=5,
        max_num_batched_tokens=12,
        block_size=8,
        max_model_len=128,
        num_kv_blocks=26,
        **settings,
    )
    assert core.scheduler.num_preemptions > 0 and core.scheduler.prefix_hit_tokens > 0
    for job in jobs:
        alone = run_engine(tiny_checkpoint, [Job(job.name, job.prompt, job.params)], max_model_len=128)[0][job.name]
        mine = together[job.name]
        assert mine.finish_reason == alone.finish_reason != "error", job.name
        assert mine.token_ids == alone.token_ids, job.name
        for ours, theirs in zip(mine.outputs, alone.outputs, strict=True):
            for one, other in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
                assert one.ids == other.ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
