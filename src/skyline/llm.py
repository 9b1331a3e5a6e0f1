"""The offline API: many prompts in, all answers out.

    from skyline import LLM, SamplingParams

    with LLM("Qwen/Qwen3-0.6B") as llm:
        for output in llm.generate(["Once upon a time", "1 + 1 ="], SamplingParams(temperature=0, max_tokens=32)):
            print(output.outputs[0].text)

It is `AsyncLLM` on an event loop in a thread of its own, so it works in scripts, in notebooks and beside other event
loops. The model runs in the engine process; nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from skyline.checkpoint import GenerationDefaults, Tokenizer
from skyline.checkpoint.chat_template import ChatTemplateError
from skyline.demo import DEMO_PATH
from skyline.engine.config import DType, EngineConfig
from skyline.engine.messages import EngineReady
from skyline.engine.sampling_params import SamplingParams
from skyline.frontend.async_llm import AsyncLLM, Generation, RequestOutput
from skyline.frontend.errors import InvalidRequestError, RequestFailedError

Prompt = str | Sequence[int] | Mapping[str, Any]  # a mapping has "prompt" or "prompt_token_ids"
Message = Mapping[str, Any]

# The queue bound protects a server from its clients; an offline batch may be as long as its user likes.
_UNBOUNDED = 2**62

_T = TypeVar("_T")


class BatchFailedError(RequestFailedError):
    """Some requests of a batch failed after the others had completed, whose outputs are not lost."""

    def __init__(self, outputs: list[RequestOutput | None], errors: dict[int, Exception]) -> None:
        first = min(errors)
        others = f"; so did {len(errors) - 1} others" if len(errors) > 1 else ""
        super().__init__(
            f"prompt {first} of {len(outputs)} failed: {errors[first]}{others}. "
            "What completed is in this exception's `outputs`"
        )
        self.outputs = outputs  # by prompt; None for those that failed
        self.errors = errors  # by index of the prompt


class LLM:
    """A model, loaded and ready. Thread-safe; batches from several threads share the engine's steps."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        device: str = "cpu",
        max_model_len: int | None = None,
        **settings: Any,
    ) -> None:
        """`model` is a folder or a Hugging Face hub id; None is the embedded demonstration model.

        `settings` are further fields of EngineConfig, such as max_num_seqs, kv_cache_memory (bytes) or batch_invariant.
        Returns when the model is loaded. Raises CheckpointError if it is not a usable checkpoint, ValueError for wrong
        settings, EngineDeadError if the engine cannot start (it does not fit into memory, for example).
        """
        fields = dict(model=str(model or DEMO_PATH), dtype=dtype, device=device, max_model_len=max_model_len)
        try:
            config = msgspec.convert({**fields, **settings}, EngineConfig)
        except msgspec.ValidationError as error:
            raise ValueError(f"LLM(...): {error}") from None
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="skyline-llm", daemon=True)
        thread.start()
        self._loop, self._thread = loop, thread
        # Runs once: on close(), when the object is collected, or at the end of the interpreter.
        started: list[AsyncLLM] = []
        self._finalizer = weakref.finalize(self, _shut_down, loop, thread, started)
        try:
            self._llm: AsyncLLM = self._call(AsyncLLM.start(config, revision=revision, max_queued=_UNBOUNDED))
            started.append(self._llm)
            self._ready = self._call(self._llm.wait_ready())
        except BaseException:
            self._finalizer()
            raise

    # --- generating -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; the outputs come in the order of the prompts.

        A prompt is text, a list of token ids, or {"prompt": text} or {"prompt_token_ids": ids}. One prompt may stand
        for a list of one. `sampling_params` is one for all or a list of as many as prompts; None takes
        `default_sampling_params()`. `progress` shows a bar on standard error.

        Raises InvalidRequestError, naming the prompt, before anything has started; BatchFailedError, holding the other
        outputs, if the engine failed on a request. After Ctrl-C the requests are gone and the LLM goes on.
        """
        batch = _prompts(prompts)
        params = self._params(sampling_params, len(batch), self.default_sampling_params())
        return self._call(self._run(batch, params, progress, add_special_tokens=True))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the model's chat template.

        Messages and tools have the form of the OpenAI API. Without `sampling_params`, an answer may be as long as the
        context allows. Text comes back as the model wrote it: tool calls are not taken apart. Errors as in `generate`,
        and InvalidRequestError if the model has no chat template or the template refuses a conversation.
        """
        if not messages:
            return []
        single = isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        if self._llm.chat_template is None:
            raise InvalidRequestError("this model has no chat template; use generate()")
        batch: list[Prompt] = []
        for index, conversation in enumerate(conversations):
            try:
                text = self._llm.chat_template.render(
                    conversation,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **(chat_template_kwargs or {}),
                )
            except ChatTemplateError as error:
                raise InvalidRequestError(f"conversation {index}: {error}", "messages") from None
            batch.append(text)
        defaults = msgspec.structs.replace(self.default_sampling_params(), max_tokens=None)
        params = self._params(sampling_params, len(batch), defaults)
        # The template has written the special tokens already.
        return self._call(self._run(batch, params, progress, add_special_tokens=False))

    def default_sampling_params(self) -> SamplingParams:
        """A new SamplingParams() with what the checkpoint's generation_config.json recommends."""
        return with_defaults(self._llm.generation_defaults)

    # --- what is known of the model -------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self._ready.max_model_len

    @property
    def ready(self) -> EngineReady:
        """What the engine decided when it started: context, KV blocks, kernels."""
        return self._ready

    # --- end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the engine process. Harmless when already closed; done by itself at the end of the program."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run on the event loop and wait. An interrupt of the waiting cancels the work and waits for it to unwind."""
        if not self._finalizer.alive:
            work.close()
            raise RuntimeError("this LLM is closed")
        done = threading.Event()

        async def run() -> _T:
            try:
                return await work
            finally:
                done.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel() or future.cancelled():
                done.wait(timeout=10)
            raise

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int, defaults: SamplingParams
    ) -> list[SamplingParams]:
        if given is None:
            return [defaults] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ValueError(f"{count} prompts and {len(given)} sampling_params: give one for all, or one for each")
        return list(given)

    async def _run(
        self, prompts: list[Prompt], params: list[SamplingParams], progress: bool, add_special_tokens: bool
    ) -> list[RequestOutput]:
        # All are checked before the first one runs: a typo in the last prompt must not cost the work of the others.
        tokens = [await self._tokens(index, prompt, add_special_tokens) for index, prompt in enumerate(prompts)]
        generations: list[Generation] = []
        try:
            for index, (ids, mine) in enumerate(zip(tokens, params, strict=True)):
                try:
                    generations.append(self._llm.submit(ids, mine))
                except InvalidRequestError as error:
                    raise _at(index, error) from None
            with _progress_bar(len(prompts), progress) as completed:
                collected = (_collect(generation, completed) for generation in generations)
                results = await asyncio.gather(*collected, return_exceptions=True)
        finally:
            for generation in generations:
                generation.cancel()

        outputs: list[RequestOutput | None] = []
        errors: dict[int, Exception] = {}
        for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            if isinstance(result, RequestOutput):
                result.prompt = _text_of(prompt)
                outputs.append(result)
            elif isinstance(result, Exception):
                errors[index] = result
                outputs.append(None)
            else:
                raise result
        if errors:
            raise BatchFailedError(outputs, errors)
        return [output for output in outputs if output is not None]

    async def _tokens(self, index: int, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        text = _text_of(prompt)
        try:
            if text is not None:
                return await self._llm.tokenize(text, add_special_tokens)
        except InvalidRequestError as error:
            raise _at(index, error) from None
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
        if not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
            raise InvalidRequestError(
                f"prompt {index} must be text, a list of token ids, or a dict with one of them under 'prompt' or "
                "'prompt_token_ids'",
                "prompt",
            )
        return list(ids)


def with_defaults(recommended: GenerationDefaults) -> SamplingParams:
    """SamplingParams() with the values that a checkpoint recommends."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: getattr(recommended, name) for name in names}
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


async def _collect(generation: Generation, completed: Callable[[int], None]) -> RequestOutput:
    output = await generation.collect()
    completed(sum(len(completion.token_ids) for completion in output.outputs))
    return output


@contextlib.contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; call what it gives with the number of tokens of each finished prompt."""
    if not shown:
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rate = TextColumn("{task.fields[rate]:,.0f} output tokens/s")
    began, generated = time.perf_counter(), 0
    with Progress(*columns, rate, console=Console(stderr=True)) as bar:
        task = bar.add_task("Prompts", total=total, rate=0.0)

        def completed(tokens: int) -> None:
            nonlocal generated
            generated += tokens
            bar.update(task, advance=1, rate=generated / (time.perf_counter() - began))

        yield completed


def _prompts(given: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, also where one stands alone. A list of ints is one prompt of token ids."""
    if isinstance(given, (str, Mapping)):
        return [given]
    if len(given) > 0 and isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return list(given)  # type: ignore[arg-type]


def _text_of(prompt: Prompt) -> str | None:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


def _at(index: int, error: InvalidRequestError) -> InvalidRequestError:
    return InvalidRequestError(f"prompt {index}: {error}", error.param)


def _shut_down(loop: asyncio.AbstractEventLoop, thread: threading.Thread, started: list[AsyncLLM]) -> None:
    async def close() -> None:
        for llm in started:
            await llm.close()

    closing = asyncio.run_coroutine_threadsafe(close(), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if threading.current_thread() is thread:
        return  # collected on the loop's own thread, which cannot wait for itself
    with contextlib.suppress(Exception):
        closing.result(timeout=30)
    thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()
