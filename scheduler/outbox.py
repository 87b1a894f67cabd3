"""The engine's way out: straight into the socket while that has room, else by the writer thread, from one pending
output that merges, so that nothing queues up."""

from __future__ import annotations

import threading

from model.batch import Logprobs
from scheduler.channel import ChannelClosed, EngineChannel
from scheduler.messages import StepOutput

MAX_PENDING_TOKENS = 1024 * 1024
"""Tokens and log-probabilities: 5 to 15 MiB of frame. Only a front-end that has been stopped for minutes lets so much
gather."""


class Outbox:
    """At most one `StepOutput` waits for the writer.

    The main loop sends by itself while the writer has nothing to do: two threads would fight for the interpreter, and
    the step after that would start later. While the socket is full, because the front-end is busy or stopped, later
    steps are merged into the output that waits and the engine goes on. Nothing is lost; past `MAX_PENDING_TOKENS` the
    engine waits instead of computing what nobody reads.
    """

    def __init__(self, channel: EngineChannel) -> None:
        """The writer may send by `channel` between two calls of `take`."""
        self._channel = channel
        self._condition = threading.Condition()
        self._pending: StepOutput | None = None
        self._num_tokens = 0
        self._writer_waits = False
        self._closed = False

    def put(self, output: StepOutput) -> None:
        """Send an output, or hand over it and its lists. For the main loop."""
        with self._condition:
            if self._writer_waits and self._pending is None and self._sent(output):
                return
            while self._num_tokens >= MAX_PENDING_TOKENS:
                self._condition.wait()
            self._pending = output if self._pending is None else _merge(self._pending, output)
            self._num_tokens += _size(output)
            self._condition.notify_all()

    def _sent(self, output: StepOutput) -> bool:
        """All of it, or its beginning, and then the writer is to send the rest."""
        try:
            sent = self._channel.try_send(output)
        except ChannelClosed:
            return True  # the reader sees the same and exits
        if self._channel.unsent:
            self._condition.notify_all()
        return sent

    def take(self, timeout: float) -> StepOutput | None:
        """What is pending, waiting at most `timeout` seconds for it, for something `unsent` or for `close`. For the
        writer."""
        with self._condition:
            if self._pending is None and not self._channel.unsent and not self._closed:
                self._writer_waits = True
                self._condition.wait(timeout)
                self._writer_waits = False
            output, self._pending, self._num_tokens = self._pending, None, 0
            self._condition.notify_all()
            return output

    def close(self) -> None:
        """Nothing more will be put."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    @property
    def drained(self) -> bool:
        """Closed, and everything was taken."""
        with self._condition:
            return self._closed and self._pending is None and not self._channel.unsent


def _merge(earlier: StepOutput, later: StepOutput) -> StepOutput:
    """One output with the tokens of both, each request's in order. Uses up the lists of `earlier`."""
    index = {request_id: i for i, request_id in enumerate(earlier.request_ids)}
    for request_id, token_ids in zip(later.request_ids, later.token_ids, strict=True):
        if request_id in index:
            earlier.token_ids[index[request_id]] += token_ids
        else:
            earlier.request_ids.append(request_id)
            earlier.token_ids.append(token_ids)
    return StepOutput(
        step=later.step,
        request_ids=earlier.request_ids,
        token_ids=earlier.token_ids,
        finished=earlier.finished | later.finished,
        started=earlier.started | later.started,
        logprobs=_merge_logprobs(earlier.logprobs, later.logprobs),
        prompt_logprobs=_merge_logprobs(earlier.prompt_logprobs, later.prompt_logprobs),
        progress=earlier.progress | later.progress,
        stats=later.stats,
    )


def _merge_logprobs(earlier: dict[str, Logprobs], later: dict[str, Logprobs]) -> dict[str, Logprobs]:
    merged = earlier | later
    for request_id in earlier.keys() & later.keys():
        earlier[request_id].extend(later[request_id])
        merged[request_id] = earlier[request_id]
    return merged


def _size(output: StepOutput) -> int:
    """Tokens and log-probabilities of an output."""
    size = sum(map(len, output.token_ids))
    for column in (output.logprobs, output.prompt_logprobs):
        for logprobs in column.values():
            size += sum(map(len, logprobs.token_ids))
    return size
