"""The bound at the door: a request reserves its place before any work is spent on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

from scheduler.messages import EngineStats
from server.errors import Overloaded

MAX_RETRY_AFTER = 60
"""Seconds; the OpenAI SDK does not retry at all when it is told to wait for more than two minutes."""
_DECAY = 0.95
"""Weight of the past at each new observation of a rate: about the last twenty count."""


class Ticket:
    """Reserved places: a context manager that gives them back once, whatever happened."""

    def __init__(self, gate: AdmissionGate, count: int) -> None:
        self._gate: AdmissionGate | None = gate
        self._count = count

    def release(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release(self._count)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class AdmissionGate:
    """Counts open requests and refuses above the bound, with the time after which a retry makes sense.

    Everything is synchronous and runs in the event loop, so a burst cannot slip through between check and count.
    """

    def __init__(self, max_open_requests: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_open_requests = max_open_requests
        self.open_requests = 0
        self._clock = clock
        self._stats = EngineStats()
        self._prefill_tokens = 0.0
        self._prefill_seconds = 0.0
        self._releases = 0.0
        self._release_seconds = 0.0
        self._last_release: float | None = None

    def reserve(self, count: int = 1) -> Ticket:
        """Take places, one for each choice of an answer, or raise Overloaded with Retry-After."""
        if self.open_requests + count > self.max_open_requests:
            raise Overloaded(
                f"The server has {self.max_open_requests} open requests, which is its limit. Please retry later.",
                retry_after=self.retry_after(),
            )
        self.open_requests += count
        return Ticket(self, count)

    def release(self, count: int) -> None:
        """Called by Ticket only."""
        was_full = self.open_requests >= self.max_open_requests
        self.open_requests -= count
        now = self._clock()
        # A pause in which the server was not full says nothing about how fast places become free.
        if self._last_release is not None and was_full:
            self._releases = _DECAY * self._releases + count
            self._release_seconds = _DECAY * self._release_seconds + (now - self._last_release)
        self._last_release = now

    def observe(self, stats: EngineStats) -> None:
        """Learn the prefill rate from the figures of each step."""
        computed = stats.prompt_tokens - self._stats.prompt_tokens
        if computed > 0 and stats.num_steps == self._stats.num_steps + 1:
            self._prefill_tokens = _DECAY * self._prefill_tokens + computed
            self._prefill_seconds = _DECAY * self._prefill_seconds + stats.step_seconds
        self._stats = stats

    def retry_after(self) -> int:
        """Whole seconds, 1 to 60: until a place is free and the queue in front of it is prefilled, as measured."""
        seconds = self._release_seconds / self._releases if self._releases else 0.0
        if self._prefill_seconds > 0:
            seconds += self._stats.waiting_tokens * self._prefill_seconds / self._prefill_tokens
        return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER)
