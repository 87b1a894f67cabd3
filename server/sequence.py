"""One sequence while it is generated: its text, counts, log-probabilities and times, as the events they make."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

from msgspec.structs import replace

from model.batch import Logprobs
from scheduler.messages import AddRequest, Finished, FinishReason, Started
from server.detokenizer import Detokenizer
from server.errors import finished_error
from server.events import ChoiceEvent, Counts, PromptTokens, Timings, TokenLogprob
from server.metrics import Metrics
from server.record import RequestRecord
from server.schemas.sampling import SamplingFields
from server.schemas.usage import FinishReason as FinishWord
from server.streams import Delta
from server.tokenizer import Tokenizer


class Sequence:
    """Turns the deltas of one engine request into the events of one choice."""

    def __init__(
        self,
        index: int,
        request: AddRequest,
        prompt: array[int],
        fields: SamplingFields,
        tokenizer: Tokenizer,
        metrics: Metrics,
        record: RequestRecord,
        arrival: float,
        *,
        strip_leading_space: bool,
        shown: tuple[int, ...] = (),
    ) -> None:
        """`arrival`: when the request came to the door, by `time.monotonic`."""
        self.index = index
        self.request = request
        self.prompt = PromptTokens(prompt)
        """With its log-probabilities once `has_started`, where they were asked for."""
        self.counts = Counts(prompt_tokens=len(prompt))
        self.has_started = False
        """The first token is there, or the end."""
        self._fields = fields
        self._scores_only = fields.token_limit == 0
        self._detokenizer = Detokenizer(
            tokenizer,
            stop=fields.stops,
            skip_special_tokens=fields.skip_special_tokens is not False,
            include_stop=bool(fields.include_stop_str_in_output),
            shown=shown,
            min_tokens=request.params.min_tokens,
        )
        self._strip_space = strip_leading_space
        self._metrics = metrics
        self._record = record
        self._prompt_logprobs: list[TokenLogprob] = []
        self._started: Started | None = None
        self._finish_reason: str = "abort"
        self._arrival = self._first = self._last = arrival
        metrics.on_submit(len(prompt), request.params.max_tokens)

    def push(self, delta: Delta) -> ChoiceEvent:
        """The event that a delta makes. Raises the ApiError of a request that failed."""
        finished, detokenizer = delta.finished, self._detokenizer
        if finished is not None and (error := finished_error(finished, self._record.request_id)) is not None:
            self._finish_reason = "error"
            raise error
        if delta.started is not None:
            self._start(delta.started)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs += _entries(delta.prompt_logprobs)
        begins = not self.has_started and bool(delta.token_ids or finished)
        if begins:
            self.has_started = True
            self.prompt = PromptTokens(self.prompt.token_ids, tuple(self._prompt_logprobs) or self.prompt.logprobs)
        event = ChoiceEvent(self.index, self.counts, prompt=self.prompt if begins else None, progress=delta.progress)
        if self._scores_only:
            # The engine has to draw one token; nobody asked for it.
            return self._end(event, "length", None) if begins else event
        text = detokenizer.push(_visible(delta))
        num_tokens = len(delta.token_ids)
        if detokenizer.stopped is not None:
            # Tokens behind the stop text were made in vain and belong to nobody.
            num_tokens = detokenizer.num_tokens - self.counts.completion_tokens
        elif finished is not None:
            text += detokenizer.finish()
        self._count(num_tokens)
        if self._strip_space and text:
            text, self._strip_space = text.removeprefix(" "), False
        event = replace(
            event,
            counts=self.counts,
            content=text,
            token_ids=tuple(delta.token_ids[:num_tokens]),
            logprobs=() if delta.logprobs is None else tuple(_entries(delta.logprobs))[:num_tokens],
        )
        if detokenizer.stopped is not None:
            return self._end(event, "stop", detokenizer.stopped)
        return event if finished is None else self._end(event, *_end_of(finished, self._fields))

    def close(self) -> None:
        """The end, whatever it was, for the log and the metrics."""
        self._record.completion_tokens += self.counts.completion_tokens
        self._record.finish_reason = self._finish_reason
        timings, started = self._timings(), self._started
        self._metrics.on_finish(self._finish_reason, self.counts.completion_tokens, timings.total, timings.decode)
        if started is not None:
            self._metrics.on_phases(started.queue_seconds, started.prefill_seconds, timings.decode)

    def _start(self, started: Started) -> None:
        self._started = started
        self.counts = replace(self.counts, cached_tokens=started.cached_tokens)
        self._record.cached_tokens += started.cached_tokens

    def _end(self, event: ChoiceEvent, reason: FinishWord, cause: str | int | None) -> ChoiceEvent:
        self._finish_reason = reason
        return replace(event, finish_reason=reason, stop_reason=cause, timings=self._timings())

    def _timings(self) -> Timings:
        started = self._started
        return Timings(
            queue=0.0 if started is None else started.queue_seconds,
            prefill=0.0 if started is None else started.prefill_seconds,
            first_token=self._first - self._arrival,
            decode=self._last - self._first,
            total=time.monotonic() - self._arrival,
        )

    def _count(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now, counts = time.monotonic(), self.counts
        if counts.completion_tokens == 0:
            self._first = now
            if self._record.first_token_seconds is None:
                self._record.first_token_seconds = now - self._arrival
            self._metrics.on_first_tokens(now - self._arrival, num_tokens, counts.prompt_tokens, counts.cached_tokens)
        else:
            self._metrics.on_tokens(now - self._last, num_tokens)
        self._last = now
        self.counts = replace(counts, completion_tokens=counts.completion_tokens + num_tokens)


def _entries(logprobs: Logprobs) -> Iterator[TokenLogprob]:
    for ids, values in zip(logprobs.token_ids, logprobs.logprobs, strict=True):
        yield TokenLogprob(ids[0], values[0], tuple(zip(ids[1:], values[1:], strict=True)))


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
