"""Exact match on word problems, the held-out ones by default, measured through any OpenAI-compatible server.

    result = asyncio.run(evaluate("http://127.0.0.1:8000"))

This is the accuracy gate of kernels, quantization and speculation settings: it sees only what a client sees.
"""

import asyncio
import json
import math
import time
from dataclasses import dataclass, field

import aiohttp

from skyline.demo import HELDOUT_PATH
from skyline.demo.problems import extract_answer


class EvaluationError(RuntimeError):
    """The server could not be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class Failure:
    """One problem whose answer was wrong or missing; `got` is the server's whole text."""

    question: str
    expected: int
    got: str


@dataclass(frozen=True)
class EvalResult:
    """`exact_match` is a share in [0, 1] and `standard_error` its binomial standard error; `seconds` is wall clock."""

    exact_match: float
    correct: int
    total: int
    standard_error: float
    seconds: float
    output_tokens: int
    failures: list[Failure] = field(default_factory=list)


def load_heldout(limit: int | None = None) -> list[tuple[str, int]]:
    """The first `limit` held-out problems (all of them by default) as (question, answer)."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    rows = [json.loads(line) for line in HELDOUT_PATH.read_text("utf-8").splitlines()]
    return [(row["question"], row["answer"]) for row in rows[:limit]]


async def evaluate(
    base_url: str,
    model: str | None = None,
    limit: int | None = None,
    concurrency: int = 16,
    max_tokens: int = 256,
    api_key: str | None = None,
    problems: list[tuple[str, int]] | None = None,
    headers: dict[str, str] | None = None,
) -> EvalResult:
    """Ask the server every problem at temperature 0 and compare the integer after the last ``####``.

    `problems` are (question, answer), the held-out ones by default.  `base_url` may end in ``/v1`` or not.  Without
    `model`, the first model that the server lists is asked.  `headers` are sent along.
    `output_tokens` sums the usage that the server reports.  Raises `EvaluationError` if the server cannot be reached,
    answers with an HTTP error, or answers with something that is not a chat completion.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
    problems = load_heldout(limit) if problems is None else problems[:limit]
    root = base_url.rstrip("/").removesuffix("/v1")
    headers = {**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    slots = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)  # the semaphore is the limit

    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        name = model or await _first_model(session, root)

        async def ask(question: str) -> tuple[str, int]:
            body = {
                "model": name,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            async with slots:
                reply = await _request(session, "POST", f"{root}/v1/chat/completions", body)
            return _completion(reply)

        start = time.perf_counter()
        tasks = [asyncio.create_task(ask(question)) for question, _ in problems]
        try:
            replies = await asyncio.gather(*tasks)
        finally:  # after the first error the other requests are pointless
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        seconds = time.perf_counter() - start

    failures = [
        Failure(question, expected, text)
        for (question, expected), (text, _) in zip(problems, replies, strict=True)
        if extract_answer(text) != expected
    ]
    total = len(problems)
    share = (total - len(failures)) / total
    return EvalResult(
        exact_match=share,
        correct=total - len(failures),
        total=total,
        standard_error=math.sqrt(share * (1 - share) / total),
        seconds=seconds,
        output_tokens=sum(tokens for _, tokens in replies),
        failures=failures,
    )


async def _first_model(session: aiohttp.ClientSession, root: str) -> str:
    reply = await _request(session, "GET", f"{root}/v1/models", None)
    try:
        return str(reply["data"][0]["id"])  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        raise EvaluationError(f"{root}/v1/models lists no model; pass the model's name") from None


async def _request(session: aiohttp.ClientSession, method: str, url: str, body: dict[str, object] | None) -> object:
    try:
        async with session.request(method, url, json=body) as response:
            text = await response.text()
            if response.status == 401:
                raise EvaluationError(f"{url} refused the request (HTTP 401): pass the server's api_key")
            if response.status >= 400:
                raise EvaluationError(f"{url} answered HTTP {response.status}: {text[:500]}")
    except TimeoutError:
        raise EvaluationError(f"{url} did not answer in time; lower the concurrency or read the server's log") from None
    except aiohttp.InvalidURL:
        raise EvaluationError(f"{url} is not a URL; expected something like http://127.0.0.1:8000") from None
    except aiohttp.ClientError as error:
        raise EvaluationError(
            f"cannot reach {url} ({error}); start the server, e.g. with `skyline serve`, or correct the base URL"
        ) from error
    try:
        reply: object = json.loads(text)
    except json.JSONDecodeError:
        raise EvaluationError(
            f"{url} did not answer with JSON, is it an OpenAI-compatible server? {text[:200]!r}"
        ) from None
    return reply


def _completion(reply: object) -> tuple[str, int]:
    """The text and the number of output tokens of a chat completion."""
    try:
        text = reply["choices"][0]["message"]["content"] or ""  # type: ignore[index]
        usage = reply.get("usage") or {}  # type: ignore[attr-defined]
        return str(text), int(usage.get("completion_tokens", 0))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise EvaluationError(f"not a chat completion: {json.dumps(reply)[:500]}") from None
