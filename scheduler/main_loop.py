"""The engine's main loop: inbox, schedule, launch, collect, inbox again (aborts take effect before the step's tokens
do), update, outbox. It alone touches scheduler, block pool and model.

Where the model runs on a device of its own, steps overlap: the next one is scheduled and launched before the tokens of
the one that runs are collected, so that the device does not wait for the host. With drafts they do not, because what
is drafted follows from known tokens.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from queue import Empty

from model.batch import ForwardBatch
from scheduler.messages import (
    AbortRequests,
    Finished,
    FinishReason,
    ResetPrefixCache,
    Shutdown,
    StepOutput,
)
from scheduler.outbox import Outbox
from scheduler.process_end import one_line
from scheduler.reader import Inbox, Refused
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step_result import StepResult
from scheduler.worker import Grammars, Launched, Runner

logger = logging.getLogger("engine")

FORGIVEN_SECONDS = 60.0
"""Running out of memory again so soon is the end: a new process begins with all of it."""

_ABORTED = Finished(reason=FinishReason.ABORT)
_DRAIN_ABORTED = Finished(
    reason=FinishReason.ABORT, code="shutting_down", message="The server shut down before the request was complete."
)
_OUT_OF_MEMORY = Finished(
    reason=FinishReason.ERROR, code="out_of_memory", message="memory ran out while the request was computed"
)
_GRAMMAR_ENDED = Finished(reason=FinishReason.STOP)
_DRAIN_REFUSED = Finished(reason=FinishReason.REJECTED, code="shutting_down", message="The server is shutting down.")


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step between its launch and its update."""

    number: int
    launched: Launched
    constrained: set[str]
    """Requests that sample under a grammar in it."""


class Engine:
    """The main loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        grammars: Grammars,
        inbox: Inbox,
        outbox: Outbox,
        overlap: bool = False,
    ) -> None:
        """`overlap`: have a second step in flight while the tokens of the first are not known, except with drafts."""
        self.stats = scheduler.stats()
        """As of the last step or change; replaced, never written to, so that the writer can read it."""
        self.step = 0
        self.step_started: float | None = None
        """Monotonic time at which the running step began, as far as the host can tell; None between steps."""
        self.open_ids: set[str] = set()
        """Accepted requests without their terminal event."""
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = grammars
        self._inbox = inbox
        self._outbox = outbox
        self._in_flight: deque[InFlight] = deque()
        self._most_in_flight = 2 if overlap and not scheduler.speculative else 1
        self._refused: dict[str, Finished] = {}
        self._deadline: float | None = None
        """Monotonic time at which draining ends; None until `Shutdown`."""
        self._out_of_memory_at: float | None = None
        """Monotonic time of the last step that ran out of it."""

    def run(self) -> None:
        """Until a `Shutdown` is carried out. An exception of a step comes out as it is."""
        while True:
            self._drain_inbox(wait=not (self._scheduler.has_work or self._in_flight or self._draining))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                for request_id in self.open_ids:
                    self._scheduler.finish(request_id, _DRAIN_ABORTED)
            if self._launch():
                if len(self._in_flight) == self._most_in_flight:
                    self._collect()
            elif self._in_flight:
                self._collect()
            else:
                if self._scheduler.has_work:
                    raise RuntimeError("there are requests, but no step can be scheduled")
                self._put(StepResult(finished=self._scheduler.take_finished()), self.stats.step_seconds)
                if self._draining:
                    return

    def _launch(self) -> bool:
        """Begin the next step, if there is anything to compute."""
        now = time.monotonic()
        batch = self._scheduler.schedule(now)
        if batch is None:
            return False
        self.step = batch.step
        if self.step_started is None:
            self.step_started = now
        constrained = self._mask(batch)
        try:
            launched = self._runner.launch(batch)
        except MemoryError as error:
            while self._in_flight:  # launched before, with all the memory they need
                self._collect()
            self.step = batch.step
            self._recover(error)
        else:
            self._in_flight.append(InFlight(batch.step, launched, constrained))
        return True

    def _collect(self) -> None:
        """End the oldest step in flight."""
        self.step = self._in_flight[0].number
        sampled = self._in_flight[0].launched.collect()
        constrained = self._in_flight.popleft().constrained
        self._drain_inbox(wait=False)
        now = time.monotonic()
        result = self._scheduler.update(sampled, now)
        self._follow_grammars(constrained, result)
        assert self.step_started is not None
        now = time.monotonic()
        step_seconds = now - self.step_started
        self.step_started = now if self._in_flight else None
        self._put(result, step_seconds)

    @property
    def _draining(self) -> bool:
        return self._deadline is not None

    def _drain_inbox(self, wait: bool) -> None:
        """Apply what has arrived; `wait`: sleep until something does."""
        try:
            self._apply(self._inbox.get(block=wait))
            while True:
                self._apply(self._inbox.get_nowait())
        except Empty:
            pass

    def _apply(self, item: Request | Refused | AbortRequests | ResetPrefixCache | Shutdown) -> None:
        match item:
            case Request():
                refusal = _DRAIN_REFUSED if self._draining else self._scheduler.add(item)
                if refusal is None:
                    self.open_ids.add(item.request_id)
                else:
                    self._refused[item.request_id] = refusal
                    if item.has_grammar:  # if not, one under this id belongs to the request that has the id
                        self._grammars.drop(item.request_id)
            case Refused():
                self._refused[item.request_id] = item.finished
            case AbortRequests():
                for request_id in item.request_ids:
                    self._scheduler.finish(request_id, _ABORTED)
            case ResetPrefixCache():
                self._scheduler.reset_prefix_cache()
            case Shutdown():
                logger.info("draining %d requests for at most %.1f s", len(self.open_ids), item.drain_seconds)
                self._deadline = time.monotonic() + item.drain_seconds

    def _mask(self, batch: ForwardBatch) -> set[str]:
        """Give the rows that sample under a grammar their bitmasks; the ids of their requests."""
        constrained = set()
        for row, request_id in self._scheduler.grammar_rows:
            try:
                batch.grammar_bitmasks[row] = self._grammars.bitmask(request_id)
            except ValueError as error:
                self._scheduler.finish(request_id, _grammar_failed(error))  # what this step samples for it is dropped
            else:
                constrained.add(request_id)
        return constrained

    def _follow_grammars(self, constrained: set[str], result: StepResult) -> None:
        """Advance grammars by their new tokens; a request whose grammar is complete ends, also at its last token."""
        for request_id, token_ids in zip(result.request_ids, result.token_ids, strict=True):
            finished = result.finished.get(request_id)
            if request_id not in constrained or (finished is not None and finished.reason is not FinishReason.LENGTH):
                continue
            end = None
            try:
                if [token_id for token_id in token_ids if self._grammars.accept(request_id, token_id)]:
                    end = _GRAMMAR_ENDED
            except ValueError as error:
                end = _grammar_failed(error)
            if end is not None and finished is None:
                self._scheduler.finish(request_id, end)
                result.finished |= self._scheduler.take_finished()
            elif end is not None:
                result.finished[request_id] = end

    def _recover(self, error: MemoryError) -> None:
        """Give up the request that took too much memory and compute the others again. Raises the error the second time
        within a minute.
        """
        now = time.monotonic()
        if self._out_of_memory_at is not None and now - self._out_of_memory_at < FORGIVEN_SECONDS:
            raise error
        self._out_of_memory_at = now
        self._runner.reset()
        culprit = self._scheduler.abandon()
        logger.error("step %d ran out of memory, %s is given up: %s", self.step, culprit, one_line(error))
        if culprit is not None:
            self._scheduler.finish(culprit, _OUT_OF_MEMORY)
        self.step_started = None
        self._put(StepResult(finished=self._scheduler.take_finished()), self.stats.step_seconds)

    def _put(self, result: StepResult, step_seconds: float) -> None:
        self.stats = self._scheduler.stats(step_seconds)
        self.open_ids.difference_update(result.finished)
        for request_id in result.finished:
            self._grammars.drop(request_id)
        if self._refused:
            result.finished |= self._refused
            self._refused = {}
        if result:
            self._outbox.put(
                StepOutput(
                    step=self.step,
                    request_ids=result.request_ids,
                    token_ids=result.token_ids,
                    finished=result.finished,
                    started=result.started,
                    logprobs=result.logprobs,
                    prompt_logprobs=result.prompt_logprobs,
                    progress=result.progress,
                    stats=self.stats,
                )
            )


def _grammar_failed(error: Exception) -> Finished:
    return Finished(reason=FinishReason.ERROR, code="grammar_failed", message=str(error))
