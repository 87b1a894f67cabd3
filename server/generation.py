"""One sequence from prompt to text: reserve, tokenize, submit, detokenize, stop, and give everything back."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from random import Random

from model.config import GenerationDefaults
from scheduler.messages import AddRequest, EngineReady, Finished, FinishReason
from server.admission import AdmissionGate
from server.detokenizer import Detokenizer
from server.engine_client import EngineClient, EngineState, EngineUnavailable
from server.errors import Overloaded, Unavailable, finished_error
from server.metrics import Metrics
from server.record import RequestRecord
from server.sampling import fit_max_tokens, prompt_too_long, sampling_params
from server.schemas.sampling import SamplingFields
from server.schemas.usage import FinishReason as FinishWord
from server.streams import Delta, RequestStream
from server.tokenizer import Tokenizer

SILENCE_SECONDS = 10.0
"""A request without a token for so long gives an `Output` without one, so that its response can start."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate, before anything was spent on it."""

    request_id: str
    fields: SamplingFields
    encode: Callable[[int], Awaitable[array[int]]]
    """Token ids of the prompt, given the model's window; raises ApiError."""
    param: str
    """The field errors about the prompt name: `messages` or `prompt`."""
    default_max_tokens: int | None = None
    """None: as many as fit."""
    strip_leading_space: bool = False
    """The answer's first space belongs to the chat format."""


@dataclass(frozen=True, slots=True)
class Output:
    """The newest piece of an answer; the counts are totals."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishWord | None = None
    """`stop` or `length` in the last one and in no other."""
    stop_reason: str | int | None = None
    """The stop text, or the id of `stop_token_ids`, that ended the answer."""


class Generator:
    """Turns jobs into streams of outputs with the engine, the tokenizer and the gate it was given."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        gate: AdmissionGate,
        metrics: Metrics,
        defaults: GenerationDefaults,
        seeds: Random,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._gate = gate
        self._metrics = metrics
        self._defaults = defaults
        self._seeds = seeds

    def require_ready(self) -> EngineReady:
        """What the engine is. Raises Unavailable when it takes no requests."""
        engine = self.engine
        if engine.state is EngineState.READY and engine.ready is not None:
            return engine.ready
        match engine.state:
            case EngineState.STARTING:
                raise Unavailable("Loading model", code="model_loading", retry_after=2)
            case EngineState.STOPPED:
                raise Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)
        raise Unavailable("The engine is not running.", code="engine_down", retry_after=10)

    async def generate(self, job: Job, record: RequestRecord) -> AsyncGenerator[Output, None]:
        """The outputs of one sequence. However it is left (end, error, cancellation, close), the place at the door is
        given back and the engine forgets the request.
        """
        arrival = time.monotonic()
        try:
            ready = self.require_ready()
            ticket = self._gate.reserve()
        except Unavailable as error:
            self._metrics.on_rejection("open_requests" if isinstance(error, Overloaded) else "not_ready")
            raise
        answer = _Answer(job, self.tokenizer, self._metrics, record, arrival)
        submitted = False
        try:
            request = await self._prepare(job, ready)
            try:
                stream = self.engine.submit(request)
            except EngineUnavailable:
                self.require_ready()
                raise
            submitted = True
            answer.on_submit(len(request.prompt) // 4, request.params.max_tokens)
            output: Output | None = None
            while output is None or output.finish_reason is None:
                try:
                    # No timer once tokens flow: they come every few milliseconds, or the engine is gone and the stream
                    # ends.
                    delta = await (anext(stream) if answer.completion_tokens else _patiently(stream))
                except TimeoutError:
                    yield answer.output("")
                else:
                    output = answer.push(delta)
                    yield output
        finally:
            ticket.release()
            if submitted:
                self.engine.abort(job.request_id)
                answer.on_end()

    async def _prepare(self, job: Job, ready: EngineReady) -> AddRequest:
        fields = job.fields
        prompt = await job.encode(ready.max_model_len)
        max_tokens = fit_max_tokens(
            len(prompt), fields.token_limit, job.default_max_tokens, ready.max_model_len, job.param
        )
        params = sampling_params(
            fields, self._defaults, max_tokens=max_tokens, vocab_size=ready.vocab_size, seeds=self._seeds
        )
        return AddRequest(
            request_id=job.request_id,
            prompt=prompt.tobytes(),
            params=params,
            priority=fields.priority or 0,
            cache_salt=fields.cache_salt or "",
        )


class _Answer:
    """The text of one sequence and its counts, for its outputs, the metrics and the log."""

    def __init__(self, job: Job, tokenizer: Tokenizer, metrics: Metrics, record: RequestRecord, arrival: float) -> None:
        self.completion_tokens = 0
        self._fields = fields = job.fields
        self._detokenizer = Detokenizer(
            tokenizer,
            stop=fields.stops,
            skip_special_tokens=fields.skip_special_tokens is not False,
            include_stop=bool(fields.include_stop_str_in_output),
        )
        self._strip_space = job.strip_leading_space
        self._metrics = metrics
        self._record = record
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._finish_reason: str = "abort"
        self._arrival = self._first = self._last = arrival

    def on_submit(self, prompt_tokens: int, max_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._record.prompt_tokens += prompt_tokens
        self._metrics.on_submit(prompt_tokens, max_tokens)

    def push(self, delta: Delta) -> Output:
        """The output that a delta makes. Raises the ApiError of a request that failed."""
        finished, detokenizer = delta.finished, self._detokenizer
        if finished is not None and (error := finished_error(finished, self._record.request_id)) is not None:
            self._finish_reason = "error"
            raise error
        text = detokenizer.push(_visible(delta))
        if detokenizer.stopped is None:
            self._count(delta, len(delta.token_ids))
            if finished is not None:
                text += detokenizer.finish()
        else:
            # Tokens behind the stop text were made in vain and belong to nobody.
            self._count(delta, detokenizer.num_tokens - self.completion_tokens)
        if self._strip_space and text:
            text, self._strip_space = text.removeprefix(" "), False
        output = self.output(text)
        if detokenizer.stopped is not None:
            self._finish_reason = "stop"
            return replace(output, finish_reason="stop", stop_reason=detokenizer.stopped)
        if finished is not None:
            reason, cause = _end_of(finished, self._fields)
            self._finish_reason = reason
            return replace(output, finish_reason=reason, stop_reason=cause)
        return output

    def output(self, text: str) -> Output:
        return Output(text, self._prompt_tokens, self._cached_tokens, self.completion_tokens)

    def on_end(self) -> None:
        self._record.completion_tokens += self.completion_tokens
        self._record.finish_reason = self._finish_reason
        self._metrics.on_finish(
            self._finish_reason, self.completion_tokens, time.monotonic() - self._arrival, self._last - self._first
        )

    def _count(self, delta: Delta, num_tokens: int) -> None:
        if delta.started is not None:
            self._cached_tokens = delta.started.cached_tokens
            self._record.cached_tokens += delta.started.cached_tokens
        if num_tokens == 0:
            return
        now = time.monotonic()
        if self.completion_tokens == 0:
            self._first = now
            self._record.first_token_seconds = now - self._arrival
            self._metrics.on_first_tokens(now - self._arrival, num_tokens, self._prompt_tokens, self._cached_tokens)
        else:
            self._metrics.on_tokens(now - self._last, num_tokens)
        self._last = now
        self.completion_tokens += num_tokens


async def _patiently(stream: RequestStream) -> Delta:
    """The next delta; TimeoutError after a silence. Nothing is lost then: what arrives waits in the stream."""
    async with asyncio.timeout(SILENCE_SECONDS):
        return await anext(stream)


def _visible(delta: Delta) -> list[int]:
    """The tokens that are text: not the one that ended the request, even where it is no special token."""
    finished = delta.finished
    if finished is not None and finished.stop_token_id is not None and delta.token_ids[-1:] == [finished.stop_token_id]:
        return delta.token_ids[:-1]
    return delta.token_ids


def _end_of(finished: Finished, fields: SamplingFields) -> tuple[FinishWord, int | None]:
    """finish_reason and stop_reason; as in vLLM the model's own end-of-text token is not a stop reason."""
    if finished.reason is FinishReason.LENGTH:
        return "length", None
    token_id = finished.stop_token_id
    return "stop", token_id if token_id in (fields.stop_token_ids or ()) else None


def refuse_long_text(text: str, tokenizer: Tokenizer, window: int, param: str) -> None:
    """The cheap half of the length check, before a tokenizer's time is spent: no token is longer than the longest."""
    at_least = -(-len(text.encode()) // tokenizer.max_token_bytes)
    if at_least > window:
        raise prompt_too_long(window, f"at least {at_least}", param)


async def collect(outputs: AsyncGenerator[Output, None]) -> Output:
    """The whole answer as one output."""
    texts: list[str] = []
    last: Output | None = None
    async with aclosing(outputs):
        async for last in outputs:
            texts.append(last.text)
    assert last is not None
    return replace(last, text="".join(texts))
