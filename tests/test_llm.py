"""The offline API, with a real engine process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from skyline import LLM, SamplingParams
from skyline.checkpoint import CheckpointError
from skyline.engine.messages import EngineOutput
from skyline.frontend.errors import InvalidRequestError
from skyline.ipc.client import EngineDeadError
from skyline.llm import BatchFailedError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SETTINGS = {"num_kv_blocks": 64, "threads": 1}


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(tiny_checkpoint, **SETTINGS) as llm:
        yield llm


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["The quick", "What is 12 plus 30?", "Anna", "user"]
    lengths = [20, 3, 11, 1]
    params = [msgspec.structs.replace(GREEDY, max_tokens=length) for length in lengths]
    together = llm.generate(prompts, params, progress=False)
    assert [output.prompt for output in together] == prompts
    assert [len(output.outputs[0].token_ids) for output in together] == lengths
    alone = [llm.generate(prompt, mine, progress=False)[0] for prompt, mine in zip(prompts, params, strict=True)]
    assert [output.outputs[0].text for output in together] == [output.outputs[0].text for output in alone]
    assert all(output.outputs[0].finish_reason == "length" for output in together)


def test_every_form_of_a_prompt_gives_the_same(llm: LLM) -> None:
    text = "The quick brown fox"
    ids = llm.tokenizer.encode(text)
    forms = [text, [text], ids, [ids], {"prompt": text}, {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}]]
    answers = [llm.generate(form, GREEDY, progress=False) for form in forms]
    assert all(len(answer) == 1 and answer[0].prompt_token_ids == ids for answer in answers)
    assert len({answer[0].outputs[0].text for answer in answers}) == 1


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], progress=False) == []
    assert llm.chat([], progress=False) == []


def test_n_choices_are_reproducible_by_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("Anna has", params, progress=False)[0] for _ in range(2))
    assert [choice.token_ids for choice in first.outputs] == [choice.token_ids for choice in second.outputs]
    assert len({tuple(choice.token_ids) for choice in first.outputs}) == 3


def test_chat_is_generate_on_the_rendered_template(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("What is 12 plus 30?", "Anna")]
    answers = llm.chat(conversations, GREEDY, progress=False)
    assert [answer.prompt for answer in answers] == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("What is 12 plus 30?", "Anna")
    ]
    single = llm.chat(conversations[0], GREEDY, progress=False)
    assert single[0].outputs[0].text == answers[0].outputs[0].text
    assert single[0].prompt_token_ids == llm.tokenizer.encode(answers[0].prompt, add_special_tokens=False)


def test_defaults_come_from_the_checkpoint(tiny_checkpoint: Path, llm: LLM) -> None:
    assert llm.default_sampling_params() == SamplingParams()
    recommended = msgspec.structs.replace(llm.default_sampling_params(), temperature=0.5)
    assert llm.default_sampling_params() == SamplingParams(), "the defaults are not shared"
    assert recommended.temperature == 0.5
    assert len(llm.generate("Anna", progress=False)[0].outputs[0].token_ids) <= 16


@pytest.mark.parametrize("wrong", [[], [10_000], [-1], [1] * 5000, 3.5, {"text": "x"}, [1, "two"]])
def test_a_bad_prompt_is_named_before_anything_starts(llm: LLM, wrong: object) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1"):
        llm.generate(["good", wrong], GREEDY, progress=False)  # type: ignore[list-item]
    assert llm.generate("good", GREEDY, progress=False)


def test_bad_sampling_params(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 0: top_p"):
        llm.generate("good", SamplingParams(top_p=0), progress=False)
    with pytest.raises(ValueError, match="2 prompts and 1 sampling_params"):
        llm.generate(["good", "better"], [GREEDY], progress=False)


def test_a_failing_request_does_not_cost_the_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._llm.engine
    submit = engine.submit

    def failing(request):  # type: ignore[no-untyped-def]
        stream = submit(request)
        if len(request.prompt) == 1:
            engine.abort([request.request_id])
            stream.push(EngineOutput(request.request_id, finish_reason="error", error="out of luck"))
        return stream

    monkeypatch.setattr(engine, "submit", failing)
    with pytest.raises(BatchFailedError, match=r"prompt 1 of 3 failed: out of luck") as caught:
        llm.generate(["What is", [5], "Anna has"], GREEDY, progress=False)
    assert list(caught.value.errors) == [1]
    assert [output is None for output in caught.value.outputs] == [False, True, False]


def test_more_prompts_than_a_server_would_queue(llm: LLM) -> None:
    params = msgspec.structs.replace(GREEDY, max_tokens=1)
    assert len(llm.generate([[index % 500 + 3] for index in range(4200)], params, progress=False)) == 4200


def test_threads_share_the_engine(llm: LLM) -> None:
    expected = llm.generate("The quick", GREEDY, progress=False)[0].outputs[0].text
    results: list[str] = []

    def work() -> None:
        results.append(llm.generate("The quick", GREEDY, progress=False)[0].outputs[0].text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background jobs are started with interrupts ignored, and Python leaves it at that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_aborts_and_leaves_it_usable(llm: LLM, interruptible: None) -> None:
    long = msgspec.structs.replace(GREEDY, max_tokens=200)
    # As Ctrl-C does: to the main thread, which waits.
    timer = threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[index % 500 + 3] for index in range(3000)], long, progress=False)
    assert llm._llm.engine.num_unfinished == 0
    assert llm.generate("The quick", GREEDY, progress=False)
    deadline = time.monotonic() + 10
    while llm._llm.engine.stats.blocks_held or llm._llm.engine.stats.running:
        assert time.monotonic() < deadline, "KV blocks of the interrupted requests are still held"
        time.sleep(0.1)


def test_progress_bar_is_written_to_standard_error(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["one", "two"], GREEDY)
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "tokens/s" in captured.err
    assert captured.out == ""


def test_wrong_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM(tiny_checkpoint, max_num_seqs=0)
    with pytest.raises(ValueError, match="unknown field `no_such_setting`"):
        LLM(tiny_checkpoint, no_such_setting=1)
    with pytest.raises(CheckpointError):
        LLM(tmp_path)
    with pytest.raises(EngineDeadError, match="KV"):
        LLM(tiny_checkpoint, num_kv_blocks=1, max_model_len=256)


def test_close_is_idempotent_and_final(tiny_checkpoint: Path) -> None:
    llm = LLM(tiny_checkpoint, **SETTINGS)
    pid = llm._llm.engine.pid
    llm.close()
    llm.close()
    assert pid is not None and not Path(f"/proc/{pid}").exists()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("good", progress=False)


def test_a_program_that_forgets_to_close_ends_cleanly_and_never_imports_torch(tiny_checkpoint: Path) -> None:
    program = (
        "import sys; from skyline import LLM; "
        f"llm = LLM({str(tiny_checkpoint)!r}, num_kv_blocks=64, threads=1); llm.generate('one', progress=False); "
        "print('torch' in sys.modules, llm._llm.engine.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    imported, pid = done.stdout.split()
    assert imported == "False"
    assert not Path(f"/proc/{pid}").exists()
