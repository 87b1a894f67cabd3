"""What the engine client hands to one request: a stream of merged deltas with exactly one end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from scheduler.messages import Finished


@dataclass(slots=True)
class Delta:
    """Everything that arrived for a request since its reader last looked."""

    token_ids: list[int]
    finished: Finished | None = None
    """Set in the last delta of a stream and in no other."""
    cached_tokens: int | None = None
    """Prompt tokens taken from the prefix cache; set in the delta with the first token."""


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

    def push(self, token_ids: list[int], *, finished: Finished | None = None, cached_tokens: int | None = None) -> None:
        """Add to the pending delta and wake the reader; takes ownership of `token_ids`. Ignored after the end."""
        if self.ended:
            return
        pending = self._pending
        if pending is None:
            self._pending = Delta(token_ids, finished, cached_tokens)
        else:
            pending.token_ids += token_ids
            pending.finished = finished
            if cached_tokens is not None:
                pending.cached_tokens = cached_tokens
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
