"""The embedded demo model: its problems, its files and the evaluation client."""

import json
import random
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from skyline.demo import DEMO_PATH, HELDOUT_PATH, problems
from skyline.demo.evaluate import EvaluationError, evaluate, load_heldout

tokenizers = pytest.importorskip("tokenizers")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


# ------------------------------------------------------------------------------------------------------------- problems


def check(problem: problems.Problem) -> None:
    """Recompute the solution: every step is true, every operand is known by then, the last result is the answer."""
    known = {int(number) for number in re.findall(r"\d+", problem.question)}
    *steps, last = problem.solution.split("\n")
    result = -1
    for step in steps:
        match = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", step)
        assert match, step
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        assert result == OPERATIONS[match[2]](a, b)
        assert 0 <= result <= 999
        assert match[2] != "/" or a % b == 0
        # Facts that a story does not spell as digits: twice, half, sides of a rectangle, legs, minutes of an hour.
        assert {a, b} <= known | {2, 3, 4, 60}, problem
        known.add(result)
    assert 1 <= len(steps) <= 4
    assert last == f"#### {problem.answer}"
    assert result == problem.answer == problems.extract_answer(problem.solution)


@pytest.mark.parametrize("draw", [problems.generate, problems.expression])
def test_solutions_are_right(draw: Callable[[random.Random], problems.Problem]) -> None:
    rng = random.Random(1)
    for _ in range(5000):
        check(draw(rng))


@pytest.mark.parametrize("name", sorted(problems.TEMPLATES))
def test_each_template_over_its_range(name: str) -> None:
    rng = random.Random(2)
    for _ in range(300):
        draft = problems.Draft(rng)
        question = problems.TEMPLATES[name](draft)
        answer = int(draft.steps[-1].rpartition(" ")[2])
        check(problems.Problem(question, "\n".join([*draft.steps, f"#### {answer}"]), answer, name))


def test_a_seed_determines_the_problems() -> None:
    first, second = random.Random(3), random.Random(3)
    assert [problems.generate(first) for _ in range(50)] == [problems.generate(second) for _ in range(50)]


def test_heldout_is_disjoint_from_training() -> None:
    held = list(problems.heldout())
    keys = {(p.template, p.numbers) for p in held}
    assert len(keys) == 500
    assert all(problems.is_heldout(p) for p in held)
    rng = random.Random(4)
    trained = [problems.training(rng) for _ in range(20_000)]
    assert keys.isdisjoint((p.template, p.numbers) for p in trained)


def test_heldout_file_is_the_generators() -> None:
    assert load_heldout() == [(p.question, p.answer) for p in problems.heldout()]
    assert len(HELDOUT_PATH.read_text("utf-8").splitlines()) == 500


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 1 = 2\n#### 2", 2),
        ("#### 3\nwait\n#### 4", 4),
        ("####5", 5),
        ("#### $1,234.", 1234),
        ("#### -7", -7),
        ("2", None),
        ("####", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: int | None) -> None:
    assert problems.extract_answer(text) == answer


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_model_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_PATH.iterdir()) < 20_000_000
    assert (DEMO_PATH / "model.safetensors").stat().st_size < 16_000_000


def test_config_names_the_architecture() -> None:
    config = json.loads((DEMO_PATH / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == 2048
    assert config["tie_word_embeddings"] is True


@pytest.fixture(scope="module")
def tokenizer() -> "tokenizers.Tokenizer":
    return tokenizers.Tokenizer.from_file(str(DEMO_PATH / "tokenizer.json"))


@settings(deadline=None, max_examples=300)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer: "tokenizers.Tokenizer", text: str) -> None:
    # Text that spells a special token would be one, by design.
    ids = tokenizer.encode(text.replace("<|", "< |"), add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("<|", "< |")
    assert all(0 <= i < 2048 for i in ids)


def test_tokenizer_special_tokens(tokenizer: "tokenizers.Tokenizer") -> None:
    assert tokenizer.get_vocab_size() == 2048
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {
        "<|endoftext|>": True,
        "<|im_start|>": True,
        "<|im_end|>": True,
        "<tool_call>": False,
        "</tool_call>": False,
        "<think>": False,
        "</think>": False,
    }
    assert tokenizer.encode("2047").tokens == ["2", "0", "4", "7"]


def render(messages: list[dict[str, object]], **options: object) -> str:
    """Render as transformers does."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    config = json.loads((DEMO_PATH / "tokenizer_config.json").read_text("utf-8"))
    return environment.from_string(config["chat_template"]).render(messages=messages, **options)


def test_template_plain_chat() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  ünï\n"},
    ]
    assert render(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n  ünï\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(messages[1:2]) == "<|im_start|>user\n1 + 1?<|im_end|>\n"


def test_template_tools() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    calls = [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
        {"id": "2", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
    ]
    text = render(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "2", "content": "two"},
        ],
        tools=tools,
        add_generation_prompt=True,
    )
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in text
    assert text.endswith(
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render([{"role": "user", "content": "U"}], tools=tools).startswith("<|im_start|>system\n# Tools\n")


def test_template_refuses_what_the_model_cannot_read() -> None:
    with pytest.raises(TemplateError, match="text only"):
        render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    with pytest.raises(TemplateError, match="unknown role"):
        render([{"role": "robot", "content": "x"}])


# ------------------------------------------------------------------------------------------------------------- evaluate


@asynccontextmanager
async def stub(answer: Callable[[str], str], status: int = 200, key: str | None = None) -> AsyncIterator[str]:
    """A chat server whose text is `answer(question)`; yields its base URL."""

    async def complete(request: web.Request) -> web.Response:
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": {"message": "no"}}, status=401)
        body = await request.json()
        assert body["model"] == "stub"
        assert body["temperature"] == 0
        if status != 200:
            return web.Response(status=status, text="out of order")
        message = {"role": "assistant", "content": answer(body["messages"][-1]["content"])}
        return web.json_response({"choices": [{"message": message}], "usage": {"completion_tokens": 7}})

    async def list_models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "stub"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", list_models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.asyncio
async def test_evaluate_counts_right_and_wrong() -> None:
    rows = load_heldout(40)
    answers = dict(rows)
    wrong = rows[3][0]
    async with stub(lambda question: "no idea" if question == wrong else f"...\n#### {answers[question]}") as url:
        result = await evaluate(url + "/v1/", limit=40, concurrency=8)
    assert (result.correct, result.total, result.output_tokens) == (39, 40, 280)
    assert result.exact_match == pytest.approx(0.975)
    assert result.standard_error == pytest.approx((0.975 * 0.025 / 40) ** 0.5)
    assert [(f.question, f.expected, f.got) for f in result.failures] == [(wrong, rows[3][1], "no idea")]
    assert result.seconds > 0


@pytest.mark.asyncio
async def test_evaluate_sends_the_key() -> None:
    async with stub(lambda question: "#### 1", key="secret") as url:
        assert (await evaluate(url, limit=2, model="stub", api_key="secret")).total == 2
        with pytest.raises(EvaluationError, match="api_key"):
            await evaluate(url, limit=2, model="stub")


@pytest.mark.asyncio
async def test_evaluate_says_what_went_wrong() -> None:
    async with stub(lambda question: "", status=500) as url:
        with pytest.raises(EvaluationError, match="HTTP 500: out of order"):
            await evaluate(url, limit=3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EvaluationError, match="skyline serve"):
        await evaluate(f"http://127.0.0.1:{port}", limit=3)
    with pytest.raises(EvaluationError, match="not a URL"):
        await evaluate("nonsense", limit=3)


@pytest.mark.asyncio
async def test_evaluate_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="limit"):
        await evaluate("http://127.0.0.1:1", limit=0)
    with pytest.raises(ValueError, match="concurrency"):
        await evaluate("http://127.0.0.1:1", concurrency=0)
