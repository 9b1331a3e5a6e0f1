"""lm-evaluation-harness: what it is told, what is read from what it wrote, and (slow) the real one against a server.

The files in data/lm_eval were written by lm-eval 0.4.13 against `skyline serve`; of the results the tasks'
configurations, of the logs the frames of tracebacks and what goes well are left out, and folders are renamed.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from skyline.bench.engines.environments import make
from skyline.bench.engines.serving import DEFAULT_FOLDER
from skyline.bench.lm_eval import RECIPE, REQUEST_TIMEOUT_S, LmEvalError, configuration, explain, read_result, run_task
from skyline.bench.load.prompts import TokenCounter
from skyline.demo import DEMO_PATH
from skyline.demo.evaluate import evaluate, load_heldout
from tests.e2e.server import Server, serve

DATA = Path(__file__).parent / "data" / "lm_eval"


@dataclass
class At:
    url: str
    model: str = "skyline-demo"
    headers: dict[str, str] = field(default_factory=dict)


def settings(task: str = "gsm8k", url: str = "http://127.0.0.1:8000", **changes: object) -> dict:
    asked = {"chat": True, "limit": None, "concurrency": 8, "max_tokens": 64, "include_path": None}
    return configuration(task, At(url), output=Path("/out/results.json"), **{**asked, **changes})  # type: ignore[arg-type]


def test_configuration_names_the_route_and_survives_yaml() -> None:
    chat = settings(limit=5, include_path=Path("/tasks"))
    assert chat["model"] == "local-chat-completions" and chat["apply_chat_template"] is True
    assert chat["model_args"]["base_url"] == "http://127.0.0.1:8000/v1/chat/completions"
    assert chat["model_args"]["num_concurrent"] == 8 and chat["model_args"]["tokenizer_backend"] == "none"
    assert (chat["limit"], chat["include_path"], chat["gen_kwargs"]) == (5, "/tasks", {"max_gen_toks": 64})
    assert yaml.safe_load(yaml.safe_dump(chat)) == chat
    text = settings(chat=False, url="http://127.0.0.1:8000/v1/")
    assert text["model"] == "local-completions" and text["apply_chat_template"] is False
    assert text["model_args"]["base_url"] == "http://127.0.0.1:8000/v1/completions"


def test_a_yaml_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings("my.yaml")["tasks"] == [str(tmp_path / "my.yaml")]
    assert settings("gsm8k")["tasks"] == ["gsm8k"]


def test_strict_match_counts_before_flexible_extract() -> None:
    # The file lists flexible-extract first: 11 of 12, and 10 of 12 strictly.
    share, error, total = read_result(DATA / "group.json", "word_problems_a")
    assert (share, total) == (pytest.approx(10 / 12), 12)
    # The harness divides by n − 1.
    assert error == pytest.approx(math.sqrt(10 / 12 * 2 / 12 / 11))


def test_a_group_counts_the_questions_of_its_tasks() -> None:
    share, error, total = read_result(DATA / "group.json", "word_problem_group")
    assert (share, total) == (12 / 16, 16)
    assert 0.10 < error < 0.12


def test_an_unfiltered_answer_counts_where_there_is_no_other() -> None:
    assert read_result(DATA / "group.json", "word_problems_unfiltered") == (0.0, 0.0, 40)


def test_a_standard_error_that_the_harness_does_not_give_is_the_binomial_one(tmp_path: Path) -> None:
    path = DATA / "one_question.json"
    assert json.loads(path.read_text())["results"]["word_problems_a"]["exact_match_stderr,strict-match"] == "N/A"
    assert read_result(path, "word_problems_a") == (1.0, 0.0, 1)


@pytest.mark.parametrize(
    ("file", "task", "said"),
    [
        ("group.json", "word_problems_bleu", "only bleu"),
        ("one_question.json", "word_problem_list", "name one of the tasks in it"),
        ("group.json", "gsm8k", "word_problems_a, word_problems_b"),
        ("group.json", "my.yaml", "no result for my.yaml"),
        ("missing.json", "gsm8k", "another form"),
        ("timeout.log", "gsm8k", "another form"),
    ],
)
def test_a_result_without_exact_match_says_what_is_there(file: str, task: str, said: str) -> None:
    with pytest.raises(LmEvalError, match=said):
        read_result(DATA / file, task)


@pytest.mark.parametrize("value", [1.5, "N/A", -0.1])
def test_an_impossible_share_is_refused(tmp_path: Path, value: object) -> None:
    data = json.loads((DATA / "group.json").read_text())
    data["results"]["word_problems_a"]["exact_match,strict-match"] = value
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(LmEvalError, match="an exact match of"):
        read_result(tmp_path / "results.json", "word_problems_a")


def test_a_yaml_task_is_found_under_its_own_name(tmp_path: Path) -> None:
    data = json.loads((DATA / "group.json").read_text())
    data["results"] = {"word_problems_a": data["results"]["word_problems_a"]}
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert read_result(tmp_path / "results.json", "folder/anything.yaml")[2] == 12
    with pytest.raises(LmEvalError, match="no result for anything, but for word_problems_a"):
        read_result(tmp_path / "results.json", "anything")


def test_a_group_of_groups_counts_their_tasks(tmp_path: Path) -> None:
    data = json.loads((DATA / "group.json").read_text())
    data["group_subtasks"] |= {"outer": ["word_problem_group", "word_problems_unfiltered"]}
    data["results"]["outer"] = data["results"]["word_problem_group"]
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert read_result(tmp_path / "results.json", "outer")[2] == 56


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("unknown_task", "knows no task 'gsm8k'"),
        ("no_data_set", "data set of gsm8k is not available"),
        ("no_data_set_offline", "HF_HUB_OFFLINE=1"),
        ("unreachable", "http://here cannot be reached"),
        ("unreachable_one_client", "http://here cannot be reached"),
        ("timeout", f"http://here did not answer a question of gsm8k within {REQUEST_TIMEOUT_S} s"),
        ("timeout_one_client", f"http://here did not answer a question of gsm8k within {REQUEST_TIMEOUT_S} s"),
        ("wrong_model", "http://here refused a question of gsm8k: .*the model 'nope' is not served here"),
        ("wrong_model_one_client", "http://here refused a question of gsm8k: .*the model 'nope' is not served here"),
        ("unauthorized", "http://here refused a question of gsm8k: .*give a valid API key"),
    ],
)
def test_a_log_is_explained(log: str, said: str) -> None:
    assert re.search(said, explain((DATA / f"{log}.log").read_text(), "gsm8k", "http://here"))


def test_an_unknown_failure_is_quoted_and_short() -> None:
    log = "INFO all well\nTraceback (most recent call last):\n  File x\nmodule.OddError: it broke\n\r 0%|   | 0/3\n"
    assert explain(log, "gsm8k", "http://here") == "lm-eval failed on gsm8k: module.OddError: it broke"
    assert explain("", "gsm8k", "http://here") == "lm-eval failed on gsm8k: it said nothing"
    assert len(explain("ValueError: " + "x" * 10_000, "gsm8k", "http://here")) < 600


@pytest.mark.parametrize("task", ["", "gsm8k,arc", "gsm*", "a b"])
def test_more_than_one_task_is_refused(task: str) -> None:
    with pytest.raises(LmEvalError, match="is not one task"):
        ask(task, At("http://127.0.0.1:9"))


@pytest.mark.parametrize("headers", [{"X-Key": "k"}, {"Authorization": "Basic k"}])
def test_headers_that_cannot_be_sent_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(LmEvalError, match="Authorization: Bearer KEY"):
        ask("gsm8k", At("http://127.0.0.1:9", headers=headers))


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LmEvalError, match="Name one as its `tokenizer`"):
        ask("gsm8k", At("http://127.0.0.1:9"), tokenizer=str(tmp_path))


def test_an_environment_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LmEvalError, match="lm-eval cannot be installed"):
        ask("gsm8k", At("http://127.0.0.1:9"), folder=tmp_path / "file")


def ask(task: str, endpoint: At, **changes: object) -> tuple[float, float, int]:
    asked = {"tokenizer": "demo", "limit": None, "concurrency": 8, "max_tokens": 128}
    return run_task(task, endpoint, **{**asked, **changes})  # type: ignore[arg-type]


# The real harness, installed into the benchmark's own folder the first time (minutes).

KEY = "sk-the-secret-key"
TASK = """
task: word_problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 7}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: strict-match, filter: [{{function: regex, regex_pattern: "#### (-?[0-9]+)"}}, {{function: take_first}}]}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--api-key", KEY, ready_timeout=240) as running:
        yield running


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task: the first 40 held-out problems of the embedded model. The hub's cache is empty."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in load_heldout(40)))
    (folder / "word_problems.yaml").write_text(TASK.format(file=questions))
    return folder


def at(server: Server, key: str = KEY) -> At:
    return At(server.url, headers={"Authorization": f"Bearer {key}"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_chat_agrees_with_the_demo_evaluation(server: Server, tasks: Path) -> None:
    share, error, total = ask("word_problems", at(server), include_path=tasks)
    ours = asyncio.run(evaluate(server.url, limit=40, max_tokens=128, api_key=KEY))
    assert total == ours.total == 40
    # Sums in other batches round differently, which may turn one answer.
    assert share == pytest.approx(ours.exact_match, abs=1 / 40 + 1e-9) and share > 0.8
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 39), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_chat_template_the_text_is_completed(tasks: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (base / name).write_bytes((DEMO_PATH / name).read_bytes())
    config = json.loads((DEMO_PATH / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with serve(ready_timeout=240) as server:
        task = str(tasks / "word_problems.yaml")
        share, _, total = ask(task, At(server.url), tokenizer=str(base), limit=5, concurrency=1)
        sent = server.metric("skyline_prompt_tokens_total")
    questions = [question for question, _ in load_heldout(5)]
    assert (total, sent) == (5, sum(TokenCounter("demo").prompts(questions, chat=False)))
    # Without its chat template the embedded model does not know that it is asked.
    assert share < 0.8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_failures_are_told_apart(server: Server, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LmEvalError, match="knows no task 'no_such_task'"):
        ask("no_such_task", at(server), include_path=tasks)
    with pytest.raises(LmEvalError, match="give a valid API key") as refused:
        ask("word_problems", at(server, "sk-another-key"), include_path=tasks, limit=2)
    assert "sk-another-key" not in str(refused.value)
    with pytest.raises(LmEvalError, match="cannot be reached"):
        ask("word_problems", At("http://127.0.0.1:9"), include_path=tasks, limit=2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LmEvalError, match="data set of gsm8k is not available"):
        ask("gsm8k", at(server), limit=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_environment_has_no_torch() -> None:
    environment = make("lm-eval", RECIPE, DEFAULT_FOLDER.expanduser())
    installed = {path.name.partition("-")[0].lower() for path in environment.packages.glob("*.dist-info")}
    assert "lm_eval" in installed and not installed & {"torch", "transformers", "vllm"}
