"""What the engine client hands to one request: a stream of merged deltas with exactly one end."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass

from model.batch import Logprobs
from scheduler.messages import Finished, Started

MOST_BEHIND = 80 * 1024
"""Bytes of tokens with log-probabilities that may wait for a reader: five hundred tokens with twenty each."""
PATIENCE = 2.0
"""Seconds that more than those may wait: a small model makes them in one, and we may have been held up ourselves."""
AT_ONCE = 16
"""Tokens of those in one delta: as JSON, twenty log-probabilities of a token have two kilobytes."""


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

    Log-probabilities are much larger than their tokens. Behind a slot that has some, tokens wait with theirs in a
    backlog and are read a few at a time; a reader that lets too many of them gather is to be given up.
    """

    __slots__ = ("_backlog", "_behind_since", "_end", "_pending", "_waiter", "ended", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = False
        """The terminal event was pushed (its delta may still wait to be read)."""
        self._pending: Delta | None = None
        self._backlog = _Backlog()
        self._behind_since: float | None = None
        self._end: Finished | None = None
        """What comes with the last of the backlog."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_overrun(self) -> bool:
        """More than may has waited for the reader, whenever this was asked in the last `PATIENCE` seconds."""
        if self._backlog.num_bytes <= MOST_BEHIND:
            self._behind_since = None
            return False
        now = time.monotonic()
        if self._behind_since is None:
            self._behind_since = now
        return now - self._behind_since > PATIENCE

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
        """Add to the pending delta and wake the reader; takes ownership of the lists. Ignored after the end.

        `logprobs` are those of `token_ids`.
        """
        if self.ended:
            return
        self.ended = finished is not None
        pending = self._pending
        if self._backlog.num_bytes or (logprobs is not None and pending is not None and pending.logprobs is not None):
            if logprobs is not None:
                self._backlog.append(logprobs)
            self._end = finished
        elif pending is None:
            self._pending = Delta(token_ids, finished, started, logprobs, prompt_logprobs, progress)
        else:
            pending.token_ids += token_ids
            pending.finished = finished
            pending.started = pending.started or started
            pending.logprobs = pending.logprobs or logprobs
            pending.prompt_logprobs = _joined(pending.prompt_logprobs, prompt_logprobs)
            if progress is not None:
                pending.progress = progress
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
            if self._backlog.num_bytes:
                await asyncio.sleep(0)
                logprobs = self._backlog.take(AT_ONCE)
                end = None if self._backlog.num_bytes else self._end
                return Delta([entry[0] for entry in logprobs.token_ids], end, logprobs=logprobs)
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


class _Backlog:
    """Tokens with log-probabilities as flat arrays: a sixth of what they take as lists of Python's numbers."""

    __slots__ = ("_ids", "_values", "_width")

    def __init__(self) -> None:
        self._ids = array("I")
        self._values = array("f")  # which they have been all along
        self._width = 1

    @property
    def num_bytes(self) -> int:
        return len(self._ids) * (self._ids.itemsize + self._values.itemsize)

    def append(self, logprobs: Logprobs) -> None:
        """Entries of one request, so all of them are equally long."""
        for ids, values in zip(logprobs.token_ids, logprobs.logprobs, strict=True):
            self._ids.extend(ids)
            self._values.extend(values)
            self._width = len(ids)

    def take(self, most: int) -> Logprobs:
        """The first `most` entries, or all."""
        ids, values = self._ids[: most * self._width], self._values[: most * self._width]
        del self._ids[: len(ids)], self._values[: len(ids)]
        parts = [slice(start, start + self._width) for start in range(0, len(ids), self._width)]
        return Logprobs([ids[part].tolist() for part in parts], [values[part].tolist() for part in parts])


def _joined(earlier: Logprobs | None, later: Logprobs | None) -> Logprobs | None:
    if earlier is None or later is None:
        return earlier or later
    earlier.extend(later)
    return earlier
