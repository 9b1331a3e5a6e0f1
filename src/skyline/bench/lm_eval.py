"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) through the measured endpoint.

The harness runs as a program in an environment of its own. It sends text and messages, and the server makes tokens of
them: no tokenizer is loaded there, and neither torch nor transformers is installed.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Protocol

import yaml

from skyline.bench.engines.base import EngineError
from skyline.bench.engines.environments import Environment, Recipe, make
from skyline.bench.engines.process import ServerProcess
from skyline.bench.engines.serving import DEFAULT_FOLDER

VERSION = "0.4.13"
RECIPE = Recipe("lm-eval[api]", VERSION, module="lm_eval.models.api_models")
# Which of a task's extractions counts, where it has several.
FILTERS = ("strict-match", "flexible-extract", "none")
REQUEST_TIMEOUT_S = 600
SAID_CHARACTERS = 500

# The last line of a traceback: the exception's name and text.
_RAISED = re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception|Timeout|OfflineModeIsEnabled))(?:: (.*))?$", re.MULTILINE)
# What the harness logs of an answer with an error status, one request at a time or several.
_ANSWERED = re.compile(
    r"API request failed(?: with error message:|! Status code: \d+, Response text:) (.*?)\. Retrying\.\.\.$",
    re.MULTILINE | re.DOTALL,
)


class LmEvalError(RuntimeError):
    """The task could not be run through the endpoint; the message says why and what to do."""


class Endpoint(Protocol):
    """`url` without /v1; the name of the model there; headers that carry the authorization."""

    url: str
    model: str
    headers: dict[str, str]


def run_task(
    task: str,
    endpoint: Endpoint,
    *,
    tokenizer: str,
    limit: int | None,
    concurrency: int,
    max_tokens: int,
    include_path: Path | None = None,
    folder: Path | None = None,
) -> tuple[float, float, int]:
    """Share of exact matches in [0, 1], its standard error, and the number of questions asked.

    `task` is a name that the harness knows (gsm8k), one that a YAML file in `include_path` defines, a group that
    aggregates exact match, or a YAML file. Questions are put as a chat if the model's `tokenizer` (a folder, a name on
    the hub, "demo") has a chat template, else as text to complete, so that all engines are asked the same.
    `max_tokens` replaces the task's own limit. `folder` keeps the harness's environment, which is made the first time.
    The first `limit` questions of each task are asked, or all. See `read_result` for what is counted as exact match.

    Raises LmEvalError if the harness cannot be installed, does not know the task, cannot get its data set, or gets no
    answer from the endpoint, and if the task has no exact match.
    """
    if re.search(r"[,*?\[\]\s]", task) or not task:
        raise LmEvalError(f"{task!r} is not one task: name it as `lm-eval ls tasks` does, or its YAML file")
    key = _bearer(endpoint.headers)
    chat = _has_chat_template(tokenizer)
    try:
        environment = make("lm-eval", RECIPE, (folder or DEFAULT_FOLDER).expanduser().absolute())
    except EngineError as error:
        raise LmEvalError(f"lm-eval cannot be installed: {error}") from None
    try:
        with tempfile.TemporaryDirectory(prefix="skyline-lm-eval-") as name:
            settings = configuration(
                task,
                endpoint,
                chat=chat,
                limit=limit,
                concurrency=concurrency,
                max_tokens=max_tokens,
                include_path=include_path,
                output=Path(name, "results.json"),
            )
            status, log = _run(environment, settings, key, Path(name))
            written = sorted(Path(name).glob("results_*.json"))
            if status != 0 or not written:
                raise LmEvalError(explain(log, task, endpoint.url))
            return read_result(written[-1], task)
    except OSError as error:
        raise LmEvalError(f"lm-eval cannot be run: {error}") from None


def configuration(
    task: str,
    endpoint: Endpoint,
    *,
    chat: bool,
    limit: int | None,
    concurrency: int,
    max_tokens: int,
    include_path: Path | None,
    output: Path,
) -> dict[str, Any]:
    """The harness's configuration file: a command line would change names that look like numbers or hold commas."""
    root = endpoint.url.rstrip("/").removesuffix("/v1")
    return {
        "model": "local-chat-completions" if chat else "local-completions",
        "model_args": {
            "model": endpoint.model,
            "base_url": f"{root}/v1/{'chat/completions' if chat else 'completions'}",
            "num_concurrent": concurrency,
            "timeout": REQUEST_TIMEOUT_S,
            "tokenizer_backend": "none",
            "tokenized_requests": False,
        },
        "tasks": [str(Path(task).absolute()) if task.endswith(".yaml") else task],
        "include_path": None if include_path is None else str(include_path.absolute()),
        "apply_chat_template": chat,
        "limit": limit,
        "gen_kwargs": {"max_gen_toks": max_tokens},
        "output_path": str(output),
    }


def _run(environment: Environment, settings: dict[str, Any], key: str, scratch: Path) -> tuple[int, str]:
    """Exit status and what was printed, without the key."""
    (scratch / "run.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), "utf-8")
    # -P: a file of the working directory must not stand in for a module of that name.
    command = [str(environment.python), "-P", "-m", "lm_eval", "run", "--config", str(scratch / "run.yaml")]
    # The harness sends OPENAI_API_KEY wherever it is pointed at: the user's own is for somebody else.
    variables = {**os.environ, "OPENAI_API_KEY": key, "PYTHONUTF8": "1"}
    variables.pop("PYTHONPATH", None)
    with ServerProcess(command, variables, scratch / "log.txt", grace_s=5) as process:
        status = process.wait()
    log = (scratch / "log.txt").read_text("utf-8", errors="replace")
    # It logs the headers of requests that failed.
    return status, log.replace(f"Bearer {key}", "Bearer ***")


def read_result(path: Path, task: str) -> tuple[float, float, int]:
    """Share, standard error and number of questions from a results file of the harness.

    A task may extract answers in several ways, as gsm8k does: "strict-match" counts if it is there, then
    "flexible-extract", then the unfiltered answer ("none"), then whatever the task lists first. Where the harness gives
    no standard error, as for one question, it is the binomial one. Raises LmEvalError if there is no exact match.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        results: dict[str, dict[str, Any]] = data["results"]
        # A YAML file as the task: its results are under the name that it defines.
        name = next(iter(results)) if task.endswith(".yaml") and len(results) == 1 else task
        if name not in results:
            raise LmEvalError(f"lm-eval gave no result for {task}, but for {', '.join(results) or 'nothing'}")
        scores = results[name]
        total = sum(data["n-samples"][leaf]["effective"] for leaf in _leaves(name, data["group_subtasks"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise LmEvalError(f"lm-eval {VERSION} wrote a results file of another form ({problem!r})") from None
    matches = {key.partition(",")[2]: value for key, value in scores.items() if key.startswith("exact_match,")}
    if not matches:
        there = sorted({key.partition(",")[0] for key in scores if "," in key and "_stderr," not in key})
        what = f"only {', '.join(there)}" if there else "no metric of its own; name one of the tasks in it"
        raise LmEvalError(f"{task} has no exact match to gate by: lm-eval reports {what}")
    chosen = next((name for name in FILTERS if name in matches), next(iter(matches)))
    share, error = matches[chosen], scores.get(f"exact_match_stderr,{chosen}")
    if not isinstance(share, int | float) or not 0 <= share <= 1 or total < 1:
        raise LmEvalError(f"lm-eval reports an exact match of {share!r} on {total} questions of {task}")
    if not isinstance(error, int | float) or not math.isfinite(error):
        error = math.sqrt(share * (1 - share) / total)
    return float(share), float(error), total


def explain(log: str, task: str, url: str) -> str:
    """What went wrong, from what the harness printed."""
    raised = _RAISED.findall(log)
    # What ended it is the last; progress bars may follow.
    name, text = raised[-1] if raised else ("", log.rstrip().rpartition("\n")[2].strip())
    if text.startswith("Tasks not found"):
        return f"lm-eval {VERSION} knows no task {task!r}: name one that `lm-eval ls tasks` lists, or a YAML file"
    if "on the Hub" in text or "huggingface_hub" in name:
        return (
            f"the data set of {task} is not available ({_short(text)}): run it once with access to the hub, with "
            "HF_TOKEN if it is gated; later runs have it from the cache, without access if HF_HUB_OFFLINE=1"
        )
    if "Timeout" in name:
        return f"{url} did not answer a question of {task} within {REQUEST_TIMEOUT_S} s: lower the concurrency"
    # Before lost connections: of requests that are under way at once, the first that fails cuts off the others.
    if answers := _ANSWERED.findall(log):
        return f"{url} refused a question of {task}: {_short(answers[-1])}"
    if re.search("Cannot connect|Connection refused|Max retries exceeded|[Dd]isconnected|Connection reset", text):
        return f"{url} cannot be reached ({_short(text)}): does its server still run?"
    return f"lm-eval failed on {task}: {_short(f'{name}: {text}' if name else text) or 'it said nothing'}"


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it; a task itself."""
    return [leaf for child in groups[name] for leaf in _leaves(child, groups)] if name in groups else [name]


def _bearer(headers: dict[str, str]) -> str:
    """The key of an endpoint, for the only header in which the harness can send one."""
    rest = {name.lower(): value for name, value in headers.items()}
    kind, _, key = rest.pop("authorization", "Bearer ").partition(" ")
    if rest or kind.lower() != "bearer":
        raise LmEvalError(
            "lm-eval can only send a key as `Authorization: Bearer KEY`; this endpoint needs other headers"
        )
    return key


def _has_chat_template(tokenizer: str) -> bool:
    from skyline.checkpoint import CheckpointError
    from skyline.checkpoint.chat_template import load_chat_template
    from skyline.checkpoint.hub import resolve
    from skyline.checkpoint.tokenizer import Tokenizer
    from skyline.demo import DEMO_PATH

    try:
        folder = DEMO_PATH if tokenizer == "demo" else resolve(tokenizer, weights=False)
        return load_chat_template(Tokenizer(folder)) is not None
    except CheckpointError as error:
        raise LmEvalError(f"no tokenizer says whether the model chats: {error}. Name one as its `tokenizer`") from None


def _short(text: str) -> str:
    return text if len(text) <= SAID_CHARACTERS else text[:SAID_CHARACTERS] + " …"
