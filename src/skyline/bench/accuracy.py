"""The accuracy gate: exact match on a task, asked through the endpoint that is measured."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from skyline.bench.engines.base import Endpoint
from skyline.bench.lm_eval import LmEvalError, run_task
from skyline.bench.results import AccuracyResult
from skyline.bench.suite import Accuracy, ModelSpec, SuiteError
from skyline.demo.evaluate import EvaluationError, evaluate, load_heldout
from skyline.demo.problems import extract_answer


def gate(
    accuracy: Accuracy, endpoint: Endpoint, *, run: str, engine: str, model: ModelSpec, folder: Path | None = None
) -> AccuracyResult:
    """`folder` is where lm-evaluation-harness is installed, if the task needs it.

    Never raises for what the endpoint does: whoever cannot be asked has not passed, and the reason is kept."""
    share: float | None = None
    error: float | None = None
    total, reason = 0, None
    try:
        share, error, total = _ask(accuracy, endpoint, model, folder)
    except (EvaluationError, LmEvalError, SuiteError) as problem:
        reason = f"the accuracy could not be measured: {problem}"
    passed = share is not None and share >= accuracy.at_least
    if share is not None and not passed:
        reason = f"exact match {share:.1%} ± {error:.1%} on {accuracy.task} is below {accuracy.at_least:.1%}"
    return AccuracyResult(
        run=run,
        engine=engine,
        model=model.name,
        task=accuracy.task,
        exact_match=share,
        standard_error=error,
        total=total,
        at_least=accuracy.at_least,
        passed=passed,
        reason=reason,
    )


def _ask(accuracy: Accuracy, endpoint: Endpoint, model: ModelSpec, folder: Path | None) -> tuple[float, float, int]:
    """Share of exact matches, its standard error, number of questions."""
    if accuracy.task.startswith("lm-eval:"):
        return run_task(
            accuracy.task.removeprefix("lm-eval:"),
            endpoint,
            tokenizer=model.tokenizer or model.source,
            limit=accuracy.limit,
            concurrency=accuracy.concurrency,
            max_tokens=accuracy.max_tokens,
            folder=folder,
        )
    if accuracy.task == "demo":
        problems = load_heldout(accuracy.limit)
    else:
        assert accuracy.file is not None
        problems = read_questions(accuracy.file)[: accuracy.limit]
    result = asyncio.run(
        evaluate(
            endpoint.url,
            endpoint.model,
            problems=problems,
            concurrency=accuracy.concurrency,
            max_tokens=accuracy.max_tokens,
            headers=endpoint.headers,
        )
    )
    return result.exact_match, result.standard_error, result.total


def read_questions(path: str) -> list[tuple[str, int]]:
    """Questions and answers from JSON lines as GSM8K has them. Raises SuiteError naming the line that is wrong."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read the questions {path}: {error}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"], row["answer"]
            expected = answer if isinstance(answer, int) else extract_answer(answer)
            if not isinstance(question, str) or expected is None:
                raise ValueError("the answer has no number after ####")
        except (ValueError, KeyError, TypeError) as error:
            raise SuiteError(
                f'{path}, line {number} is not {{"question": ..., "answer": "... #### N"}}: {error}'
            ) from None
        problems.append((question, expected))
    if not problems:
        raise SuiteError(f"{path} holds no questions")
    return problems
