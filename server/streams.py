"""What the engine client hands to one request: a stream of merged deltas with exactly one end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from model.batch import Logprobs
from scheduler.messages import Finished, Started


@dataclass(slots=True)
class Delta:
    """Everything that arrived for a request since its reader last looked."""

    token_ids: list[int]
    finished: Finished | None = None
    """Set in the last delta of a stream and in no other."""
    started: Started | None = None
    """Set in the delta with the first token."""
    logprobs: Logprobs | None = None
    """Of `token_ids`, where asked for."""
    prompt_logprobs: Logprobs | None = None
    """Of the next prompt tokens, where asked for; all of them come before or with the first token."""
    progress: int | None = None
    """Prompt tokens computed so far, where asked for."""


class RequestStream:
    """An async iterator of `Delta` for one reader.

    There is one pending slot and no queue: what arrives while the reader is busy is merged into it, so a slow reader
    costs one delta however far it falls behind, and nothing is lost. The slot is empty after each read, so a reader
    that keeps up really waits before the next delta and gives the event loop its turn.
    """

    __slots__ = ("_pending", "_waiter", "ended", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = False
        """The terminal event was pushed (its delta may still wait to be read)."""
        self._pending: Delta | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(
        self,
        token_ids: list[int],
        *,
        finished: Finished | None = None,
        started: Started | None = None,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
        progress: int | None = None,
    ) -> None:
        """Add to the pending delta and wake the reader; takes ownership of the lists. Ignored after the end."""
        if self.ended:
            return
        pending = self._pending
        if pending is None:
            self._pending = Delta(token_ids, finished, started, logprobs, prompt_logprobs, progress)
        else:
            pending.token_ids += token_ids
            pending.finished = finished
            pending.started = pending.started or started
            pending.logprobs = _joined(pending.logprobs, logprobs)
            pending.prompt_logprobs = _joined(pending.prompt_logprobs, prompt_logprobs)
            if progress is not None:
                pending.progress = progress
        self.ended = finished is not None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        """The next delta. `StopAsyncIteration` after the one with `finished`; `RuntimeError` for a second reader."""
        if self._waiter is not None:
            raise RuntimeError(f"request {self.request_id} is already being read")
        if self._pending is None:
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta, self._pending = self._pending, None
        assert delta is not None
        return delta


def _joined(earlier: Logprobs | None, later: Logprobs | None) -> Logprobs | None:
    if earlier is None or later is None:
        return earlier or later
    earlier.extend(later)
    return earlier
