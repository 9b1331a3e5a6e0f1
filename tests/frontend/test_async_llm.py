"""AsyncLLM on a real engine process with a tiny random checkpoint."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from skyline.engine.config import EngineConfig
from skyline.engine.sampling_params import GrammarSpec, SamplingParams
from skyline.frontend.async_llm import AsyncLLM
from skyline.frontend.errors import InvalidRequestError, OverloadedError, RequestFailedError
from skyline.ipc.client import EngineDeadError
from tests.oracle.engine import NaiveModel

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = list(range(20, 45))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def llm(tiny_checkpoint: Path) -> AsyncIterator[AsyncLLM]:
    llm = await AsyncLLM.start(EngineConfig(model=str(tiny_checkpoint), threads=1), max_queued=50)
    await llm.wait_ready()
    yield llm
    await llm.close()


async def _idle(llm: AsyncLLM) -> None:
    for _ in range(100):
        await asyncio.sleep(0.1)
        stats = llm.engine.stats
        if stats.running == stats.waiting == stats.blocks_held == 0:
            return
    raise AssertionError(f"left over: {llm.engine.stats}")


async def test_greedy_equals_the_naive_loop(llm: AsyncLLM, tiny_checkpoint: Path) -> None:
    expected = NaiveModel(tiny_checkpoint).generate(PROMPT, 20)
    output = await llm.submit(PROMPT, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)).collect()
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].text == llm.tokenizer.decode(expected)
    assert output.outputs[0].finish_reason == "length"


async def test_seed_and_n(llm: AsyncLLM) -> None:
    """The choices of one request differ, and each is what its seed gives alone."""
    params = SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=20)
    first, again = await asyncio.gather(llm.submit(PROMPT, params).collect(), llm.submit(PROMPT, params).collect())
    tokens = [choice.token_ids for choice in first.outputs]
    assert tokens == [choice.token_ids for choice in again.outputs]
    assert len({tuple(ids) for ids in tokens}) == 3
    second = await llm.submit(PROMPT, SamplingParams(temperature=1.0, seed=12, max_tokens=20)).collect()
    assert second.outputs[0].token_ids == tokens[1]


async def test_stop_string_ends_the_request_in_the_engine(llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = (await llm.submit(PROMPT, params).collect()).outputs[0]
    middle = whole.text[8:12]
    stopped = (
        await llm.submit(PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=[middle])).collect()
    ).outputs[0]
    assert stopped.text == whole.text[: whole.text.index(middle)]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == middle
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    await _idle(llm)


async def test_cancelling_frees_the_blocks(llm: AsyncLLM) -> None:
    generations = [llm.submit(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True, n=2)) for _ in range(5)]
    async for _ in generations[0]:
        break
    for generation in generations[1:]:
        generation.cancel()
    await _idle(llm)
    assert llm.engine.num_unfinished == 0


async def test_a_reader_that_lags_behind_misses_nothing(llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1)
    expected = (await llm.submit(PROMPT, params).collect()).outputs[0]
    generation = llm.submit(PROMPT, params)
    tokens: list[int] = []
    logprobs = 0
    async for update in generation:
        tokens += update.token_ids
        logprobs += len(update.logprobs or [])
        await asyncio.sleep(0.05)
    assert tokens == expected.token_ids and logprobs == 60


async def test_prefix_cache_and_salts(llm: AsyncLLM) -> None:
    prompt = [7] * 70
    params = SamplingParams(temperature=0, max_tokens=2)
    outputs = [await llm.submit(prompt, params, cache_salt=salt).collect() for salt in ("a", "a", "b")]
    assert [output.cached_tokens for output in outputs] == [0, 64, 0]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


async def test_grammar(llm: AsyncLLM) -> None:
    spec = GrammarSpec("regex", "(yes|no), [0-9]{3}")
    for seed in range(5):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=60, grammar=spec)
        text = (await llm.submit(PROMPT, params).collect()).outputs[0].text
        assert text[-5:-3] == ", " and text[-3:].isdigit() and text[:-5] in ("yes", "no"), text


@pytest.mark.parametrize(
    "prompt,params,message",
    [
        ([], {}, "empty"),
        ([5] * 256, {}, "256 tokens"),
        ([512], {}, "512 is not a token id"),
        ([-1], {}, "-1 is not a token id"),
        ([5], {"max_tokens": 256}, "max_tokens is 256"),
        ([5], {"temperature": -1}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0}, "top_p"),
        ([5], {"n": 0}, "n must be"),
        ([5], {"n": 10**9}, "n must be"),
        ([5], {"logprobs": 21}, "logprobs"),
        ([5], {"stop": [""]}, "stop"),
        ([5], {"stop": ["x"] * 17}, "stop"),
        ([5], {"stop_token_ids": [512]}, "stop_token_ids"),
        ([5], {"logit_bias": {5: 101.0}}, "logit_bias"),
        ([5], {"allowed_token_ids": []}, "allowed_token_ids"),
        ([5], {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ([5], {"seed": 2**64}, "seed"),
        ([5], {"grammar": GrammarSpec("regex", "(")}, "regex"),
        ([5], {"grammar": GrammarSpec("json_schema", "{")}, "schema"),
        ([5], {"grammar": GrammarSpec("json_object"), "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_bad_input_is_refused_before_anything_starts(
    llm: AsyncLLM, prompt: list[int], params: dict, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.submit(prompt, SamplingParams(**params))
    assert llm.engine.num_unfinished == 0


async def test_overload_is_refused(llm: AsyncLLM) -> None:
    generations = [llm.submit(PROMPT, SamplingParams(max_tokens=100)) for _ in range(50)]
    with pytest.raises(OverloadedError, match="try again"):
        llm.submit(PROMPT, SamplingParams())
    for generation in generations:
        generation.cancel()
    await _idle(llm)


@pytest.mark.asyncio
async def test_a_killed_engine_fails_everyone_with_a_reason(tiny_checkpoint: Path) -> None:
    llm = await AsyncLLM.start(EngineConfig(model=str(tiny_checkpoint), threads=1))
    await llm.wait_ready()
    generations = [llm.submit(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True, n=2)) for _ in range(4)]
    assert llm.engine.pid is not None
    os.kill(llm.engine.pid, signal.SIGKILL)
    for generation in generations:
        with pytest.raises(RequestFailedError, match="signal 9"):
            await generation.collect()
    assert "signal 9" in (llm.engine.health() or "")
    with pytest.raises(RequestFailedError, match="signal 9"):
        await llm.submit(PROMPT, SamplingParams()).collect()
    await llm.close()


@pytest.mark.asyncio
async def test_an_engine_that_cannot_start_says_why(tiny_checkpoint: Path) -> None:
    llm = await AsyncLLM.start(EngineConfig(model=str(tiny_checkpoint), num_kv_blocks=1, max_model_len=200))
    with pytest.raises(EngineDeadError, match="lower max_model_len"):
        await llm.wait_ready()
    await llm.close()
