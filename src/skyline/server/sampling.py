"""From a request's fields and the model's own defaults to SamplingParams."""

from __future__ import annotations

from typing import TypeVar

from skyline.checkpoint import GenerationDefaults
from skyline.engine.sampling_params import GrammarSpec, SamplingParams
from skyline.server.protocol import GenerationRequest

Number = TypeVar("Number", int, float)


def sampling_params(
    body: GenerationRequest,
    defaults: GenerationDefaults,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: GrammarSpec | None,
) -> SamplingParams:
    """What the request sets goes first, then what generation_config.json recommends, then SamplingParams' defaults."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    params = SamplingParams(
        n=body.n or 1,
        seed=body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        stop=stop or [],
        stop_token_ids=body.stop_token_ids or [],
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens is not False,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        allowed_token_ids=body.allowed_token_ids,
        bad_words=body.bad_words or [],
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )
    temperature = _first(body.temperature, defaults.temperature)
    if temperature is not None:
        params.temperature = temperature
    top_k = _first(body.top_k, defaults.top_k)
    if top_k is not None:
        params.top_k = top_k
    # Checkpoints in the wild hold a top_p or repetition_penalty of 0, which no request may ask for: that means "off".
    if top_p := _first(body.top_p, defaults.top_p):
        params.top_p = top_p
    if min_p := _first(body.min_p, defaults.min_p):
        params.min_p = min_p
    if repetition_penalty := _first(body.repetition_penalty, defaults.repetition_penalty):
        params.repetition_penalty = repetition_penalty
    return params


def _first(*values: Number | None) -> Number | None:
    return next((value for value in values if value is not None), None)
