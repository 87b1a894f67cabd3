"""How long a request may wait and take: the operator's limits and the client's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import ApiError, DeadlineExceeded, QueueTimeout, TimeLimitExceeded


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds since a request's arrival; None: no limit."""

    queue: float | None = None
    """To its first step in the engine."""
    total: float | None = None


class Clock:
    """The time of one request, against whichever limit ends first."""

    def __init__(self, deadlines: Deadlines, timeout: float | None, retry_after: Callable[[], int]) -> None:
        """`timeout`: what the client asked for. `retry_after`: called when the wait was too long."""
        self.arrival = time.monotonic()
        self.has_started = False
        """It does not wait any more: set it at the first sign of a step."""
        self._deadlines = deadlines
        self._timeout = timeout
        self._retry_after = retry_after

    @property
    def time_left(self) -> float | None:
        """Seconds; None without a limit."""
        limits = (self._timeout, self._deadlines.total, None if self.has_started else self._deadlines.queue)
        limit = min((each for each in limits if each is not None), default=None)
        return None if limit is None else self.arrival + limit - time.monotonic()

    def error(self) -> ApiError:
        """What a client gets when no time is left."""
        spent = time.monotonic() - self.arrival
        if self._timeout is not None and spent >= self._timeout:
            return DeadlineExceeded()
        if self._deadlines.total is not None and spent >= self._deadlines.total:
            return TimeLimitExceeded()
        return QueueTimeout(
            f"The request did not start within {self._deadlines.queue} seconds. Please retry later.",
            retry_after=self._retry_after(),
        )
