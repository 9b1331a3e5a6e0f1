"""One model behind an asynchronous Python API: what the HTTP server and the offline `LLM` are built on."""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

import msgspec

from skyline.checkpoint import Tokenizer, load_config, load_generation_defaults, resolve
from skyline.checkpoint.chat_template import load_chat_template
from skyline.engine.config import EngineConfig
from skyline.engine.grammar_check import GrammarError, validate_grammar
from skyline.engine.messages import EngineReady, EngineRequest, FinishReason, TokenLogprobs
from skyline.engine.sampling_params import GrammarSpec, SamplingParams
from skyline.frontend.detokenizer import IncrementalDetokenizer
from skyline.frontend.errors import InvalidRequestError, OverloadedError, RequestFailedError
from skyline.ipc.client import EngineClient, RequestStream

# Text longer than this is tokenized in a thread, so that one long prompt does not hold up every other stream.
_LONG_TEXT_CHARS = 20_000
_KNOWN_GRAMMARS = 64
_MERGE_AHEAD = 8  # updates that may wait between the choices of a request and its reader
_MAX_CHARS_PER_TOKEN = 128  # no tokenizer packs more; longer prompts are refused without tokenizing them


class Update(msgspec.Struct, omit_defaults=True):
    """What was added to one choice."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    cached_tokens: int | None = None  # with the choice's first update
    prompt_logprobs: list[TokenLogprobs] | None = None  # likewise; positions 1.. of the prompt


class Completion(msgspec.Struct):
    """A finished choice."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class RequestOutput(msgspec.Struct):
    """A finished request: the prompt's tokens and its `n` choices."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    prompt: str | None = None


async def merge(sources: Sequence[AsyncIterator[Update]]) -> AsyncGenerator[Update, None]:
    """Updates of several sources in the order of their arrival; the first that raises ends all."""
    # Bounded: for a reader that is slow, updates pile up in the engine client's streams, which merge them.
    queue: asyncio.Queue[Update | Exception | None] = asyncio.Queue(_MERGE_AHEAD)

    async def feed(source: AsyncIterator[Update]) -> None:
        try:
            async for update in source:
                await queue.put(update)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(feed(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Generation:
    """A request under way. Iterate over its updates, or `collect` them; `cancel` when no longer interested."""

    def __init__(
        self, llm: AsyncLLM, request_id: str, prompt: list[int], params: SamplingParams, streams: list[RequestStream]
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt
        self._llm = llm
        self._params = params
        self._streams = streams

    def cancel(self) -> None:
        """Free what the request holds in the engine at its next step. Harmless when it has ended."""
        self._llm._engine.abort([stream.request_id for stream in self._streams])

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Updates of all choices as they come. Raises RequestFailedError; cancels the request if not exhausted."""
        async for update in self._updates(whole=False):
            yield update

    async def _updates(self, whole: bool) -> AsyncIterator[Update]:
        choices = [self._choice(index, stream, whole) for index, stream in enumerate(self._streams)]
        try:
            async for update in choices[0] if len(choices) == 1 else merge(choices):
                yield update
        finally:
            self.cancel()

    async def collect(self) -> RequestOutput:
        """Wait for all choices. Raises RequestFailedError."""
        completions = [Completion(index) for index in range(len(self._streams))]
        result = RequestOutput(self.request_id, self.prompt_token_ids, completions)
        # A stop string has to be looked for in each token; else one update a choice is enough, and the cores that the
        # engine computes on are left alone meanwhile.
        async for update in self._updates(whole=not self._params.stop):
            completion = completions[update.index]
            completion.text += update.text
            completion.token_ids += update.token_ids
            if update.logprobs is not None:
                completion.logprobs = (completion.logprobs or []) + update.logprobs
            completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
            result.cached_tokens += update.cached_tokens or 0
            result.prompt_logprobs = result.prompt_logprobs or update.prompt_logprobs
        return result

    async def _choice(self, index: int, stream: RequestStream, whole: bool) -> AsyncIterator[Update]:
        params = self._params
        text = IncrementalDetokenizer(
            self._llm.tokenizer,
            self.prompt_token_ids,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        first = True
        while True:
            output = await (stream.rest() if whole else stream.next())
            if output.finish_reason == "error":
                raise RequestFailedError(output.error or "the request failed")
            update = Update(index, finish_reason=output.finish_reason, stop_reason=output.stop_token)
            if first and output.token_ids:
                update.cached_tokens = output.cached_tokens
                update.prompt_logprobs = output.prompt_logprobs
                first = False
            # The token that ended the sequence is no part of the text, even where special tokens are shown.
            hidden = output.stop_token is not None and not params.include_stop_str_in_output
            visible = len(output.token_ids) - hidden
            before = text.num_tokens
            update.text = text.push(output.token_ids[:visible])
            if text.stop_reason is not None:
                del output.token_ids[text.num_tokens - before :]  # sampled before we saw it: no part of the answer
            update.token_ids = output.token_ids
            if output.logprobs is not None:
                update.logprobs = output.logprobs[: len(output.token_ids)]
            if output.finish_reason is not None:
                update.text += text.finish()
            stop = text.stop_reason
            if stop is not None:
                update.finish_reason, update.stop_reason = "stop", stop
                if output.finish_reason is None:
                    self._llm._engine.abort([stream.request_id])
            if update.finish_reason is not None:
                yield update
                return
            yield update


class AsyncLLM:
    """A model served by an engine process. Create with `await AsyncLLM.start(config)`; `await close()` at the end."""

    def __init__(
        self,
        config: EngineConfig,
        model_name: str,
        max_queued: int = 4096,
        *,
        engine: EngineClient | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`config.model` is a local folder. Raises CheckpointError if it is not a model."""
        folder = Path(config.model)
        self.config = config
        self.model_name = model_name
        self.max_queued = max_queued  # sequences under way at once, running and waiting
        self.model_config = load_config(folder)
        self.generation_defaults = load_generation_defaults(folder)
        self.tokenizer = Tokenizer(folder)
        self.chat_template = load_chat_template(self.tokenizer, chat_template)
        self._engine = engine or EngineClient(config)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        revision: str | None = None,
        model_name: str | None = None,
        max_queued: int = 4096,
        chat_template: str | None = None,
    ) -> AsyncLLM:
        """Resolve the model (a folder or a hub id), start loading it and return; `wait_ready` for the rest.

        `chat_template` is Jinja source to use instead of the checkpoint's.
        """
        name = model_name or config.model
        folder = await asyncio.to_thread(resolve, config.model, revision)
        config = msgspec.structs.replace(config, model=str(folder))
        config.validate()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        engine = EngineClient(config)
        await engine.start()  # before anything is read here: both processes load at the same time
        try:
            return await asyncio.to_thread(cls, config, name, max_queued, engine=engine, chat_template=chat_template)
        except BaseException:
            await engine.close()
            raise

    async def wait_ready(self) -> EngineReady:
        """Raises EngineDeadError if the engine cannot start."""
        return await self._engine.wait_ready()

    async def close(self) -> None:
        await self._engine.close()

    @property
    def engine(self) -> EngineClient:
        return self._engine

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together. Known once the engine is ready."""
        assert self._engine.ready is not None, "the engine is not ready yet"
        return self._engine.ready.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequestError for text that could not fit the context anyway."""
        limit = self.max_model_len * _MAX_CHARS_PER_TOKEN
        if len(text) > limit:
            raise InvalidRequestError(
                f"the prompt has {len(text)} characters; that cannot fit a context of {self.max_model_len} tokens"
            )
        if len(text) > _LONG_TEXT_CHARS:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

    async def prepare(self, params: SamplingParams) -> SamplingParams:
        """The slow part of checking, in a thread: grammar and bad words. `submit` need not do it again for each prompt.

        Raises InvalidRequestError.
        """
        if params.grammar is None and not params.bad_words:
            return params
        self._check_ranges(params)
        return await asyncio.to_thread(self._check_slowly, params)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generation:
        """Check and start a request. Raises InvalidRequestError or OverloadedError, and then nothing was started."""
        prompt = list(prompt)
        self.check_prompt(prompt)
        params = self.check_params(params, len(prompt))
        if self._engine.num_unfinished + params.n > self.max_queued:
            raise OverloadedError(
                f"{self._engine.num_unfinished} sequences are under way and at most {self.max_queued} are taken; "
                "try again later"
            )
        request_id = request_id or uuid.uuid4().hex
        streams = []
        for index in range(params.n):
            mine = params if params.n == 1 else msgspec.structs.replace(params, n=1)
            if params.seed is not None and index > 0:
                mine.seed = params.seed + index  # the choices differ, and each is reproducible
            streams.append(
                self._engine.submit(EngineRequest(f"{request_id}-{index}", prompt, mine, priority, cache_salt))
            )
        return Generation(self, request_id, prompt, params, streams)

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise InvalidRequestError unless the engine can take these token ids."""
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token", "prompt")
        if len(prompt) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens, but this model's context is {self.max_model_len} tokens and at "
                "least one must be left for the answer; shorten the prompt",
                "prompt",
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidRequestError(f"prompt: {wrong} is not a token id (0 to {self.vocab_size - 1})", "prompt")

    def check_params(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """The parameters with what only the front end can fill in. Raises InvalidRequestError."""
        self._check_ranges(params)
        room = self.max_model_len - prompt_tokens
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {params.max_tokens}, but after a prompt of {prompt_tokens} tokens only {room} of the "
                f"context's {self.max_model_len} are left; lower max_tokens or leave it out",
                "max_tokens",
            )
        if params.min_tokens > room:
            raise InvalidRequestError(f"min_tokens is {params.min_tokens}, but only {room} tokens fit", "min_tokens")
        return self._check_slowly(params)

    def _check_ranges(self, params: SamplingParams) -> None:
        try:
            params.validate(self.vocab_size)
        except ValueError as error:
            raise InvalidRequestError(str(error), _field(str(error))) from None
        if params.grammar is not None and params.ignore_eos:
            raise InvalidRequestError("structured output ends with EOS: drop ignore_eos", "ignore_eos")

    def _check_slowly(self, params: SamplingParams) -> SamplingParams:
        if params.grammar is not None:
            try:
                _validate_once(params.grammar)
            except GrammarError as error:
                raise InvalidRequestError(str(error), "response_format") from None
        if params.bad_words and not params.bad_words_token_ids:
            params = msgspec.structs.replace(params, bad_words_token_ids=self._bad_words(params.bad_words))
        return params

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        # At the start of a text and after a space the same word is other tokens; forbid both.
        forms = {form for word in words for form in (word, " " + word.lstrip())}
        return [ids for form in sorted(forms) if (ids := self.tokenizer.encode(form, add_special_tokens=False))]


@functools.lru_cache(_KNOWN_GRAMMARS)
def _validate_once(grammar: GrammarSpec) -> None:
    validate_grammar(grammar)


def _field(message: str) -> str:
    return message.split(" ")[0].split("[")[0].rstrip(":")
