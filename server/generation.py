"""One answer from its prompts to its text: reserve, tokenize, submit, merge the choices, and give everything back."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from model.batch import SamplingParams
from model.config import GenerationDefaults
from scheduler.messages import AddRequest, EngineReady, Grammar
from server import limits
from server.admission import AdmissionGate, Ticket
from server.deadlines import Clock, Deadlines
from server.engine_client import EngineClient, EngineUnavailable
from server.errors import BadRequest, Cancelled, QueueTimeout, Unavailable
from server.events import ChoiceEvent
from server.grammar_check import GrammarChecker
from server.merge import MergedStreams
from server.metrics import Metrics
from server.open_requests import OpenRequests
from server.record import RequestRecord
from server.sampling import check_fields, fit_max_tokens, prompt_too_long, sampling_params
from server.schemas.sampling import SamplingFields
from server.sequence import Sequence as OpenSequence
from server.structured import grammar_param
from server.supervisor import Supervisor
from server.tokenizer import Tokenizer

SILENCE_SECONDS = 10.0
"""A request without a token for so long gives an event without one, so that its response can start."""

Encode = Callable[[int], Awaitable["array[int]"]]
"""Token ids of a prompt, given the model's window; raises ApiError."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to generate, before anything was spent on it."""

    request_id: str
    fields: SamplingFields
    prompts: Sequence[Encode]
    param: str
    """The field errors about the prompt name: `messages` or `prompt`."""
    default_max_tokens: int | None = None
    """None: as many as fit."""
    strip_leading_space: bool = False
    """The answer's first space belongs to the chat format."""
    logprobs: int | None = None
    """Log-probabilities of each token and so many likely ones."""
    prompt_logprobs: bool = False
    """Those of the prompt too."""
    grammar: Callable[[], Grammar | None] = lambda: None
    """Called when the prompts are there. Raises BadRequest."""
    shown: tuple[int, ...] = ()
    """Special tokens that are part of the text, for a parser to find."""


class Generator:
    """Turns jobs into streams of events with the engine, the tokenizer and the gate it was given."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        tokenizer: Tokenizer,
        gate: AdmissionGate,
        grammars: GrammarChecker,
        metrics: Metrics,
        open_requests: OpenRequests,
        defaults: GenerationDefaults,
        deadlines: Deadlines,
        seeds: Random,
    ) -> None:
        self.supervisor = supervisor
        self.tokenizer = tokenizer
        self._gate = gate
        self._grammars = grammars
        self._metrics = metrics
        self._open_requests = open_requests
        self._defaults = defaults
        self._deadlines = deadlines
        self._seeds = seeds

    @property
    def engine(self) -> EngineClient:
        return self.supervisor.engine

    def require_ready(self) -> EngineReady:
        """What the engine is. Raises Unavailable when it takes no requests."""
        return self.supervisor.require_ready()

    def require_place(self) -> None:
        """Raises Unavailable when every place at the door is taken."""
        if self._gate.is_full:
            self.require_ready()  # a full server that ends should say so
            self._gate.require_place()

    async def generate(self, job: Job, record: RequestRecord) -> AsyncGenerator[ChoiceEvent, None]:
        """The events of all choices: `n` for each prompt, numbered prompt by prompt.

        However it is left (end, error, cancellation, close), the places at the door are given back and the engine
        forgets every sequence of it.
        """
        fields = job.fields
        clock = Clock(self._deadlines, fields.timeout, self._gate.retry_after)
        check_fields(fields, job.default_max_tokens)
        count = len(job.prompts) * fields.choices
        if count > limits.SEQUENCES.maximum:
            raise BadRequest(f"n x prompts must be {limits.SEQUENCES.maximum:.0f} at most, not {count}.", param="n")
        if count > self._gate.max_open_requests:
            raise BadRequest(f"This server runs {self._gate.max_open_requests} choices at once at most.", param="n")
        try:
            ready = self.require_ready()
        except Unavailable:
            self._metrics.on_rejection("not_ready")
            raise
        ticket = self._gate.reserve(count, record.key_digest)
        record.response_id = job.request_id
        answer = _Answer(self, job, record, clock, ticket)
        try:
            with self._open_requests.track(record, answer.cancel):
                prompts, params, answer.grammar = await self._prepare(job, ready, clock)
                record.release_body()
                answer.check_cancelled()
                ticket.enqueue(sum(map(len, prompts)))
                for number, prompt in enumerate(prompts):
                    answer.submit(number * fields.choices, prompt, params[number])
                while answer.is_open:
                    for event in await answer.read():
                        yield event
        except QueueTimeout:
            self._metrics.on_rejection("queue_timeout")
            raise
        finally:
            answer.abort()
            ticket.release()
            await answer.close()

    async def _prepare(
        self, job: Job, ready: EngineReady, clock: Clock
    ) -> tuple[list[array[int]], list[SamplingParams], Grammar | None]:
        """The prompts, the parameters of each one's first choice, and what every answer must follow.

        Raises `clock.error()` when its time is up.
        """
        try:
            async with asyncio.timeout(clock.time_left):
                prompts = [await encode(ready.max_model_len) for encode in job.prompts]
                grammar = job.grammar()
                if grammar is not None:
                    await self._grammars.check(grammar, grammar_param(job.fields))
                return prompts, await self._params(job, ready, prompts), grammar
        except TimeoutError:
            raise clock.error() from None

    async def _params(self, job: Job, ready: EngineReady, prompts: list[array[int]]) -> list[SamplingParams]:
        bad_words = await self._bad_words(job.fields.bad_words or ())
        return [
            sampling_params(
                job.fields,
                self._defaults,
                max_tokens=fit_max_tokens(
                    len(prompt), job.fields.token_limit, job.default_max_tokens, ready.max_model_len, job.param
                ),
                vocab_size=ready.vocab_size,
                seeds=self._seeds,
                bad_words=bad_words,
                logprobs=job.logprobs,
                prompt_logprobs=(job.logprobs or 0) if job.prompt_logprobs else None,
            )
            for prompt in prompts
        ]

    async def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each as it is cut at the beginning of a text and behind a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                found[tuple(await self.tokenizer.encode(text, add_special_tokens=False))] = None
        return tuple(ids for ids in found if ids)


class _Answer:
    """The open sequences of one job."""

    def __init__(self, generator: Generator, job: Job, record: RequestRecord, clock: Clock, ticket: Ticket) -> None:
        self._generator = generator
        self._job = job
        self._record = record
        self._clock = clock
        self._ticket = ticket
        self.grammar: Grammar | None = None
        self._sequences: dict[int, OpenSequence] = {}
        self._streams = MergedStreams()
        self._has_tokens = False

    @property
    def is_open(self) -> bool:
        return len(self._streams) > 0

    def submit(self, index: int, prompt: array[int], params: SamplingParams) -> None:
        generator, job, fields = self._generator, self._job, self._job.fields
        is_only = fields.choices * len(job.prompts) == 1
        request = AddRequest(
            request_id=job.request_id if is_only else f"{job.request_id}-{index}",
            prompt=prompt.tobytes(),
            params=params,
            priority=fields.priority or 0,
            tenant=self._record.key_digest.hex(),
            cache_salt=_cache_salt(self._record, fields),
            grammar=self.grammar,
            # The first progress is how it is known here that a request does not wait any more.
            progress=fields.wants_progress or generator._deadlines.queue is not None,
        )
        try:
            stream = generator.supervisor.submit(request)
        except EngineUnavailable:
            generator.require_ready()
            raise
        self._streams.add(index, stream)
        if index % fields.choices == 0:
            self._record.prompt_tokens += len(prompt)
        self._sequences[index] = OpenSequence(
            index,
            request,
            prompt,
            fields,
            generator.tokenizer,
            generator._metrics,
            self._record,
            self._clock.arrival,
            strip_leading_space=job.strip_leading_space,
            shown=job.shown,
        )

    async def read(self) -> list[ChoiceEvent]:
        """The events of what has arrived; after a silence one that says nothing. Raises the clock's error."""
        left = self._clock.time_left
        # No timer once tokens flow: they come every few milliseconds, or the engine is gone and the stream ends.
        silence = None if self._has_tokens else SILENCE_SECONDS
        timeout = silence if left is None else left if silence is None else min(left, silence)
        try:
            deltas = await self._streams.next(timeout if timeout is None else max(timeout, 0.0))
        except TimeoutError:
            if left is not None and left == timeout:
                raise self._clock.error() from None
            self.check_cancelled()
            sequence = next(iter(self._sequences.values()))
            return [ChoiceEvent(sequence.index, sequence.counts)]
        self.check_cancelled()
        events = []
        for index, delta in deltas:
            sequence = self._sequences[index]
            event = sequence.push(delta)
            self._clock.has_started |= event.prompt is not None or event.progress is not None
            if event.prompt is not None:
                self._has_tokens = True
                if index % self._job.fields.choices == 0:
                    self._ticket.dequeue(len(sequence.prompt.token_ids))
                    self._submit_siblings(sequence)
            if event.finish_reason is not None:
                self._streams.remove(index)
                self._end(sequence)
            if event.token_ids or event.finish_reason is not None or event.progress is not None:
                events.append(event)
        return events

    def _submit_siblings(self, first: OpenSequence) -> None:
        """The other choices of a prompt whose first one has a token: its blocks are in the prefix cache now."""
        n, params = self._job.fields.choices, first.request.params
        for choice in range(1, n):
            seeded = self._job.fields.seed is not None
            seed = params.seed + choice if seeded else self._generator._seeds.getrandbits(64)
            self.submit(
                first.index + choice,
                first.prompt.token_ids,
                msgspec.structs.replace(params, seed=seed & (2**64 - 1), prompt_logprobs=None),
            )
            sibling = self._sequences[first.index + choice]
            sibling.prompt = first.prompt

    def _end(self, sequence: OpenSequence) -> None:
        del self._sequences[sequence.index]
        self._generator.engine.abort(sequence.request.request_id)
        self._ticket.count_answer(sequence.counts.completion_tokens)
        sequence.close()

    def cancel(self) -> None:
        """Wakes whoever reads: all streams end at once."""
        for sequence in self._sequences.values():
            self._generator.engine.abort(sequence.request.request_id)

    def check_cancelled(self) -> None:
        if self._record.cancelled:
            raise Cancelled

    def abort(self) -> None:
        for sequence in list(self._sequences.values()):
            self._end(sequence)

    async def close(self) -> None:
        await self._streams.close()


def _cache_salt(record: RequestRecord, fields: SamplingFields) -> str:
    """Each API key has cached prompts of its own: what another tenant has sent must not show in how fast an answer
    comes. A salt of the client's choice alone could not do that: it can be guessed."""
    salt = fields.cache_salt or ""
    return f"{record.key_digest.hex()}:{salt}" if record.key_digest else salt


def refuse_long_text(text: str, tokenizer: Tokenizer, window: int, param: str) -> None:
    """The cheap half of the length check, before a tokenizer's time is spent: no token is longer than the longest."""
    at_least = -(-len(text.encode()) // tokenizer.max_token_bytes)
    if at_least > window:
        raise prompt_too_long(window, f"at least {at_least}", param)
